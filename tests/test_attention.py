"""The paged attention kernel against the reference in float64, on the same codes."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vllm_turboquant import ops, reference
from vllm_turboquant.frame import CENTER, FIRST_SPAN, SINK, near_origins
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.testing import PagedBatch, assert_close, make_batch

UNTOUCHED = 7.0
#: With AVX2 and AVX-512 scores are computed in integers, by the CUDA kernels (``tests/emulator``)
#: values in float16, too.
BOUND = {"default": 1e-5, "emulated": 1e-2}.get(ops.CPU_VARIANT, 1e-3)


@dataclass(frozen=True)
class Case:
    """Shape of a batch."""

    seq_lens: tuple[int, ...]
    query_lens: tuple[int, ...]
    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int = 16


CASES = {
    "one token": Case((1,), (1,), 1, 1, 64),
    "multi-head": Case((40, 17), (1, 1), 4, 4, 64),
    "GQA 3": Case((100, 1, 64), (1, 1, 1), 9, 3, 64, 128),
    "GQA 6": Case((100, 33), (1, 1), 12, 2, 128, 32),
    "GQA 16": Case((50,), (1,), 16, 1, 128),
    "two groups": Case((70, 5), (1, 1), 4, 1, 256, 48),
    "four groups": Case((35,), (2,), 2, 2, 512),
    "empty requests": Case((0, 20, 0), (1, 1, 1), 4, 2, 64),
    "padded requests": Case((20, 0, 0), (1, 0, 0), 4, 2, 64),
    "speculative rows": Case((100, 37), (3, 5), 6, 2, 128, 64),
    "more rows than a tile": Case((90, 64), (45, 33), 6, 2, 64),
    "rows that see nothing": Case((2, 5), (6, 3), 4, 2, 64),
    "long enough to split": Case((3000, 700), (1, 1), 4, 2, 64, 16),
    "where spans meet": Case((511, 512, 513, 1030), (1, 1, 2, 40), 4, 2, 64, 48),
}


def run(
    batch: PagedBatch, causal: bool = True, out_dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    out = torch.full(batch.query.shape, UNTOUCHED, dtype=out_dtype)
    lse = torch.full(batch.query.shape[1::-1], UNTOUCHED)
    ops.paged_attention(
        batch.query,
        batch.kv_cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        batch.key_frame,
        batch.scale,
        causal,
        out,
        lse,
    )
    return out, lse


def check(batch: PagedBatch, causal: bool = True) -> None:
    """Output and lse of the kernel against the reference; nothing else may be written."""
    out, lse = run(batch, causal)
    rows = batch.num_tokens
    want, want_lse = reference.attention(
        batch.query[:rows],
        batch.kv_cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        batch.key_frame,
        batch.scale,
        causal=causal,
    )
    finite = want_lse.isfinite()
    assert torch.equal(lse[:, :rows].isfinite(), finite)
    assert (lse[:, :rows][~finite] == -torch.inf).all()
    if finite.any():
        assert_close(out[:rows], want, BOUND, "output")
        torch.testing.assert_close(
            lse[:, :rows][finite].double(), want_lse[finite], rtol=BOUND, atol=BOUND
        )
    assert (out[:rows].transpose(0, 1)[~finite] == 0).all()
    assert (out[rows:] == UNTOUCHED).all() and (lse[:, rows:] == UNTOUCHED).all()


def with_random_origins(batch: PagedBatch, seed: int = 0) -> PagedBatch:
    """Let every key group start from either origin: the codes are as good, for other keys."""
    cache = batch.kv_cache.clone()
    scale = reference.block_arrays(cache, SlotLayout(batch.query.shape[-1]))["key_scale"]
    generator = torch.Generator().manual_seed(seed)
    sign_bit = torch.randint(0, 2, scale.shape, generator=generator).to(torch.int16) << 15
    scale.view(torch.int16).bitwise_xor_(sign_bit)
    return PagedBatch(**{**vars(batch), "kv_cache": cache})


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("name", CASES)
def test_cases(name: str, causal: bool) -> None:
    case = CASES[name]
    check(make_batch(**vars(case), seed=len(name)), causal)


@pytest.mark.parametrize("head_dim", [64, 128, 256, 512])
def test_every_group_starts_from_its_own_origin(head_dim: int) -> None:
    batch = make_batch((70, 5), (1, 3), 4, 2, head_dim)
    mixed = with_random_origins(batch)
    check(mixed)
    assert (run(mixed)[0] - run(batch)[0])[:4].norm() > 0.1 * run(batch)[0][:4].norm()


@pytest.mark.parametrize("at_sink", [False, True], ids=["no key", "every key"])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_keys_that_all_start_alike(head_dim: int, at_sink: bool) -> None:
    batch = make_batch((70, 1100), (1, 3), 4, 2, head_dim)
    scale = reference.block_arrays(batch.kv_cache, SlotLayout(head_dim))["key_scale"]
    scale.copy_(scale.copysign(torch.tensor(-1.0 if at_sink else 1.0).half()))
    check(batch)


@pytest.mark.parametrize("num_spans", [0, 1, 3])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_keys_that_equal_an_origin(head_dim: int, num_spans: int) -> None:
    """Scales of 0 of either sign: a score is q . center or q . sink, and nothing else."""
    batch = make_batch((1100,), (1,), 4, 2, head_dim, num_spans=num_spans)
    near, sink = near_origins(batch.key_frame, batch.positions), batch.key_frame[:, SINK]
    at_sink = torch.arange(1100) % 3 == 0
    key = torch.where(at_sink[:, None, None], sink, near)
    value = torch.randn(key.shape, generator=torch.Generator().manual_seed(1))
    ops.store(
        *(key, value, batch.key_frame, batch.kv_cache, batch.slot_mapping),
        positions=batch.positions,
    )
    check(batch)
    _, lse = run(batch)
    query = batch.query[0].double().unflatten(0, (2, 2))
    score = batch.scale * torch.einsum("hrd,thd->hrt", query, key.double())
    want = score.logsumexp(dim=-1).flatten()
    torch.testing.assert_close(lse[:, 0].double(), want, rtol=BOUND, atol=BOUND)


@pytest.mark.parametrize("num_spans", [0, 1, 3, 5])
def test_numbers_of_spans(num_spans: int) -> None:
    """More than the requests have, and fewer."""
    check(make_batch((1700, 513, 40), (2, 1, 33), 6, 2, 64, num_spans=num_spans))


def test_spans_around_the_center_change_nothing() -> None:
    batch = make_batch((1100, 30), (1, 3), 4, 2, 128, num_spans=0)
    center = batch.key_frame[:, CENTER, None].expand(-1, 3, -1)
    key_frame = torch.cat([batch.key_frame, center], dim=1)
    same = PagedBatch(**{**vars(batch), "key_frame": key_frame})
    rows = batch.num_tokens
    for got, want in zip(run(same), run(batch), strict=True):
        assert_close(got[:rows], want[:rows], 1e-6)


def test_only_centers_of_spans_that_are_reached_matter() -> None:
    for seq_len, reached in ((512, 1), (528, 2)):
        batch = make_batch((seq_len, 30), (1, 3), 4, 2, 64, num_spans=3)
        out, lse = run(batch)
        batch.key_frame[:, FIRST_SPAN + reached :] += 100
        for got, want in zip(run(batch), (out, lse), strict=True):
            assert torch.equal(got, want)
        batch.key_frame[:, FIRST_SPAN + reached - 1] += 100
        assert ((run(batch)[1] - lse)[:, 0].abs() > 1).any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_adds_only_the_rounding_of_the_output(dtype: torch.dtype) -> None:
    batch = make_batch((100, 30), (1, 4), 6, 2, 128, dtype=dtype)
    check(batch)
    exact, _ = run(batch)
    rounded, _ = run(batch, out_dtype=dtype)
    rows = batch.num_tokens
    assert torch.equal(rounded[:rows], exact[:rows].to(dtype))


def test_blocks_and_heads_with_other_strides() -> None:
    check(make_batch((50, 20), (1, 2), 4, 2, 64, head_major=True))


def test_strided_queries() -> None:
    batch = make_batch((50, 20), (1, 2), 4, 2, 64)
    fused = torch.full((batch.query.shape[0], 6, 64), torch.nan)
    fused[:, :4] = batch.query
    strided = PagedBatch(**{**vars(batch), "query": fused[:, :4]})
    for got, want in zip(run(strided), run(batch), strict=True):
        assert torch.equal(got, want)


def test_large_scores_do_not_overflow() -> None:
    batch = make_batch((300,), (1,), 4, 2, 64)
    loud = PagedBatch(**{**vars(batch), "query": batch.query * 1000})
    check(loud)


def test_the_number_of_threads_changes_only_rounding() -> None:
    batch = make_batch((4000,), (1,), 2, 1, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one, _ = run(batch)
        torch.set_num_threads(2)
        two, _ = run(batch)
    finally:
        torch.set_num_threads(threads)
    # Integer kernels round weights relative to the largest of 128 tokens, and which these are
    # depends on where splits begin.
    assert_close(two[:1], one[:1], BOUND)


def test_a_pool_of_more_than_2_gib() -> None:
    """Block offsets need 64 bits: the only block in use starts beyond 2^31 bytes."""
    small = make_batch((16,), (1,), 2, 1, 64)
    slot_bytes = small.kv_cache.shape[-1]
    num_blocks = 2**31 // (16 * slot_bytes) + 2
    # Pages that are never touched take no memory.
    pool = torch.empty(num_blocks * 16 * slot_bytes, dtype=torch.uint8)
    cache = pool.view(num_blocks, 1, 16, slot_bytes)
    cache[-1] = small.kv_cache[small.block_table[0, 0]]
    table = torch.tensor([[num_blocks - 1]], dtype=torch.int32)
    far = PagedBatch(**{**vars(small), "kv_cache": cache, "block_table": table})
    for got, want in zip(run(far), run(small), strict=True):
        assert torch.equal(got, want)
