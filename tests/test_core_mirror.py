"""What the C++ kernels were compiled with equals what the Python definition says."""

from __future__ import annotations

import pytest
import torch

from vllm_turboquant import ops
from vllm_turboquant.codebook import solve_codebook
from vllm_turboquant.frame import FIRST_SPAN
from vllm_turboquant.layout import SPAN_TOKENS, SlotLayout
from vllm_turboquant.reference import block_arrays
from vllm_turboquant.rotation import ROTATION
from vllm_turboquant.testing import empty_cache, random_frame


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


def test_length_of_spans() -> None:
    """Keys that equal the center of a span have a scale of 0 at its positions, and only there."""
    num_spans = 4
    key_frame = random_frame(1, 64, torch.Generator().manual_seed(0), num_spans)
    for span in range(num_spans):
        first = span * SPAN_TOKENS
        positions = torch.tensor([first - 1, first, first + SPAN_TOKENS - 1, first + SPAN_TOKENS])
        positions = positions[positions >= 0]
        key = key_frame[:, FIRST_SPAN + span].expand(len(positions), 1, 64)
        cache, slots = empty_cache(1, 1, 16, 64), torch.arange(len(positions))
        ops.store(key, key, key_frame, cache, slots, positions=positions)
        scale = block_arrays(cache, SlotLayout(64))["key_scale"][0, 0, 0, : len(positions)]
        own = (positions // SPAN_TOKENS).clamp(max=num_spans - 1) == span
        assert torch.equal(scale == 0, own), span
