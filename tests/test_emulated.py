"""The CUDA kernels without a GPU: emulated on the CPU, they pass the tests of the CPU kernels.

What this does not show: races, but for those of a launch with the one that it overlaps, the order
of the tensor cores' additions, what the compiler makes of the code, and anything about speed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.emulator.build import build_library, find_nvcc

ROOT = Path(__file__).resolve().parent.parent
NVCC = find_nvcc()
FILES = ["store", "dequantize", "attention", "recent", "sliding", "new_tokens"]
#: The kernels of attention stop at head_dim 256, leave values of tensors unchecked, which are on
#: a device as a rule, and have no threads.
LEFT_OUT = ["512", "four", "cuda", "opcheck", "refuse", "threads", "cpus", "gib"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NVCC is None, reason="needs the headers that come with nvcc"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    assert NVCC is not None
    return build_library(tmp_path_factory.mktemp("emulator"), NVCC)


@pytest.mark.parametrize("name", FILES)
def test_the_tests_of_the_cpu_kernels(library: Path, name: str) -> None:
    program = [sys.executable, "-m", "pytest", "-q", "-p", "tests.emulator.plugin"]
    program += ["-k", " and ".join(f"not {word}" for word in LEFT_OUT), f"tests/test_{name}.py"]
    result = subprocess.run(
        program,
        cwd=ROOT,
        env={**os.environ, "TURBOQUANT_EMULATED": str(library)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
