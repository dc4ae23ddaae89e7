"""What the C++ kernels were compiled with equals what the Python definition says."""

from __future__ import annotations

import pytest
import torch

from vllm_turboquant import ops  # noqa: F401  (registers torch.ops.turboquant)
from vllm_turboquant.codebook import solve_codebook
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.rotation import ROTATION


def constants(head_dim: int, block_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    offsets = torch.empty(6, dtype=torch.int64)
    codebook = torch.empty(6)
    signs = torch.empty(3, 128)
    torch.ops.turboquant.format_constants(head_dim, block_size, offsets, codebook, signs)
    return offsets, codebook, signs


@pytest.mark.parametrize("block_size", [16, 48, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256, 384, 512])
def test_layout(head_dim: int, block_size: int) -> None:
    layout = SlotLayout(head_dim)
    sections = layout.sections(block_size)
    names = ["key_index", "key_sign", "value_index", "key_scale", "value_scale"]
    assert list(sections) == names
    expected = [sections[name].offset_bytes for name in names] + [block_size * layout.slot_bytes]
    assert constants(head_dim, block_size)[0].tolist() == expected


@pytest.mark.parametrize("group", [64, 128])
def test_codebook(group: int) -> None:
    book = solve_codebook(2, group)
    expected = torch.tensor(
        [
            book.centroids[2],
            book.centroids[3],
            book.boundaries[2],
            book.qjl_scale,
            book.qjl_scale / group**0.5,
            group**0.5,
        ],
        dtype=torch.float64,
    ).float()
    assert torch.equal(constants(group, 16)[1], expected)


def test_sign_diagonals() -> None:
    expected = torch.stack([ROTATION.key, ROTATION.residual, ROTATION.value])
    assert torch.equal(constants(128, 16)[2], expected)
