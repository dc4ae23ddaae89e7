"""Registration, selection and the backend under the Python code of vLLM 0.33.

There is no CPU build of 0.33, so ``scripts/setup_env.py vllm-0.33`` lays its Python files in a
folder of their own, with the native libraries of the installed 0.32; this file runs three test
files there.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROOT = Path(__file__).resolve().parent.parent
VLLM_0_33 = ROOT / "build" / "vllm-0.33"
NAMES = ("plugin", "backend", "recent_pool")


@pytest.mark.skipif(not VLLM_0_33.exists(), reason="run: make build/vllm-0.33")
def test_the_plugin_under_vllm_0_33() -> None:
    environment = {**os.environ, "PYTHONPATH": str(VLLM_0_33)}
    version = subprocess.run(
        [sys.executable, "-c", "import vllm; print('version', vllm.__version__, vllm.__file__)"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"version 0.33.0 {VLLM_0_33}" in version.stdout
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *(f"tests/test_{name}.py" for name in NAMES)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-4000:]
