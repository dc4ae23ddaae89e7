"""The kernels for every instruction set this CPU has pass the same tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = ["DEFAULT", "AVX2", "AVX512"]
BEST = torch.backends.cpu.get_cpu_capability()
OTHERS = CAPABILITIES[: CAPABILITIES.index(BEST)] if BEST in CAPABILITIES else []


@pytest.mark.slow
@pytest.mark.skipif(not OTHERS, reason="this CPU has only one variant")
@pytest.mark.parametrize("capability", OTHERS)
def test_variant(capability: str) -> None:
    files = ["core_mirror", "store", "attention", "dequantize", "recent", "sliding"]
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability.lower()}
    program = (
        "import sys, torch, pytest\n"
        f"assert torch.backends.cpu.get_cpu_capability() == {capability!r}\n"
        f"sys.exit(pytest.main(['-q', *{[f'tests/test_{name}.py' for name in files]!r}]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-4000:]
