"""Codes to compare with: keys and values as a simpler cache would return them.

Each function maps key and value, [num_tokens, num_kv_heads, head_dim] of any floating dtype, to
what a cache with that code gives back, in the same dtype; see ``Recorder.fake_quantize``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def int8(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Eight bits per coordinate, one scale per token and KV head."""
    return quantize(key, bits=8), quantize(value, bits=8)


def int4(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Four bits per coordinate, one scale per token and KV head."""
    return quantize(key, bits=4), quantize(value, bits=4)


def quantize(x: Tensor, bits: int) -> Tensor:
    """Round to a symmetric grid that ends at the largest magnitude of each vector.

    Args:
        x: [..., head_dim] floating dtype.
        bits: Bits per coordinate; 2 ** bits - 1 levels, zero among them.

    Returns:
        [..., head_dim], same dtype.
    """
    levels = 2 ** (bits - 1) - 1
    exact = x.float()
    step = exact.abs().amax(dim=-1, keepdim=True) / levels
    index = torch.round(exact / torch.where(step > 0, step, 1.0))
    return (index * step).to(x.dtype)
