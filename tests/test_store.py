"""The store kernel writes the reference's bytes, and no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_turboquant import ops, reference
from vllm_turboquant.testing import empty_cache

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def assert_same_bytes(
    key: Tensor, value: Tensor, center: Tensor, slot_mapping: Tensor, block_size: int = 16
) -> Tensor:
    """Store with both into poisoned pools, compare them, and return one."""
    num_blocks = max(1, int(slot_mapping.max()) // block_size + 1)
    want, got = (empty_cache(num_blocks, key.shape[1], block_size, key.shape[2]) for _ in range(2))
    reference.store(key, value, center, want, slot_mapping)
    ops.store(key, value, center, got, slot_mapping)
    different = (want != got).nonzero()
    assert not len(different), f"{len(different)} bytes differ, the first at {different[0]}"
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (64, 128), (128, 16), (128, 48), (256, 32), (512, 16)]
)
def test_bytes(head_dim: int, block_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(head_dim + block_size)
    key, value = torch.randn(2, 700, 3, head_dim, generator=generator)
    center = 5 * torch.randn(3, head_dim, generator=generator)
    slots = torch.randperm(900, generator=generator)[:700]
    assert_same_bytes((3 * key + center).to(dtype), value.to(dtype), center, slots, block_size)


@pytest.mark.parametrize("exponent", [-40, -20, -8, 0, 8, 15, 18])
def test_bytes_at_extreme_magnitudes(exponent: int) -> None:
    generator = torch.Generator().manual_seed(exponent + 100)
    key, value = torch.randn(2, 64, 2, 128, generator=generator) * 10.0**exponent
    assert_same_bytes(key, value, torch.zeros(2, 128), torch.arange(64))


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
    shifted = assert_same_bytes(value + center, value, center, torch.arange(len(vectors)))
    plain = assert_same_bytes(value, value, torch.zeros(1, 128), torch.arange(len(vectors)))
    assert torch.equal(shifted, plain)


def test_strided_inputs_and_extra_rows() -> None:
    """Keys and values as vLLM passes them: slices of one fused projection, padded with garbage."""
    generator = torch.Generator().manual_seed(1)
    fused = torch.randn(10, (4 + 2 + 2) * 64, generator=generator)
    fused[8:] = torch.nan
    _, key, value = fused.split([256, 128, 128], dim=-1)
    key, value = key.view(10, 2, 64), value.view(10, 2, 64)
    assert not key.is_contiguous()
    assert_same_bytes(key, value, torch.zeros(2, 64), torch.arange(8))


def test_negative_slots_write_nothing() -> None:
    key, value = torch.randn(2, 5, 2, 64, generator=torch.Generator().manual_seed(2))
    slots = torch.tensor([-1, 3, -1, -7, 20])
    cache = assert_same_bytes(key, value, torch.zeros(2, 64), slots)
    untouched = empty_cache(2, 2, 16, 64)
    reference.store(key[[1, 4]], value[[1, 4]], torch.zeros(2, 64), untouched, slots[[1, 4]])
    assert torch.equal(cache, untouched)
    ops.store(key, value, torch.zeros(2, 64), cache, torch.full((5,), -1))
    assert torch.equal(cache, untouched)


def test_blocks_and_heads_with_other_strides() -> None:
    key, value = torch.randn(2, 40, 2, 64, generator=torch.Generator().manual_seed(3))
    center = torch.randn(2, 64)
    caches = [empty_cache(3, 2, 16, 64, head_major=head_major) for head_major in (False, True)]
    assert caches[0].stride() != caches[1].stride()
    for cache in caches:
        ops.store(key, value, center, cache, torch.arange(40))
    assert torch.equal(*caches)


def test_no_tokens() -> None:
    cache = empty_cache(1, 2, 16, 64)
    before = cache.clone()
    empty = torch.empty(0, 2, 64)
    ops.store(empty, empty, torch.zeros(2, 64), cache, torch.empty(0, dtype=torch.int64))
    assert torch.equal(cache, before)
