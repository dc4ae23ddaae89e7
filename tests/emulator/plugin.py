"""``pytest -p tests.emulator.plugin``: operators on CPU tensors run the CUDA kernels, emulated.

TURBOQUANT_EMULATED names the library that ``build.py`` made. Nothing else is different, so tests of
the CPU kernels test those of the GPU; ``test_emulated.py`` says which.
"""

from __future__ import annotations

import ctypes
import os

import pytest
import torch

from vllm_turboquant import ops

LIBRARY = os.environ["TURBOQUANT_EMULATED"]
torch.ops.load_library(LIBRARY)
for name in ("store", "paged_attention", "dequantize", "assign_recent"):
    setattr(ops, name, getattr(torch.ops.turboquant_emulated, name))
ops.CPU_VARIANT = "emulated"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail where nothing was emulated after all."""
    count = ctypes.CDLL(LIBRARY).emulated_blocks
    count.restype = ctypes.c_int64
    if count() == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
