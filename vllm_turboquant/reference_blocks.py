"""Codes in the blocks of a cache: views of a block's arrays, and integers packed into bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_turboquant.layout import SlotLayout


def block_arrays(kv_cache: Tensor, layout: SlotLayout) -> dict[str, Tensor]:
    """View the arrays of every block region without copying.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8, each (block, head)
            contiguous.

    Returns:
        Views by section name: codes [num_blocks, num_kv_heads, block_size, bytes] uint8, scales
        [num_blocks, num_kv_heads, num_groups, block_size] float16.
    """
    num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    region = kv_cache.view(num_blocks, num_kv_heads, -1)  # refuses what it would have to copy
    arrays: dict[str, Tensor] = {}
    for name, section in layout.sections(block_size).items():
        part = region[:, :, section.offset_bytes : section.end_bytes]
        if name.endswith("_scale"):
            shape = (num_blocks, num_kv_heads, layout.num_groups, block_size)
            arrays[name] = part.view(torch.float16).view(shape)
        else:
            arrays[name] = part.view(num_blocks, num_kv_heads, block_size, -1)
    return arrays


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Pack small integers along the last axis, the first one in the lowest bits of a byte.

    Args:
        codes: [..., n] below ``2 ** bits``.

    Returns:
        [..., n * bits / 8] uint8.
    """
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8) * bits
    num_bytes = codes.shape[-1] // per_byte
    parts = codes.to(torch.uint8).reshape(*codes.shape[:-1], num_bytes, per_byte) << shifts
    return parts.sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int) -> Tensor:
    """Undo ``pack_bits``.

    Args:
        packed: [..., m] uint8.

    Returns:
        [..., m * 8 / bits] uint8.
    """
    shifts = torch.arange(8 // bits, dtype=torch.uint8) * bits
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)
