"""Store, load and attend over paged codes: PyTorch's SDPA over the decoded keys is the oracle.

Whatever must not be read is poisoned: cache bytes are 0xFF (NaN scales), block ids out of range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_turboquant.frame import (
    BALANCE,
    CENTER,
    FIRST_SPAN,
    SINK,
    make_frame,
    near_origins,
    plain_frame,
)
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.reference import (
    attention,
    decode_keys,
    decode_values,
    encode_keys,
    encode_values,
    load,
    score_codes,
    store,
)
from vllm_turboquant.testing import random_frame

POISON_BYTE = 0xFF
POISON_BLOCK = 2**31 - 1
DOUBLE = 2**-53


@dataclass(frozen=True)
class Batch:
    """Lengths of the requests of one call.

    Attributes:
        query_lens: [num_reqs], rows of each request.
        seq_lens: [num_reqs], cached tokens of each request.
    """

    query_lens: tuple[int, ...]
    seq_lens: tuple[int, ...]


BATCHES = {
    "decode": Batch((1, 1, 1, 1), (1, 16, 17, 70)),
    "padded": Batch((1, 1, 0, 1), (33, 0, 20, 0)),
    "speculative": Batch((4, 4), (4, 37)),
    "mixed": Batch((1, 19, 3), (40, 35, 3)),
    "blind rows": Batch((5, 2), (2, 1)),
    "where spans meet": Batch((3, 1), (514, 1040)),
}
HEADS = {"mha": (2, 2), "gqa": (6, 2)}  # num_heads, num_kv_heads
ORIGINS = [CENTER, SINK, FIRST_SPAN, FIRST_SPAN + 1]  # rows of the frames of ``Paged``


class Paged:
    """A poisoned cache that holds the tokens of a batch in shuffled blocks.

    A third of the groups of its keys lie around the sink, the others around the center of their
    span, of which there are two.

    Attributes:
        cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
        block_table: [num_reqs, max_blocks] int32.
        key, value: Per request [seq_len, num_kv_heads, head_dim] float32.
        key_frame: [num_kv_heads, 5, head_dim] float32; differences of its origins are exact.
    """

    def __init__(
        self, seq_lens: tuple[int, ...], num_kv_heads: int, head_dim: int, block_size: int = 16
    ) -> None:
        generator = torch.Generator().manual_seed(sum(seq_lens) + head_dim)
        self.layout = SlotLayout(head_dim)
        blocks = [-(-n // block_size) for n in seq_lens]
        num_blocks = sum(blocks) + 3
        shape = (num_blocks, num_kv_heads, block_size, self.layout.slot_bytes)
        self.cache = torch.full(shape, POISON_BYTE, dtype=torch.uint8)
        table = torch.full((len(seq_lens), max(blocks) + 2), POISON_BLOCK, dtype=torch.int32)
        self.key_frame = random_frame(num_kv_heads, head_dim, generator, num_spans=2)
        self.key_frame[:, ORIGINS] = (self.key_frame[:, ORIGINS] * 64).round() / 64
        sink, balance = self.key_frame[:, SINK], self.key_frame[:, BALANCE]
        self.key, self.value = [], []
        free = iter(torch.randperm(num_blocks, generator=generator).tolist())
        for req, (n, count) in enumerate(zip(seq_lens, blocks, strict=True)):
            ids = torch.tensor([next(free) for _ in range(count)], dtype=torch.int32)
            table[req, :count] = ids
            key, value = torch.randn(2, n, num_kv_heads, head_dim, generator=generator)
            groups = (n, num_kv_heads, self.layout.num_groups)
            at_sink = torch.rand(groups, generator=generator) < 1 / 3
            at_sink = at_sink.repeat_interleave(self.layout.group, dim=-1)
            position = torch.arange(n)
            near = near_origins(self.key_frame, position)
            self.key.append(key / balance + torch.where(at_sink, sink, near))
            self.value.append(value)
            slots = ids[position // block_size].long() * block_size + position % block_size
            store(self.key[req], value, self.key_frame, self.cache, slots, position)
        self.block_table = table

    def decoded(self, req: int, seq_len: int) -> tuple[Tensor, Tensor]:
        """Decoded keys and values of a request, [seq_len, num_kv_heads, head_dim] float64."""
        key, value = load(self.cache, self.block_table[req], seq_len, self.layout)
        positions = torch.arange(seq_len)
        decoded = decode_keys(key, self.key_frame, self.layout, positions=positions)
        return decoded, decode_values(value, self.layout)


def starts(query_lens: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *query_lens]).cumsum(0)


def queries(batch: Batch, num_heads: int, head_dim: int) -> Tensor:
    generator = torch.Generator().manual_seed(head_dim)
    shape = (sum(batch.query_lens), num_heads, head_dim)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def score_rounding(query: Tensor, paged: Paged, scale: float) -> float:
    """Bound the float64 rounding of a score: 2 d products and sums, of size |q / b| |x^| + |q| |o|.

    x^ = b (k^ - o) is the key as coded, and o has the largest coordinates of all origins.
    """
    balance = paged.key_frame[:, BALANCE].double()
    as_coded = plain_frame(torch.zeros_like(balance))
    keys = [
        decode_keys(load(paged.cache, table, len(key), paged.layout)[0], as_coded, paged.layout)
        for table, key in zip(paged.block_table, paged.key, strict=True)
    ]
    reach = torch.cat(keys).norm(dim=-1)
    if not len(reach):
        return 0.0
    stretched = query / balance.repeat_interleave(query.shape[1] // len(balance), dim=0)
    origin = paged.key_frame[:, ORIGINS].double().abs().amax(dim=1).norm(dim=-1).max()
    size = stretched.norm(dim=-1).max() * reach.max() + query.norm(dim=-1).max() * origin
    return float(2 * query.shape[-1] * DOUBLE * scale * size)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("batch", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (128, 32), (256, 16)])
def test_attention_is_sdpa_over_decoded(
    head_dim: int, block_size: int, batch: Batch, heads: tuple[int, int], causal: bool
) -> None:
    num_heads, num_kv_heads = heads
    paged = Paged(batch.seq_lens, num_kv_heads, head_dim, block_size)
    query, scale = queries(batch, num_heads, head_dim), 1 / math.sqrt(head_dim)
    first = starts(batch.query_lens)
    out, lse = attention(
        query,
        paged.cache,
        paged.block_table,
        torch.tensor(batch.seq_lens),
        first,
        paged.key_frame,
        scale,
        causal=causal,
    )
    assert out.shape == query.shape
    assert lse.shape == (num_heads, len(query))
    rounding = score_rounding(query, paged, scale)
    for req, (rows, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
        mine = slice(int(first[req]), int(first[req + 1]))
        seen = torch.ones(rows, seq_len, dtype=torch.bool)
        if causal:
            seen = torch.arange(seq_len) <= torch.arange(rows)[:, None] + seq_len - rows
        blind = ~seen.any(dim=-1) if seq_len else torch.ones(rows, dtype=torch.bool)
        assert (out[mine][blind] == 0).all()
        assert (lse[:, mine][:, blind] == -torch.inf).all()
        if blind.all():
            continue
        key, value = (
            x.repeat_interleave(num_heads // num_kv_heads, dim=1).transpose(0, 1)
            for x in paged.decoded(req, seq_len)
        )
        q, mask = query[mine][~blind].transpose(0, 1), seen[~blind]
        expected = scaled_dot_product_attention(q[None], key[None], value[None], mask, scale=scale)
        scores = (scale * q @ key.transpose(1, 2)).masked_fill(~mask, -torch.inf)
        # A weight is off by twice the score's rounding, the sum by seq_len roundings of its own.
        bound = 4 * (rounding + (seq_len + head_dim) * DOUBLE) * value.norm(dim=-1).max()
        assert (out[mine][~blind] - expected[0].transpose(0, 1)).abs().max() <= bound
        lse_error = (lse[:, mine][:, ~blind] - scores.logsumexp(dim=-1)).abs().max()
        assert lse_error <= 2 * rounding + 4 * seq_len * DOUBLE


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_scores_are_dot_products_with_decoded_keys(head_dim: int) -> None:
    paged = Paged((40,), 2, head_dim)
    query = queries(Batch((3,), (40,)), 6, head_dim)
    grouped = query.view(3, 2, 3, head_dim)
    code, _ = load(paged.cache, paged.block_table[0], 40, paged.layout)
    assert code.at_sink.any() and not code.at_sink.all()
    got = score_codes(grouped, code, paged.key_frame, paged.layout, torch.arange(40))
    expected = torch.einsum("qhrd,thd->qhrt", grouped, paged.decoded(0, 40)[0])
    assert got.shape == (3, 2, 3, 40)
    assert (got - expected).abs().max() <= score_rounding(query, paged, 1.0)


def shifted(key_frame: Tensor, shift: Tensor) -> Tensor:
    """The frame with all origins moved by [num_kv_heads, head_dim]."""
    result = key_frame + shift[:, None]
    result[:, BALANCE] = key_frame[:, BALANCE]
    return result


@pytest.mark.parametrize("shift", ["minus the center", "any"])
def test_softmax_does_not_see_what_all_keys_share(shift: str) -> None:
    """With all origins shifted the output stays; the lse moves by exactly scale q . shift."""
    batch, scale = Batch((3, 1), (20, 533)), 0.125
    paged, query = Paged(batch.seq_lens, 2, 64), queries(batch, 4, 64)
    by = -paged.key_frame[:, CENTER] if shift == "minus the center" else torch.full((2, 64), 7.25)
    moved_frame = shifted(paged.key_frame, by)
    inputs = (
        query,
        paged.cache,
        paged.block_table,
        torch.tensor(batch.seq_lens),
        starts(batch.query_lens),
    )
    out, lse = attention(*inputs, paged.key_frame, scale)
    moved_out, moved_lse = attention(*inputs, moved_frame, scale)
    rounding = score_rounding(query, paged, scale)
    paged.key_frame = moved_frame
    rounding = max(rounding, score_rounding(query, paged, scale))
    largest = max(paged.decoded(r, n)[1].norm(dim=-1).max() for r, n in enumerate(batch.seq_lens))
    assert (out - moved_out).abs().max() <= 4 * (rounding + 600 * DOUBLE) * largest
    constant = scale * torch.einsum("qhd,hd->hq", query, by.double().repeat_interleave(2, dim=0))
    assert constant.abs().min() > 1e3 * rounding  # or the next line would show nothing
    assert (moved_lse - lse - constant).abs().max() <= 4 * rounding


@pytest.mark.parametrize("row", [SINK, FIRST_SPAN + 1], ids=["sink", "span"])
def test_softmax_sees_the_way_between_origins(row: int) -> None:
    """Only some keys start from the sink or are in the second span: without its origin, the output
    is another one."""
    paged, query = Paged((530,), 2, 64), queries(Batch((3,), (530,)), 4, 64)
    inputs = (query, paged.cache, paged.block_table, torch.tensor([530]), torch.tensor([0, 3]))
    other = paged.key_frame.clone()
    other[:, row] = other[:, FIRST_SPAN]
    out, lse = attention(*inputs, paged.key_frame, 0.125)
    other_out, other_lse = attention(*inputs, other, 0.125)
    assert (out - other_out).norm() > 0.1 * out.norm()
    assert (lse - other_lse).abs().max() > 0.1


@pytest.mark.parametrize("head_dim", [64, 256])
def test_what_all_keys_share_is_not_coded(head_dim: int) -> None:
    """Keys and origins have the same bytes after a shift of all of them, if no addition rounds."""
    generator = torch.Generator().manual_seed(8)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-1000, 1000, shape, generator=generator).float()

    balance = torch.rand(2, head_dim, generator=generator) + 0.5
    key_frame = make_frame(integers(2, head_dim) / 4, integers(2, head_dim) / 4, balance)
    shift, value = integers(2, head_dim) / 4, torch.zeros(32, 2, head_dim)
    at_sink = torch.arange(32)[:, None, None] % 3 == 0
    key = integers(32, 2, head_dim) / 64
    key += torch.where(at_sink, key_frame[:, SINK], key_frame[:, CENTER])
    layout = SlotLayout(head_dim)
    plain = torch.zeros(2, 2, 16, layout.slot_bytes, dtype=torch.uint8)
    moved = plain.clone()
    store(key, value, key_frame, plain, torch.arange(32))
    store(key + shift, value, shifted(key_frame, shift), moved, torch.arange(32))
    assert torch.equal(plain, moved)
    code, _ = load(plain, torch.tensor([0, 1]), 32, layout)
    assert torch.equal(code.at_sink, at_sink.expand_as(code.at_sink))


@pytest.mark.parametrize("cut", [16, 48])
def test_halves_merge_by_lse(cut: int) -> None:
    """Attention over two parts of a context, merged by lse, is attention over the whole."""
    seq_len, scale = 70, 1 / math.sqrt(128)
    paged, query = Paged((seq_len,), 2, 128), queries(Batch((2,), (seq_len,)), 4, 128)

    def attend(table: Tensor, length: int) -> tuple[Tensor, Tensor]:
        return attention(
            query,
            paged.cache,
            table,
            torch.tensor([length]),
            torch.tensor([0, 2]),
            paged.key_frame,
            scale,
            causal=False,
        )

    whole, whole_lse = attend(paged.block_table, seq_len)
    left, left_lse = attend(paged.block_table, cut)
    right, right_lse = attend(paged.block_table[:, cut // 16 :], seq_len - cut)
    lse = torch.logaddexp(left_lse, right_lse)
    merged = (left_lse - lse).exp().T[..., None] * left + (right_lse - lse).exp().T[
        ..., None
    ] * right
    rounding = score_rounding(query, paged, scale)
    largest = paged.decoded(0, seq_len)[1].norm(dim=-1).max()
    assert (lse - whole_lse).abs().max() <= 2 * rounding + 4 * seq_len * DOUBLE
    assert (merged - whole).abs().max() <= 4 * (rounding + (seq_len + 128) * DOUBLE) * largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_store_writes_its_slots_only(dtype: torch.dtype) -> None:
    """Slot -1 is skipped, rows past the slot mapping are ignored, other bytes stay as they were."""
    generator = torch.Generator().manual_seed(3)
    layout = SlotLayout(128)
    key, value = torch.randn(2, 7, 2, 128, generator=generator).to(dtype)
    key_frame = random_frame(2, 128, generator)
    key[2] = key_frame[:, SINK]
    key[5:], value[5:] = torch.nan, torch.nan  # padding
    key[1], value[1] = torch.nan, torch.nan  # its slot is -1
    slots = torch.tensor([40, -1, 3, 17, -1])
    cache = torch.full((4, 2, 16, 84), POISON_BYTE, dtype=torch.uint8)
    store(key, value, key_frame, cache, slots)
    expected = torch.full_like(cache, POISON_BYTE)
    for token in (0, 2, 3):
        store(key[[token]], value[[token]], key_frame, expected, slots[[token]])
    assert torch.equal(cache, expected)
    # The written slots, byte by byte, are as many as the layout says at most, and hold the codes.
    assert 0 < (cache != POISON_BYTE).sum() <= 3 * 2 * layout.slot_bytes
    for token, (block, offset) in {0: (2, 8), 2: (0, 3), 3: (1, 1)}.items():
        key_code, value_code = load(cache, torch.tensor([block]), offset + 1, layout)
        expected_key = encode_keys(key[token], key_frame, layout)
        expected_value = encode_values(value[token], layout)
        assert torch.equal(key_code.index[offset], expected_key.index)
        assert torch.equal(key_code.sign[offset], expected_key.sign)
        assert torch.equal(key_code.scale[offset], expected_key.scale)
        assert torch.equal(key_code.at_sink[offset], expected_key.at_sink)
        assert key_code.at_sink[offset].all() or token != 2
        assert torch.equal(value_code.index[offset], expected_value.index)
        assert torch.equal(value_code.scale[offset], expected_value.scale)


def test_store_overwrites_and_takes_nothing() -> None:
    generator = torch.Generator().manual_seed(4)
    key, value = torch.randn(2, 2, 1, 64, generator=generator)
    key_frame = plain_frame(torch.zeros(1, 64))
    cache = torch.full((1, 1, 16, 44), POISON_BYTE, dtype=torch.uint8)
    store(key, value, key_frame, cache, torch.tensor([], dtype=torch.int64))
    store(key, value, key_frame, cache, torch.tensor([-1, -1]))
    assert (cache == POISON_BYTE).all()
    twice = cache.clone()
    store(key[:1], value[:1], key_frame, twice, torch.tensor([5]))
    store(key[1:], value[1:], key_frame, twice, torch.tensor([5]))
    store(key[1:], value[1:], key_frame, cache, torch.tensor([5]))
    assert torch.equal(cache, twice)


def test_store_reads_strided_tensors() -> None:
    """Key and value may be slices of one QKV projection; the cache a slice of a larger pool."""
    generator = torch.Generator().manual_seed(5)
    qkv = torch.randn(6, 4, 64, generator=generator)
    key, value, key_frame = qkv[:, 2:3], qkv[:, 3:4], random_frame(1, 64, generator)
    slots = torch.tensor([0, 9, 17, 18, 31, 30])
    pool = torch.full((4, 1, 16, 44), POISON_BYTE, dtype=torch.uint8)
    store(key, value, key_frame, pool[1::2], slots)
    packed = torch.full((2, 1, 16, 44), POISON_BYTE, dtype=torch.uint8)
    store(key.contiguous(), value.contiguous(), key_frame, packed, slots)
    assert torch.equal(pool[1::2], packed)
    assert (pool[::2] == POISON_BYTE).all()


def test_zero_and_saturated_slots_attend_finitely() -> None:
    """A zero key scores q . c, a saturated one scores finitely, and the output is a number."""
    key = torch.stack([torch.zeros(1, 64), torch.full((1, 64), 1e30), torch.ones(1, 64)])
    key_frame = plain_frame(torch.zeros(1, 64))
    cache = torch.zeros(1, 1, 16, 44, dtype=torch.uint8)
    store(key, key, key_frame, cache, torch.arange(3))
    query = torch.ones(1, 1, 64, dtype=torch.float64)
    out, lse = attention(
        query,
        cache,
        torch.tensor([[0]]),
        torch.tensor([3]),
        torch.tensor([0, 1]),
        key_frame,
        0.125,
    )
    assert out.isfinite().all()
    assert lse.isfinite().all()
