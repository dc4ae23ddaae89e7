"""The operators of recent tokens against their definition; what is not read is poison."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.schedules import Schedule, Step
from tests.test_attention import BOUND, CASES, Case
from tests.vectors import normal, seeded
from vllm_turboquant import ops, reference, reference_recent
from vllm_turboquant.frame import BALANCE, SINK, near_origins, plain_frame
from vllm_turboquant.layout import UNIT_TOKENS, SlotLayout
from vllm_turboquant.testing import (
    POISON_BYTE,
    PagedBatch,
    assert_close,
    empty_cache,
    make_batch,
    random_frame,
)

pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
        ],
    ),
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERY_TOKEN = reference_recent.EVERY_TOKEN
#: Largest relative error of outputs, and absolute and relative one of log-sum-exps.
BOUNDS = {"cpu": (BOUND, BOUND, BOUND), "cuda": (2e-2, 1e-2, 1e-3)}


def empty_recent(num_places: int, num_kv_heads: int, head_dim: int) -> Tensor:
    """A poisoned pool of copies."""
    shape = (num_places, num_kv_heads, SlotLayout(head_dim).unit_bytes)
    return torch.full(shape, POISON_BYTE, dtype=torch.uint8)


@dataclass
class Places:
    """State of ``assign``."""

    unit_map: Tensor
    places: Tensor
    clock: Tensor

    @staticmethod
    def empty(num_units: int, num_places: int, device: str = "cpu") -> Places:
        return Places(
            torch.zeros(num_units, dtype=torch.int32, device=device),
            torch.full((num_places, 2), -1, dtype=torch.int32, device=device),
            torch.zeros(3 + num_places, dtype=torch.int32, device=device),
        )

    def host(self) -> list[Tensor]:
        """What is left of a call, without its working memory."""
        return [self.unit_map.cpu(), self.places.cpu(), self.clock[:3].cpu()]


def assign(places: Places, step: Step, block_size: int, window_units: int, number: int) -> None:
    """Run the operator and check that it leaves what the definition does."""
    device = places.unit_map.device
    want = Places(places.unit_map.cpu(), places.places.cpu(), places.clock.cpu())
    if device.type == "cpu":
        want = Places(*(x.clone() for x in vars(want).values()))
    arguments = (step.block_table, step.seq_lens, step.query_start_loc)
    sizes = (block_size, window_units, number)
    reference_recent.assign(*arguments, *sizes, **vars(want))
    ops.assign_recent(*(x.to(device) for x in arguments), *sizes, **vars(places))
    for got, expected in zip(places.host(), want.host(), strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window_units", [1, 3, 8])
@pytest.mark.parametrize("block_size", [16, 48])
@pytest.mark.parametrize("num_places", [1, 7, 60])
def test_assign(num_places: int, block_size: int, window_units: int, device: str) -> None:
    """Random schedules; every unit with a place has one of its own."""
    num_blocks = 1200 // block_size
    schedule = Schedule(num_places + window_units, num_blocks, block_size, 8, idle=0.1)
    places = Places.empty(num_blocks * block_size // UNIT_TOKENS, num_places, device)
    taken = 0
    for number in range(100):
        assign(places, schedule.step(), block_size, window_units, number)
        unit_map, owners, (_, needed, placed) = places.host()
        units = unit_map.nonzero()[:, 0]
        assert torch.equal(owners[(unit_map[units] >> 16) - 1, 0], units.int())
        assert min(needed, num_places) >= placed >= 0
        taken += len(units)
    assert taken > 100 * min(num_places, 2 * window_units) / 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("head_dim", "block_size"), [(64, 16), (128, 48), (256, 32)])
def test_bytes_of_copies(head_dim: int, block_size: int, dtype: torch.dtype, device: str) -> None:
    """Random frames, keys everywhere between their origins; some units have no place. Positions
    have nothing to do with slots, and end behind the last span."""
    generator = seeded(head_dim)
    key, value = torch.randn(2, 700, 3, head_dim, generator=generator)
    key_frame = random_frame(3, head_dim, generator, num_spans=3)
    positions = torch.randint(0, 2000, (700,), generator=generator)
    near, sink = near_origins(key_frame, positions), key_frame[:, SINK]
    way = torch.rand(700, 3, 1, generator=generator)
    key = 3 * key / key_frame[:, BALANCE] + near + way * (sink - near)
    key[3], value[3] = near[3], 0
    slots = torch.randperm(720, generator=generator)[:700]
    slots[::9], positions[::9] = -1, -1
    recent = check_store(
        key.to(dtype), value.to(dtype), key_frame, slots, block_size, device, positions
    )
    scale = reference_recent.recent_arrays(recent, SlotLayout(head_dim))["key_scale"]
    at_sink = scale[~scale.isnan()].signbit()  # what nobody wrote is NaN
    assert 0.3 < at_sink.double().mean() < 0.7


def check_store(
    key: Tensor,
    value: Tensor,
    key_frame: Tensor,
    slots: Tensor,
    block_size: int = 16,
    device: str = "cpu",
    positions: Tensor | None = None,
) -> Tensor:
    """Store with places for two units in three; return the copies.

    Copies must be the definition's and codes what they are without copies. Of scales that are NaN,
    the payload is free.
    """
    _, num_kv_heads, head_dim = key.shape
    num_blocks = int(slots.max()) // block_size + 1
    num_units = num_blocks * block_size // UNIT_TOKENS
    unit_map = torch.zeros(num_units, dtype=torch.int32)
    chosen = torch.arange(num_units) % 3 != 1
    unit_map[chosen] = (torch.randperm(int(chosen.sum()), generator=seeded(0)).int() + 1) << 16
    want, got = (empty_recent(int(chosen.sum()), num_kv_heads, head_dim) for _ in range(2))
    got = got.to(device)
    codes, with_copies = (
        empty_cache(num_blocks, num_kv_heads, block_size, head_dim).to(device) for _ in range(2)
    )
    reference_recent.store_copies(key, value, key_frame, want, unit_map, slots, positions)
    arguments = [x.to(device) for x in (key, value, key_frame)]
    at = None if positions is None else positions.to(device)
    ops.store(*arguments, codes, slots.to(device), positions=at)
    ops.store(*arguments, with_copies, slots.to(device), got, unit_map.to(device), at)
    assert torch.equal(codes, with_copies)
    layout = SlotLayout(head_dim)
    arrays = [reference_recent.recent_arrays(x, layout) for x in (got.cpu(), want)]
    torch.testing.assert_close(*arrays, rtol=0, atol=0, equal_nan=True)
    signs = [array["key_scale"].signbit() for array in arrays]
    assert torch.equal(*signs)
    return got.cpu()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("exponent", [-43, -40, -20, -8, 8, 18, 36])
def test_bytes_of_copies_at_extreme_magnitudes(exponent: int, device: str) -> None:
    key, value = normal(2, 64, 2, 128, seed=exponent + 100).double() * 10.0**exponent
    check_store(
        key.float(), value.float(), plain_frame(torch.zeros(2, 128)), torch.arange(64), 16, device
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("special", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_copies_of_what_is_no_number(special: float, device: str) -> None:
    key_frame = random_frame(1, 256, seeded(1))
    key = key_frame[:, SINK].repeat(16, 1, 1)
    value = normal(16, 1, 256)
    for x in (key, value):
        x[1], x[2, :, 5], x[3, :, 200] = special, special, special
        x[4, :, 7], x[4, :, 8] = special, -special
    check_store(key, value, key_frame, torch.arange(16), 16, device)


@dataclass(frozen=True)
class RecentBatch:
    """A batch with copies, and which of its tokens are read from them.

    Attributes:
        batch: Codes that are not read are poison.
        recent: [num_places, num_kv_heads, unit_bytes] uint8; copies that are not read are poison,
            or, behind the window, of other keys.
        unit_map: [num_units] int32.
        window_units: Units of a window.
        num_read: Tokens that are read from copies.
    """

    batch: PagedBatch
    recent: Tensor
    unit_map: Tensor
    window_units: int
    num_read: int


def with_copies(
    batch: PagedBatch, window_units: int, seed: int = 0, complete: bool = False
) -> RecentBatch:
    """Give units of a batch places and copies, of keys and values that have nothing to do with the
    codes. Unless ``complete``, a quarter of the units has no place and another lacks tokens."""
    generator = seeded(seed)
    num_blocks, num_kv_heads, block_size, _ = batch.kv_cache.shape
    head_dim = batch.query.shape[-1]
    layout = SlotLayout(head_dim)
    num_units = num_blocks * block_size // UNIT_TOKENS
    valid = torch.randint(0, EVERY_TOKEN + 1, (num_units,), generator=generator)
    kind = torch.randint(0, 4, (num_units,), generator=generator)
    place = torch.randperm(num_units, generator=generator)
    unit_map = (place + 1) << 16 | torch.where(kind == 1, valid, EVERY_TOKEN)
    unit_map = torch.where(kind == 0, 0, unit_map).int()
    if complete:
        unit_map = ((place + 1) << 16 | EVERY_TOKEN).int()
    slots = batch.slot_mapping
    at_sink = (torch.arange(len(slots)) % 2 == 1)[:, None, None]
    near = near_origins(batch.key_frame, batch.positions)
    origin = torch.where(at_sink, batch.key_frame[:, SINK], near)
    key, value = torch.randn(2, len(slots), num_kv_heads, head_dim, generator=generator)
    key = origin + key / batch.key_frame[:, BALANCE]
    recent = empty_recent(num_units, num_kv_heads, head_dim)
    reference_recent.store_copies(
        key, value, batch.key_frame, recent, unit_map, slots, batch.positions
    )

    units, offsets = slots // UNIT_TOKENS, slots % UNIT_TOKENS
    is_valid = (unit_map[units] >> offsets & 1).bool()
    in_window = torch.cat(
        [
            torch.arange(n) // UNIT_TOKENS >= -(-n // UNIT_TOKENS) - window_units
            for n in batch.seq_lens.tolist()
        ]
    )
    stale = ~is_valid & (unit_map[units] != 0)
    stale_place, stale_offset = (unit_map[units[stale]] >> 16) - 1, offsets[stale]
    for name, array in reference_recent.recent_arrays(recent, layout).items():
        if name.endswith("_scale"):
            array[stale_place, :, :, stale_offset] = torch.nan
    read = slots[is_valid & in_window]
    cache = batch.kv_cache.clone()
    for name, array in reference.block_arrays(cache, layout).items():
        if name.endswith("_scale"):
            array[read // block_size, :, :, read % block_size] = torch.nan
        else:
            array[read // block_size, :, read % block_size] = POISON_BYTE
    poisoned = PagedBatch(**{**vars(batch), "kv_cache": cache})
    return RecentBatch(poisoned, recent, unit_map, window_units, len(read))


def attend(case: RecentBatch, causal: bool, device: str) -> tuple[Tensor, Tensor]:
    batch = case.batch
    out = torch.full(batch.query.shape, torch.nan, device=device)
    lse = torch.full(batch.query.shape[1::-1], torch.nan, device=device)
    tensors = (batch.query, batch.kv_cache, batch.block_table, batch.seq_lens)
    ops.paged_attention(
        *(x.to(device) for x in (*tensors, batch.query_start_loc, batch.key_frame)),
        batch.scale,
        causal,
        out,
        lse,
        recent=case.recent.to(device),
        unit_map=case.unit_map.to(device),
        window_units=case.window_units,
    )
    rows = batch.num_tokens
    return out[:rows].cpu(), lse[:, :rows].cpu()


def check_attention(case: RecentBatch, causal: bool, device: str) -> None:
    """Output and lse against the definition in float64."""
    batch = case.batch
    out, lse = attend(case, causal, device)
    want, want_lse = reference_recent.attention_with_copies(
        batch.query[: batch.num_tokens],
        batch.kv_cache,
        batch.block_table,
        batch.seq_lens,
        batch.query_start_loc,
        batch.key_frame,
        batch.scale,
        case.recent,
        case.unit_map,
        case.window_units,
        causal=causal,
    )
    compare(out, lse, want, want_lse, device)


def compare(out: Tensor, lse: Tensor, want: Tensor, want_lse: Tensor, device: str) -> None:
    bound, atol, rtol = BOUNDS[device]
    finite = want_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse[~finite] == -torch.inf).all() and (out.transpose(0, 1)[~finite] == 0).all()
    if finite.any():
        assert_close(out, want, bound, "output")
        torch.testing.assert_close(lse[finite].double(), want_lse[finite], atol=atol, rtol=rtol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("name", CASES)
def test_attention(name: str, causal: bool, device: str) -> None:
    case = CASES[name]
    if device == "cuda" and case.head_dim > 256:
        pytest.skip("the CUDA kernels stop at head_dim 256")
    batch = make_batch(**vars(case), seed=len(name))
    recent = with_copies(batch, window_units=1 + len(name) % 8, seed=len(name))
    check_attention(recent, causal, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
def test_nothing_but_copies(causal: bool, device: str) -> None:
    """Short requests with every token in the window, valid up to the end of the unit."""
    batch = make_batch((128, 3, 50, 16), (1, 2, 9, 5), 6, 2, 128)
    case = with_copies(batch, 8, complete=True)
    assert case.num_read == len(batch.slot_mapping)
    check_attention(case, causal, device)


@pytest.mark.parametrize("seq_len", [3841, 3850, 3968, 3969, 4100])
def test_windows_across_splits(seq_len: int) -> None:
    """With 4 threads, the CPU's splits of 3841 tokens end with one of a single token."""
    batch = make_batch((seq_len,), (3,), 4, 1, 64)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        for window_units in (1, 8):
            check_attention(with_copies(batch, window_units, seed=seq_len), True, "cpu")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("complete", [True, False], ids=["every copy", "some copies"])
