"""Random vectors and their groups, for tests of the codec."""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_turboquant.layout import SlotLayout


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def split(x: Tensor, layout: SlotLayout) -> Tensor:
    """[..., head_dim] to [..., num_groups, group]."""
    return x.unflatten(-1, (layout.num_groups, layout.group))
