"""The store kernel writes the reference's bytes, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_turboquant import ops, reference
from vllm_turboquant.frame import (
    BALANCE,
    CENTER,
    FIRST_SPAN,
    SINK,
    make_frame,
    near_origins,
    plain_frame,
)
from vllm_turboquant.layout import SPAN_TOKENS, SlotLayout
from vllm_turboquant.testing import empty_cache, random_frame

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Around every border of three spans, and far past the last.
POSITIONS = [0, 1, 510, 511, 512, 513, 1023, 1024, 1535, 1536, 70_000, 2**31, 2**40]


def assert_same_bytes(
    key: Tensor,
    value: Tensor,
    key_frame: Tensor,
    slot_mapping: Tensor,
    block_size: int = 16,
    positions: Tensor | None = None,
) -> Tensor:
    """Store with both into poisoned pools, compare them, and return one."""
    num_blocks = max(1, int(slot_mapping.max()) // block_size + 1)
    want, got = (empty_cache(num_blocks, key.shape[1], block_size, key.shape[2]) for _ in range(2))
    reference.store(key, value, key_frame, want, slot_mapping, positions)
    ops.store(key, value, key_frame, got, slot_mapping, positions=positions)
    different = (want != got).nonzero()
    assert not len(different), f"{len(different)} bytes differ, the first at {different[0]}"
    return got


def sink_bits(cache: Tensor, head_dim: int, num_tokens: int) -> Tensor:
    """Whether the first keys of a pool start from the sink: [num_tokens, num_heads, num_groups]."""
    scale = reference.block_arrays(cache, SlotLayout(head_dim))["key_scale"]
    return scale.signbit().permute(0, 3, 1, 2).flatten(0, 1)[:num_tokens]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (64, 128), (128, 16), (128, 48), (256, 32), (512, 16)]
)
def test_bytes(head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    """Random frames, keys everywhere between their origins."""
    generator = torch.Generator().manual_seed(head_dim + block_size)
    key, value = torch.randn(2, 700, 3, head_dim, generator=generator)
    key_frame = random_frame(3, head_dim, generator)
    center, sink, balance = key_frame.unbind(dim=1)
    way = torch.rand(700, 3, 1, generator=generator)
    key = (3 * key / balance + center + way * (sink - center)).to(dtype)
    slots = torch.randperm(700, generator=generator)
    cache = assert_same_bytes(key, value.to(dtype), key_frame, slots, block_size)
    at_sink = sink_bits(cache, head_dim, 700)
    assert 0.3 < at_sink.double().mean() < 0.7
    assert head_dim < 256 or (at_sink[..., 0] != at_sink[..., 1]).any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("num_spans", [0, 1, 3])
def test_bytes_in_frames_with_spans(num_spans: int, head_dim: int, dtype: torch.dtype) -> None:
    """Positions in any order, keys everywhere between their origins, at them in the end."""
    generator = torch.Generator().manual_seed(head_dim + num_spans)
    key_frame = random_frame(2, head_dim, generator, num_spans)
    positions = torch.tensor(POSITIONS).repeat(20)
    positions = positions[torch.randperm(len(positions), generator=generator)]
    near, sink = near_origins(key_frame, positions), key_frame[:, SINK]
    key, value = torch.randn(2, len(positions), 2, head_dim, generator=generator)
    way = torch.rand(len(positions), 2, 1, generator=generator)
    key = 3 * key / key_frame[:, BALANCE] + near + way * (sink - near)
    key[-50:] = near.expand_as(key)[-50:]
    slots = torch.randperm(len(positions), generator=generator)
    cache = assert_same_bytes(key.to(dtype), value.to(dtype), key_frame, slots, 48, positions)
    at_sink = sink_bits(cache, head_dim, len(positions))
    assert 0.2 < at_sink.double().mean() < 0.6
    if dtype == torch.float32:
        scale = reference.block_arrays(cache, SlotLayout(head_dim))["key_scale"]
        assert (scale[slots[-50:] // 48, :, :, slots[-50:] % 48] == 0).all()


def test_a_span_is_only_another_center() -> None:
    """The bytes are those in frames without spans, of which each has the center of a span."""
    generator = torch.Generator().manual_seed(4)
    key_frame = random_frame(2, 128, generator, num_spans=3)
    key, value = 3 * torch.randn(2, len(POSITIONS), 2, 128, generator=generator)
    slots, positions = torch.arange(len(POSITIONS)), torch.tensor(POSITIONS)
    got, want = empty_cache(1, 2, 16, 128), empty_cache(1, 2, 16, 128)
    ops.store(key, value, key_frame, got, slots, positions=positions)
    for span in range(3):
        frame = key_frame[:, :FIRST_SPAN].clone()
        frame[:, CENTER] = key_frame[:, FIRST_SPAN + span]
        its = (positions // SPAN_TOKENS).clamp(max=2) == span
        ops.store(key[its], value[its], frame, want, slots[its])
    assert torch.equal(got, want)


@pytest.mark.parametrize("exponent", [-40, -20, -8, 0, 8, 15, 18])
def test_bytes_at_extreme_magnitudes(exponent: int) -> None:
    generator = torch.Generator().manual_seed(exponent + 100)
    key, value = torch.randn(2, 64, 2, 128, generator=generator) * 10.0**exponent
    assert_same_bytes(key, value, plain_frame(torch.zeros(2, 128)), torch.arange(64))
    key_frame = random_frame(2, 128, generator)
    key_frame[:, :BALANCE] *= 10.0**exponent
    assert_same_bytes(key, value, key_frame, torch.arange(64))


def test_bytes_of_special_vectors() -> None:
    """Zeros of both signs, one-hot, constant and alternating vectors; a center only shifts keys."""
    center = torch.arange(128.0)[None]  # integers, so that adding and subtracting it is exact
    vectors = [
        torch.zeros(128),
        -torch.zeros(128),
        torch.eye(128)[3],
        -torch.eye(128)[127],
        torch.ones(128),
        torch.tensor([1.0, -1.0]).repeat(64),
        center[0],
    ]
    value = torch.stack(vectors)[:, None]
    slots = torch.arange(len(vectors))
    shifted = assert_same_bytes(value + center, value, plain_frame(center), slots)
    plain = assert_same_bytes(value, value, plain_frame(torch.zeros(1, 128)), slots)
    assert torch.equal(shifted, plain)


def test_bytes_of_keys_at_and_between_the_origins() -> None:
    """Exactly at them, exactly halfway, a step off; each group of a key takes its own."""
    j = torch.arange(256.0)
    center, way = (3 * j - 50)[None], (j % 7 + 1)[None]  # integers: halfway is a tie
    sink = center + 2 * way
    key_frame = make_frame(center, sink, 2.0 ** (j % 3)[None])
    step = ((j == 40) | (j == 200)).float()
    groups = torch.cat([center[:, :128], sink[:, 128:]], dim=1)
    key = torch.stack([center, sink, center + way, center + way + step, groups])
    cache = assert_same_bytes(key, torch.zeros_like(key), key_frame, torch.arange(5))
    expected = [[False] * 2, [True] * 2, [False] * 2, [True] * 2, [False, True]]
    assert sink_bits(cache, 256, 5)[:, 0].tolist() == expected


@pytest.mark.parametrize("special", [torch.nan, -torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_that_are_not_numbers(dtype: torch.dtype, special: float) -> None:
    """They stay at the center, group by group; of their bytes, only a NaN's payload is free."""
    key_frame = random_frame(1, 256, torch.Generator().manual_seed(1))
    key = key_frame[:, SINK].repeat(20, 1, 1)
    key[1], key[2, :, 5], key[3, :, 200] = special, special, special
    key = key.to(dtype)
    caches = [empty_cache(2, 1, 16, 256) for _ in range(2)]
    arrays = []
    for cache, store in zip(caches, (reference.store, ops.store), strict=True):
        store(key, torch.zeros_like(key), key_frame, cache, torch.arange(20))
        expected = [[True] * 2, [False] * 2, [False, True], [True, False]] + [[True] * 2] * 16
        assert sink_bits(cache, 256, 20)[:, 0].tolist() == expected, store
        arrays.append(reference.block_arrays(cache, SlotLayout(256)))
    want, got = arrays
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)


