"""``pytest -p tests.emulator.plugin``: operators on CPU tensors run the CUDA kernels, emulated.

TURBOQUANT_EMULATED names the library that ``build.py`` made. Nothing else is different, so tests of
the CPU kernels test those of the GPU; ``test_emulated.py`` says which.
"""

from __future__ import annotations

import os
from typing import Any

import torch

from vllm_turboquant import ops

torch.ops.load_library(os.environ["TURBOQUANT_EMULATED"])
emulated = torch.ops.turboquant_emulated


def paged_attention(*args: Any, scratch: None = None, tickets: None = None, **kwargs: Any) -> None:
    """``ops.paged_attention`` without the device's working memory."""
    rows, memory, copies = args[:10], args[10:12], args[12:]
    assert not any(memory)
    emulated.paged_attention(*rows, *copies, **kwargs)


ops.store = emulated.store
ops.paged_attention = paged_attention
ops.dequantize = emulated.dequantize
ops.assign_recent = emulated.assign_recent
ops.CPU_VARIANT = "emulated"
