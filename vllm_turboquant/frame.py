"""Key frames: the two origins that the keys of a KV head are coded from, and their coordinates'
units.

The keys of real models lie around one point, the center, but for those of attention sinks, which
all lie around another; a code says which of the two it starts from. Coordinates that queries weigh
more are stretched before coding, so that the error, which a rotation spreads evenly, falls on
those that matter less. Whatever the frame, codes stand for the same keys; a good one makes their
errors small.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Rows of a frame.
CENTER, SINK, BALANCE = range(3)


def make_frame(center: Tensor, sink: Tensor, balance: Tensor) -> Tensor:
    """A frame of the given parts.

    Args:
        center: [num_kv_heads, head_dim], unit of keys.
        sink: As ``center``.
        balance: As ``center``, positive, without unit: what a key's coordinates are multiplied
            with, and a query's divided by.

    Returns:
        [num_kv_heads, 3, head_dim] float32.
    """
    return torch.stack([center, sink, balance], dim=1).float()


def plain_frame(center: Tensor) -> Tensor:
    """The frame of keys that are only centered.

    Args:
        center: [num_kv_heads, head_dim], unit of keys.

    Returns:
        [num_kv_heads, 3, head_dim] float32.
    """
    return make_frame(center, center, torch.ones_like(center))


def relative_frame(key_frame: Tensor) -> Tensor:
    """The frame of the same codes for keys less their center.

    Args:
        key_frame: [num_kv_heads, 3, head_dim].
    """
    center, sink, balance = key_frame.unbind(dim=1)
    return make_frame(torch.zeros_like(center), sink - center, balance)