def test_strided_inputs_and_extra_rows() -> None:
    """Keys and values as vLLM passes them: slices of one fused projection, padded with garbage."""
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(10, (4 + 2 + 2) * 64, generator=generator)
    fused[8:] = torch.nan
    _, key, value = fused.split([256, 128, 128], dim=-1)
    key, value = key.view(10, 2, 64), value.view(10, 2, 64)
    assert not key.is_contiguous()
    positions = torch.tensor([0, 700, 3, 512, 511, 4, 5, 1024, -1, -1])
    key_frame = random_frame(2, 64, generator, num_spans=2)
    assert_same_bytes(key, value, key_frame, torch.arange(8), positions=positions)


def test_negative_slots_write_nothing() -> None:
    """Whatever their position is."""
    generator = torch.Generator().manual_seed(2)
    key, value = torch.randn(2, 5, 2, 64, generator=generator)
    slots, key_frame = torch.tensor([-1, 3, -1, -7, 20]), random_frame(2, 64, generator, 2)
    positions = torch.tensor([-1, 512, 2**63 - 1, -(2**63), 7])
    cache = assert_same_bytes(key, value, key_frame, slots, positions=positions)
    untouched = empty_cache(2, 2, 16, 64)
    kept = [1, 4]
    reference.store(key[kept], value[kept], key_frame, untouched, slots[kept], positions[kept])
    assert torch.equal(cache, untouched)
    ops.store(key, value, key_frame, cache, torch.full((5,), -1), positions=positions)
    assert torch.equal(cache, untouched)


def test_blocks_and_heads_with_other_strides() -> None:
    generator = torch.Generator().manual_seed(3)
    key, value = torch.randn(2, 40, 2, 64, generator=generator)
    key_frame = random_frame(2, 64, generator)
    caches = [empty_cache(3, 2, 16, 64, head_major=head_major) for head_major in (False, True)]
    assert caches[0].stride() != caches[1].stride()
    for cache in caches:
        ops.store(key, value, key_frame, cache, torch.arange(40))
    assert torch.equal(*caches)


def test_no_tokens() -> None:
    cache = empty_cache(1, 2, 16, 64)
    before = cache.clone()
    empty, key_frame = torch.empty(0, 2, 64), plain_frame(torch.zeros(2, 64))
    ops.store(empty, empty, key_frame, cache, torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache, before)
