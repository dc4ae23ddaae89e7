"""Key frames: the origins that the keys of a KV head are coded from, and their coordinates' units.

The keys of real models lie around one point, the center, but for those of attention sinks, which
all lie around another; a code says which of the two it starts from. RoPE turns the center with the
position, so a frame may have one for every *span* of 512 positions, which keys of these positions
start from instead. Coordinates that queries weigh more are stretched before coding, so that the
error, which a rotation spreads evenly, falls on those that matter less. Whatever the frame, codes
stand for the same keys; a good one makes their errors small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_turboquant.layout import SPAN_TOKENS

#: Rows of a frame; those of spans follow.
CENTER, SINK, BALANCE, FIRST_SPAN = range(4)


def make_frame(
    center: Tensor, sink: Tensor, balance: Tensor, span_centers: Tensor | None = None
) -> Tensor:
    """A frame of the given parts.

    Args:
        center: [num_kv_heads, head_dim], unit of keys. Where there are centers of spans, any point
            near them: scores are summed up relative to it.
        sink: As ``center``.
        balance: As ``center``, positive, without unit: what a key's coordinates are multiplied
            with, and a query's divided by.
        span_centers: [num_kv_heads, num_spans, head_dim], unit of keys; None for none.

    Returns:
        [num_kv_heads, 3 + num_spans, head_dim] float32.
    """
    fixed = torch.stack([center, sink, balance], dim=1).float()
    return fixed if span_centers is None else torch.cat([fixed, span_centers.float()], dim=1)


def plain_frame(center: Tensor) -> Tensor:
    """The frame of keys that are only centered.

    Args:
        center: [num_kv_heads, head_dim], unit of keys.

    Returns:
        [num_kv_heads, 3, head_dim] float32.
    """
    return make_frame(center, center, torch.ones_like(center))


def num_spans(max_model_len: int) -> int:
    """Spans of the positions of a context."""
    return -(-max_model_len // SPAN_TOKENS)


def near_origins(key_frame: Tensor, positions: Tensor | None) -> Tensor:
    """Where keys start that do not start at the sink.

    Args:
        key_frame: [num_kv_heads, 3 + num_spans, head_dim].
        positions: [num_tokens] integer, not negative; those past the last span belong to it. May be
            None where there are no spans.

    Returns:
        [num_tokens, num_kv_heads, head_dim], or, without spans, [num_kv_heads, head_dim].

    Raises:
        ValueError: There are spans and no positions.
    """
    last = key_frame.shape[1] - 1
    if last < FIRST_SPAN:
        return key_frame[:, CENTER]
    if positions is None:
        raise ValueError("a frame with centers of spans needs the positions of keys")
    rows = (FIRST_SPAN + positions.long() // SPAN_TOKENS).clamp(max=last)
    return key_frame[:, rows].transpose(0, 1)


def relative_frame(key_frame: Tensor) -> Tensor:
    """The frame of the same codes for keys less their center.

    Args:
        key_frame: [num_kv_heads, 3 + num_spans, head_dim].
    """
    relative = key_frame - key_frame[:, CENTER, None]
    relative[:, BALANCE] = key_frame[:, BALANCE]
    return relative
