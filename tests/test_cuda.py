"""The CUDA operators against the CPU's bytes and the float64 reference, on poisoned memory."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from vllm_turboquant import ops, reference
from vllm_turboquant.frame import BALANCE, SINK, near_origins, num_spans
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.testing import random_frame

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
POISON = 0xFF  # as a scale it is NaN
NO_BLOCK = 0x7FFFFFFF  # far outside every pool


@dataclass
class Case:
    """Arguments of paged_attention on the CPU, in the order of the operator."""

    query: Tensor  # [num_tokens, num_heads, head_dim]
    kv_cache: Tensor  # [num_blocks, num_kv_heads, block_size, slot_bytes]
    block_table: Tensor  # [num_reqs, max_blocks]
    seq_lens: Tensor  # [num_reqs]
    query_start_loc: Tensor  # [num_reqs + 1]
    key_frame: Tensor  # [num_kv_heads, 3 + num_spans, head_dim]
    scale: float
    causal: bool = True


def make_case(
    seq_lens: list[int],
    query_lens: list[int] | None = None,
    num_kv_heads: int = 2,
    group_size: int = 4,
    head_dim: int = 128,
    block_size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
    sharpness: float = 1.0,
    max_blocks: int = 0,
    seed: int = 0,
    num_spans: int = 2,
) -> Case:
    """Random codes in shuffled blocks, a fifth of the key groups at the sink; the rest is poison.

    Groups of one key start from either origin each.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    layout = SlotLayout(head_dim)
    query_lens = query_lens or [1] * len(seq_lens)
    blocks = [-(-n // block_size) for n in seq_lens]
    num_blocks = sum(blocks) + 3
    order = torch.randperm(num_blocks, generator=generator)
    shape = (num_blocks, num_kv_heads, block_size, layout.slot_bytes)
    cache = torch.full(shape, POISON, dtype=torch.uint8)
    table = torch.full(
        (len(seq_lens), max(max_blocks, *blocks, 1) + 2), NO_BLOCK, dtype=torch.int32
    )
    arrays = reference.block_arrays(cache, layout)
    taken = 0
    for req, seq_len in enumerate(seq_lens):
        ids = order[taken : taken + blocks[req]]
        taken += blocks[req]
        table[req, : blocks[req]] = ids
        position = torch.arange(seq_len)
        block, offset = ids[position // block_size], position % block_size
        for name in ("key_index", "key_sign", "value_index"):
            size = (seq_len, num_kv_heads, arrays[name].shape[-1])
            codes = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
            arrays[name][block, :, offset] = codes
        for name in ("key_scale", "value_scale"):
            size = (seq_len, num_kv_heads, layout.num_groups)
            scales = torch.rand(size, generator=generator) + 0.5
            if name == "key_scale":
                scales *= torch.where(torch.rand(size, generator=generator) < 0.2, -1, 1)
            arrays[name][block, :, :, offset] = scales.half()
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    return Case(
        query=(normal(int(starts[-1]), num_kv_heads * group_size, head_dim) * sharpness).to(dtype),
        kv_cache=cache,
        block_table=table,
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        query_start_loc=starts,
        key_frame=random_frame(num_kv_heads, head_dim, generator, num_spans),
        scale=head_dim**-0.5,
    )


def attend(case: Case, out_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Run the operator on the GPU on poisoned outputs."""
    out = torch.full_like(case.query, torch.nan, dtype=out_dtype, device="cuda")
    lse = torch.full(case.query.shape[1::-1], torch.nan, device="cuda")
    tensors = (case.query, case.kv_cache, case.block_table, case.seq_lens, case.query_start_loc)
    arguments = [x.cuda() for x in (*tensors, case.key_frame)]
    ops.paged_attention(*arguments, case.scale, case.causal, out, lse)
    torch.cuda.synchronize()
    return out.cpu(), lse.cpu()


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the error over the norm; NaN never passes."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30))


def check_attention(case: Case, bar: float = 2e-2) -> float:
    """Compare with the float64 reference over the same codes."""
    out, lse = attend(case)
    want_out, want_lse = reference.attention(
        case.query.double(),
        case.kv_cache,
        case.block_table,
        case.seq_lens,
        case.query_start_loc,
        case.key_frame,
        case.scale,
        causal=case.causal,
    )
    seen = want_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen)
    assert not lse.isnan().any()
    # Keys are decoded to integers 0.1 % off their codes: large scores are off by a share of them.
    torch.testing.assert_close(lse[seen].double(), want_lse[seen], atol=1e-2, rtol=1e-3)
    error = relative_error(out, want_out)
    print(f"relative error {error:.2e}, lse {(lse[seen] - want_lse[seen]).abs().max():.1e}")
    assert error < bar
    assert (out.double()[~seen.T] == 0).all()
    return error


def key_sink_bits(cache: Tensor, head_dim: int) -> Tensor:
    """Sign bits of the key scales: [num_blocks, num_kv_heads, num_groups, block_size]."""
    return reference.block_arrays(cache, SlotLayout(head_dim))["key_scale"].signbit()


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_store_writes_the_bytes_of_the_cpu(
    head_dim: int, block_size: int, dtype: torch.dtype
) -> None:
    """In a random frame, with keys of any position everywhere between its origins."""
    generator = torch.Generator().manual_seed(head_dim + block_size)
    num_tokens, num_kv_heads, num_blocks = 200, 3, 20
    layout = SlotLayout(head_dim)
    # Rows of a fused projection: strides that are no multiple of the head's size.
    fused = torch.randn(num_tokens, 2 * num_kv_heads * head_dim + 24, generator=generator) * 3
    key_frame = random_frame(num_kv_heads, head_dim, generator, num_spans=3)
    positions = torch.randint(0, 2000, (num_tokens,), generator=generator)
    near, sink = near_origins(key_frame, positions), key_frame[:, SINK]
    keys = fused[:, 8:-16].chunk(2, dim=1)[0].unflatten(1, (num_kv_heads, head_dim))
    way = torch.rand(num_tokens, num_kv_heads, 1, generator=generator)
    keys.copy_(keys / key_frame[:, BALANCE] + near + way * (sink - near))
    fused[5] = 0
    keys[6], keys[8] = near[6], sink
    key, value = (
        part.unflatten(1, (num_kv_heads, head_dim))
        for part in fused.to(dtype)[:, 8:-16].chunk(2, dim=1)
    )
    slots = torch.randperm(num_blocks * block_size, generator=generator)[:num_tokens]
    slots[::7], positions[::7] = -1, -1
    shape = (num_blocks, num_kv_heads, block_size, layout.slot_bytes)
    want = torch.full(shape, POISON, dtype=torch.uint8)
    got = want.cuda()
    ops.store(key, value, key_frame, want, slots, positions=positions)
    fused_gpu = fused.to(dtype).cuda()
    key, value = (
        part.unflatten(1, (num_kv_heads, head_dim)) for part in fused_gpu[:, 8:-16].chunk(2, dim=1)
    )
    on_gpu = key_frame.cuda(), got, slots.cuda()
    ops.store(key, value, *on_gpu, positions=positions.cuda())
    assert torch.equal(got.cpu(), want)
    written = slots[slots >= 0]
    at_sink = key_sink_bits(want, head_dim)[written // block_size, ..., written % block_size]
    assert 0.3 < at_sink.double().mean() < 0.7  # [num_tokens, num_kv_heads, num_groups]
    assert layout.num_groups == 1 or (at_sink[..., 0] != at_sink[..., 1]).any()


@pytest.mark.parametrize("special", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_keys_that_are_not_numbers_stay_at_the_center(special: float) -> None:
    """Group by group; of their bytes, only a NaN's payload is not the CPU's."""
    key_frame = random_frame(1, 256, torch.Generator().manual_seed(1))
    key = key_frame[:, SINK].repeat(16, 1, 1)
    key[1], key[2, :, 5], key[3, :, 200] = special, special, special
    want = torch.full((1, 1, 16, 168), POISON, dtype=torch.uint8)
    got = want.cuda()
    slots, value = torch.arange(16), torch.zeros_like(key)
    ops.store(key, value, key_frame, want, slots)
    ops.store(key.cuda(), value.cuda(), key_frame.cuda(), got, slots.cuda())
    at_sink = [[True, True], [False, False], [False, True], [True, False]]
    assert key_sink_bits(got.cpu(), 256)[0, 0, :, :4].T.tolist() == at_sink
    arrays = [reference.block_arrays(cache, SlotLayout(256)) for cache in (got.cpu(), want)]
    torch.testing.assert_close(*arrays, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 6, 7, 8, 16])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_group_sizes(head_dim: int, group_size: int) -> None:
    check_attention(
        make_case([1, 17, 130, 555, 1000], group_size=group_size, head_dim=head_dim, seed=1)
    )


@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 48])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_block_sizes_and_ragged_lengths(head_dim: int, block_size: int) -> None:
    lengths = [1, 15, 16, 17, 31, 33, 64, 127, 129, 500, 2049, 0, 3000]
    check_attention(make_case(lengths, head_dim=head_dim, block_size=block_size, seed=2))


@pytest.mark.parametrize("num_spans", [0, 1, 3, 40])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_numbers_of_spans(head_dim: int, num_spans: int) -> None:
    """More than the requests have, and fewer; lengths around their borders."""
    lengths = [511, 512, 513, 1030, 1600, 20_000]
    check_attention(make_case(lengths, head_dim=head_dim, num_spans=num_spans, seed=18))
    rows = [5, 1, 16, 10, 3, 4]
    check_attention(make_case(lengths, rows, head_dim=head_dim, num_spans=num_spans, seed=19))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    check_attention(make_case([100, 2000], dtype=dtype, seed=3))


@pytest.mark.parametrize(
    "seq_lens, num_kv_heads",
    [
        ([131072], 1),
        ([150_000, *[1] * 400], 1),  # more spans than a CTA knows at a time
        ([32768, 40000], 2),
        ([8192] * 8, 2),
        ([300] * 64, 2),
        ([1] * 64, 1),
    ],
    ids=["1x128K", "150K among 400", "2x32K", "8x8K", "64x300", "64x1"],
)
def test_batch_and_context(seq_lens: list[int], num_kv_heads: int) -> None:
    spans = num_spans(max(seq_lens))
    check_attention(make_case(seq_lens, num_kv_heads=num_kv_heads, num_spans=spans, seed=4))


@pytest.mark.parametrize("sharpness", [0.0, 5.0, 30.0])
def test_flat_and_peaked_softmax(sharpness: float) -> None:
    check_attention(make_case([5000, 70], sharpness=sharpness, seed=5))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_origins_are_seen(head_dim: int) -> None:
    """No key, some groups, every key at the sink: other outputs, each the reference's."""
    case = make_case([300, 1000, 33], head_dim=head_dim, seed=14)
    scale = reference.block_arrays(case.kv_cache, SlotLayout(head_dim))["key_scale"]
    magnitude = scale.abs()
    mixed, _ = attend(case)
    check_attention(case)
    for sign in (1, -1):
        scale.copy_(sign * magnitude)
        check_attention(case)
        assert relative_error(attend(case)[0], mixed) > 0.1


@pytest.mark.parametrize("head_dim", [64, 256])
def test_keys_that_equal_an_origin(head_dim: int) -> None:
    """Scales of 0 of either sign: a score is q . center or q . sink, and nothing else."""
    case = make_case([1100, 40], head_dim=head_dim, seed=15)
    scale = reference.block_arrays(case.kv_cache, SlotLayout(head_dim))["key_scale"]
    scale.copy_(torch.zeros(()).half().copysign(scale))
    check_attention(case)
    _, lse = attend(case)
    key_frame = case.key_frame.double()
    for req, seq_len in enumerate((1100, 40)):
        code, _ = reference.load(
            case.kv_cache, case.block_table[req], seq_len, SlotLayout(head_dim)
        )
        at_sink = code.at_sink.repeat_interleave(SlotLayout(head_dim).group, dim=-1)
        near = near_origins(key_frame, torch.arange(seq_len))
        key = torch.where(at_sink, key_frame[:, SINK], near)
        query = case.query[req].double().unflatten(0, (2, 4))
        want = torch.einsum("hrd,thd->hrt", query, key).mul(case.scale).logsumexp(dim=-1)
        torch.testing.assert_close(lse[:, req].double(), want.flatten(), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("query_len", [2, 5, 16])
@pytest.mark.parametrize("head_dim, group_size", [(64, 3), (128, 4), (256, 4)])
def test_causal_query_rows(head_dim: int, group_size: int, query_len: int) -> None:
    lengths = [query_len, 40, 1000, 2]
    rows = [query_len, query_len, 1, 3]  # the last one has rows that see nothing
    case = make_case(lengths, rows, head_dim=head_dim, group_size=group_size, seed=6)
    check_attention(case)
    case.causal = False
    check_attention(case)


def test_large_and_growing_value_scales() -> None:
    case = make_case([3000], seed=7)
    arrays = reference.block_arrays(case.kv_cache, SlotLayout(128))
    scales = arrays["value_scale"]
    position = torch.arange(3000)
    block = case.block_table[0, position // 16].long()
    growing = torch.logspace(-4, 4.5, 3000).half()
    scales[block, :, :, position % 16] = growing[:, None, None].expand(3000, 2, 1)
    check_attention(case)


def test_padded_requests_give_nothing() -> None:
    case = make_case([300, 0, 0], seed=8)
    out, lse = attend(case)
    assert (out[1:] == 0).all() and (lse[:, 1:] == -torch.inf).all()
    # Padding without query rows: rows past the last request stay as they are.
    case.query_start_loc = torch.tensor([0, 1, 1, 1], dtype=torch.int32)
    out, lse = attend(case)
    assert not out[0].isnan().any()
    assert out[1:].isnan().all() and lse[:, 1:].isnan().all()


def test_number_of_splits_does_not_matter() -> None:
    few = make_case([1000, 64], seed=9)
    many = make_case([1000, 64], seed=9, max_blocks=4096)
    assert relative_error(attend(many)[0], attend(few)[0]) < 1e-3


def test_pool_past_two_gibibytes() -> None:
    case = make_case([2000], num_kv_heads=1, seed=10)
    want, _ = attend(case)
    block_bytes = case.kv_cache[0].numel()
    far = 2**31 // block_bytes + 1000
    pool = torch.full(
        (far + len(case.kv_cache), *case.kv_cache.shape[1:]),
        POISON,
        dtype=torch.uint8,
        device="cuda",
    )
    pool[far:] = case.kv_cache.cuda()
    case.block_table[:, : 2000 // 16] += far
    case.kv_cache = pool
    out, _ = attend(case)
    assert torch.equal(out, want)


@pytest.mark.parametrize("sliding_window", [0, 700])
def test_graph_replay_with_other_lengths(sliding_window: int) -> None:
    case = make_case([4000, 900, 64, 1], seed=11)
    tensors = (case.query, case.kv_cache, case.block_table, case.seq_lens, case.query_start_loc)
    arguments = [x.cuda() for x in (*tensors, case.key_frame)]
    lengths = arguments[3]
    out = torch.empty_like(case.query, device="cuda")
    lse = torch.empty(case.query.shape[1::-1], device="cuda")

    def run() -> None:
        ops.paged_attention(*arguments, case.scale, True, out, lse, sliding_window=sliding_window)

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for other in ([4000, 900, 64, 1], [1, 900, 3, 0], [3999, 17, 0, 1]):
        lengths.copy_(torch.tensor(other, dtype=torch.int32))
        run()
        want = out.clone(), lse.clone()
        out.fill_(torch.nan)
        lse.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_dequantize_equals_the_cpu(head_dim: int, dtype: torch.dtype) -> None:
    case = make_case([700, 90, 33], head_dim=head_dim, block_size=32, seed=12)
    starts = torch.tensor([300, 0, 32], dtype=torch.int32)
    rows = torch.tensor([0, 400, 490, 491], dtype=torch.int32)
    want = [torch.full((500, 2, head_dim), torch.nan, dtype=dtype) for _ in range(2)]
    got = [x.cuda() for x in want]
    arguments = (case.kv_cache, case.block_table, starts, rows, case.key_frame)
    ops.dequantize(*arguments, *want)
    ops.dequantize(*(x.cuda() for x in arguments), *got)
    for x, y in zip(got, want, strict=True):
        assert y[491:].isnan().all() and x[491:].isnan().all()
        torch.testing.assert_close(
            x[:491].cpu(),
            y[:491],
            rtol=torch.finfo(dtype).eps * (1 if y.itemsize < 4 else 16),
            atol=1e-5,
        )


def test_scratch_is_used_where_it_is_given() -> None:
    case = make_case([3000, 40, 700], seed=13)
    want, want_lse = attend(case)
    tensors = (case.query, case.kv_cache, case.block_table, case.seq_lens, case.query_start_loc)
    arguments = [x.cuda() for x in (*tensors, case.key_frame)]
    num_tokens, num_heads, head_dim = case.query.shape
    room = case.block_table.shape[1] * case.kv_cache.shape[2]
    enough = ops.paged_attention_scratch_bytes(3, num_tokens, num_heads, 2, head_dim, room)
    scratch = torch.full((enough,), POISON, dtype=torch.uint8, device="cuda")
    out = torch.full_like(want, torch.nan, device="cuda")
    lse = torch.full_like(want_lse, torch.nan, device="cuda")
    ops.paged_attention(*arguments, case.scale, True, out, lse, scratch)
    assert torch.equal(out.cpu(), want) and torch.equal(lse.cpu(), want_lse)
    assert (scratch != POISON).any()
    with pytest.raises(RuntimeError, match="scratch has 16 bytes, expected"):
        ops.paged_attention(*arguments, case.scale, True, out, lse, scratch[:16])
    with pytest.raises(RuntimeError, match="scratch is float32, expected uint8"):
        ops.paged_attention(*arguments, case.scale, True, out, lse, scratch.view(torch.float32))


def test_tickets_are_zero_between_calls() -> None:
    """Calls of other shapes, with one split and with many, hand each other the same tickets."""
    tickets = torch.zeros(4 * 2, dtype=torch.int32, device="cuda")
    for seq_lens in ([3000, 40, 0, 700], [5], [20_000, 1], [3000, 40, 0, 700]):
        case = make_case(seq_lens, seed=17)
        want, want_lse = attend(case)
        tensors = (case.query, case.kv_cache, case.block_table, case.seq_lens, case.query_start_loc)
        arguments = [x.cuda() for x in (*tensors, case.key_frame)]
        out = torch.full_like(want, torch.nan, device="cuda")
        lse = torch.full_like(want_lse, torch.nan, device="cuda")
        ops.paged_attention(*arguments, case.scale, True, out, lse, tickets=tickets)
        assert torch.equal(out.cpu(), want) and torch.equal(lse.cpu(), want_lse)
        assert not tickets.any()
    with pytest.raises(RuntimeError, match="tickets has 3 elements, expected 8"):
        ops.paged_attention(*arguments, case.scale, True, out, lse, tickets=tickets[:3])
    with pytest.raises(RuntimeError, match="tickets is int64, expected int32"):
        ops.paged_attention(*arguments, case.scale, True, out, lse, tickets=tickets.long())


@pytest.mark.parametrize("argument", ["block_table", "key_frame"])
def test_refusals_name_the_argument(argument: str) -> None:
    case = make_case([100])
    given = {name: x.cuda() for name, x in vars(case).items() if isinstance(x, Tensor)}
    given[argument] = given[argument].cpu()
    out, lse = torch.empty_like(given["query"]), torch.empty(8, 1, device="cuda")
    with pytest.raises(RuntimeError, match=f"{argument} must be on the CUDA device"):
        ops.paged_attention(**given, scale=case.scale, causal=True, out=out, lse=lse)


def test_frames_must_be_aligned() -> None:
    case = make_case([100])
    given = {name: x.cuda() for name, x in vars(case).items() if isinstance(x, Tensor)}
    frame = given["key_frame"]
    given["key_frame"] = torch.cat([frame.flatten()[:1], frame.flatten()])[1:].view_as(frame)
    out, lse = torch.empty_like(given["query"]), torch.empty(8, 1, device="cuda")
    with pytest.raises(RuntimeError, match="key_frame must be aligned to 16 bytes"):
        ops.paged_attention(**given, scale=case.scale, causal=True, out=out, lse=lse)


@pytest.mark.parametrize("head_dim", [64, 256])
def test_keys_that_equal_an_origin_come_back_exactly(head_dim: int) -> None:
    case = make_case([1100], head_dim=head_dim, seed=16)
    scale = reference.block_arrays(case.kv_cache, SlotLayout(head_dim))["key_scale"]
    scale.copy_(torch.zeros(()).half().copysign(scale))
    code, _ = reference.load(case.kv_cache, case.block_table[0], 1100, SlotLayout(head_dim))
    at_sink = code.at_sink.repeat_interleave(SlotLayout(head_dim).group, dim=-1)
    key, value = torch.full((2, 1100, 2, head_dim), torch.nan, device="cuda")
    rows = torch.tensor([0, 1100], dtype=torch.int32)
    arguments = (case.kv_cache, case.block_table, rows[:1], rows, case.key_frame)
    ops.dequantize(*(x.cuda() for x in arguments), key, value)
    near = near_origins(case.key_frame, torch.arange(1100))
    want = torch.where(at_sink, case.key_frame[:, SINK], near)
    assert torch.equal(key.cpu(), want)
