"""Reads the key frames of every rank of a running engine.

An engine started with ``--worker-extension-cls=key_frames.KeyFrames``, with this folder on
PYTHONPATH, answers ``collective_rpc("key_frames")`` with what the workers return, rank by rank.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_turboquant import CACHE_DTYPE

#: Buffers of a rank: name in the model to nested lists, [num_kv_heads of the rank, ..., head_dim].
Frames = Mapping[str, Any]


class KeyFrames:
    """Method that vLLM adds to its worker class."""

    model_runner: Any

    def key_frames(self) -> Frames:
        """Buffers in which this cache keeps what was measured of this rank's keys."""
        buffers = self.model_runner.get_model().named_buffers()
        return {
            name: buffer.float().tolist()
            for name, buffer in buffers
            if re.fullmatch(rf"{CACHE_DTYPE}_\w*frame", name.rpartition(".")[2])
        }


def join_heads(ranks: Sequence[Frames]) -> dict[str, Tensor]:
    """Frames of the whole model, [num_kv_heads, ..., head_dim]; replicated heads once a rank."""
    return {name: torch.cat([torch.tensor(rank[name]) for rank in ranks]) for name in ranks[0]}


def relative_errors(got: Sequence[Frames], want: Sequence[Frames]) -> dict[str, Tensor]:
    """How far frames are from those of another engine.

    Args:
        got: Frames of an engine, by rank.
        want: Likewise, of an engine with fewer ranks, whose heads ``got`` may replicate.

    Returns:
        Per buffer, [num_kv_heads, ...]: norm of the difference over the norm of what is wanted,
        for every vector of head_dim; 0 where both are 0.
    """
    joined, expected = join_heads(got), join_heads(want)
    assert joined.keys() == expected.keys() != set()
    errors = {}
    for name, frames in joined.items():
        one = expected[name].repeat_interleave(len(frames) // len(expected[name]), dim=0)
        difference, norm = ((frames - one).norm(dim=-1), one.norm(dim=-1))
        errors[name] = torch.where(difference > 0, difference / norm, 0.0)
    return errors