@pytest.mark.parametrize("window_units", [1, 3, 8])
def test_windows_across_spans(window_units: int, complete: bool, device: str) -> None:
    """Windows that end at, just behind and far behind the borders of spans, also the last one."""
    lengths = (520, 512, 513, 528, 1030, 1100, 1600, 3000)
    batch = make_batch(lengths, (1, 2) * 4, 6, 2, 128, num_spans=3, block_size=32)
    check_attention(with_copies(batch, window_units, complete=complete), True, device)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    num_reqs, num_kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    return Case(
        tuple(draw(st.integers(0, 200)) for _ in range(num_reqs)),
        tuple(draw(st.integers(0, 12)) for _ in range(num_reqs)),
        num_kv_heads * draw(st.integers(1, 9)),
        num_kv_heads,
        draw(st.sampled_from([64, 128, 256])),
        draw(st.sampled_from([16, 32, 48, 128])),
    )


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=80)
@given(case=cases(), window_units=st.integers(1, 8), causal=st.booleans(), seed=st.integers(0, 99))
def test_random_batches(
    device: str, case: Case, window_units: int, causal: bool, seed: int
) -> None:
    batch = make_batch(**vars(case), seed=seed, head_major=seed % 2 == 0)
    check_attention(with_copies(batch, window_units, seed), causal, device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_map_of_zeros_changes_nothing(device: str) -> None:
    batch = make_batch((300, 5), (1, 2), 4, 2, 64)
    num_units = batch.kv_cache.shape[0] * batch.kv_cache.shape[2] // UNIT_TOKENS
    unit_map = torch.zeros(num_units, dtype=torch.int32)
    check_attention(RecentBatch(batch, empty_recent(1, 2, 64), unit_map, 4, 0), True, device)


def dequantize(
    batch: PagedBatch, first: list[int], last: list[int], dtype: torch.dtype, *copies: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Tokens ``first`` to ``last`` - 1 of every request, on the device of the batch."""
    device = batch.kv_cache.device
    lengths = [b - a for a, b in zip(first, last, strict=True)]
    rows = torch.tensor([0, *lengths]).cumsum(0).int().to(device)
    _, num_kv_heads, _, _ = batch.kv_cache.shape
    shape = (sum(lengths) + 2, num_kv_heads, batch.query.shape[-1])
    key, value = (torch.full(shape, 7.0, dtype=dtype, device=device) for _ in range(2))
    starts = torch.tensor(first, dtype=torch.int32, device=device)
    ops.dequantize(
        batch.kv_cache, batch.block_table, starts, rows, batch.key_frame, key, value, *copies
    )
    assert (key[-2:] == 7).all() and (value[-2:] == 7).all()
    return key[:-2].cpu(), value[:-2].cpu()


def on(device: str, batch: PagedBatch) -> PagedBatch:
    return PagedBatch(**{name: x.to(device) for name, x in vars(batch).items()})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "block_size"), [(64, 16), (64, 128), (128, 48), (256, 32), (512, 16)]
)
def test_dequantize(head_dim: int, block_size: int, dtype: torch.dtype, device: str) -> None:
    """Codes of tokens that have a copy, and invalid copies, are NaN; there is no window."""
    first, last = [405, 0, 16, 0], [590, 0, 77, 33]
    batch = make_batch((600, 0, 77, 33), (1,) * 4, 4, 2, head_dim, block_size, seed=head_dim)
    case = with_copies(batch, window_units=600 // UNIT_TOKENS + 1, seed=head_dim)
    assert 0.2 < case.num_read / len(batch.slot_mapping) < 0.8
    copies = case.recent.to(device), case.unit_map.to(device)
    got = dequantize(on(device, case.batch), first, last, dtype, *copies)
    read = [
        reference_recent.read(
            case.batch.kv_cache, table, b, batch.key_frame, case.recent, case.unit_map
        )
        for table, b in zip(batch.block_table, last, strict=True)
    ]
    for name, x, parts in zip(("keys", "values"), got, zip(*read, strict=True), strict=True):
        want = torch.cat([part[a:] for part, a in zip(parts, first, strict=True)])
        assert_close(x, want, max(torch.finfo(dtype).eps, 1e-6), name)


@pytest.mark.parametrize("device", DEVICES)
def test_dequantize_reads_codes_where_there_is_no_copy(device: str) -> None:
    """Bit for bit what it reads without the arguments."""
    batch = make_batch((70, 33), (1, 1), 4, 2, 128, block_size=32)
    case = with_copies(batch, window_units=8)
    first, last = [0, 0], [70, 33]
    batch = on(device, batch)
    recent, unit_map = case.recent.to(device), case.unit_map.to(device)
    plain, of_none, of_some = (
        dequantize(batch, first, last, torch.float32, *copies)
        for copies in ((), (recent, torch.zeros_like(unit_map)), (recent, unit_map))
    )
    slots = batch.slot_mapping.cpu()
    has_copy = (case.unit_map[slots // UNIT_TOKENS] >> slots % UNIT_TOKENS & 1).bool()
    assert has_copy.any() and not has_copy.all()
    for x, y, z in zip(plain, of_none, of_some, strict=True):
        assert torch.equal(x, y)
        assert torch.equal((x != z).flatten(1).any(dim=1), has_copy)


@pytest.mark.parametrize("device", DEVICES)
def test_dequantize_gives_copies_back(device: str) -> None:
    """Keys and values that were stored come back with the error of 8 bits."""
    key, value = normal(2, 40, 2, 128)
    key_frame = random_frame(2, 128, seeded(3))
    batch = make_batch((40,), (1,), 4, 2, 128)
    batch = on(device, PagedBatch(**{**vars(batch), "key_frame": key_frame}))
    key = key / key_frame[:, BALANCE] + key_frame[:, SINK]
    num_units = batch.kv_cache.shape[0] * batch.kv_cache.shape[2] // UNIT_TOKENS
    recent = empty_recent(num_units, 2, 128).to(device)
    unit_map = ((torch.arange(num_units) + 1) << 16 | EVERY_TOKEN).int().to(device)
    arguments = (x.to(device) for x in (key, value, key_frame))
    ops.store(*arguments, batch.kv_cache, batch.slot_mapping, recent, unit_map)
    got_key, got_value = dequantize(batch, [0], [40], torch.float32, recent, unit_map)
    origin = key_frame[:, SINK]
    assert_close((got_key - origin), key - origin, 0.012, "keys")
    assert_close(got_value, value, 0.012, "values")
