"""Sliding windows: the definition against a loop, the operator against it on poisoned memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.test_attention import Case
from tests.test_recent import DEVICES, RecentBatch, cases, compare, with_copies
from vllm_turboquant import ops, reference, reference_recent
from vllm_turboquant.layout import UNIT_TOKENS, SlotLayout
from vllm_turboquant.testing import POISON_BLOCK, PagedBatch, assert_close, make_batch

pytestmark = pytest.mark.usefixtures("one_thread")
CASES = {
    "decode": Case((1, 5, 16, 17, 100, 333), (1,) * 6, 4, 1, 256),
    "other groups": Case((64, 150), (1, 1), 9, 3, 64, 128),
    "speculative rows": Case((100, 37, 3), (3, 5, 6), 6, 2, 128, 64),
    "more rows than a tile": Case((90, 64), (45, 33), 6, 2, 64),
    "prefill": Case((130, 100, 16), (130, 70, 2), 4, 1, 256, 32),
    "empty and padded requests": Case((0, 20, 0, 40), (1, 1, 0, 0), 4, 2, 64),
    "long": Case((3000, 700), (1, 2), 4, 2, 64),
    "across spans": Case((530, 1040), (1, 30), 4, 2, 64),
}
#: Within a unit, of some units, longer than most requests, and than all.
WINDOWS = [1, 7, 16, 24, 40, 129, 1000, 5000]
CAUSAL_OR_NOT = pytest.mark.parametrize("causal", [True, False], ids=["causal", "earlier"])


@dataclass(frozen=True)
class Sliding:
    """Arguments of the operator that say what rows see."""

    sliding_window: int
    causal: bool = True

    def sees(self, row: int, token: int, num_rows: int, seq_len: int) -> bool:
        """By words: its own token is the last of ``sliding_window`` that a row sees."""
        position = seq_len - num_rows + row if self.causal else seq_len + row
        return 0 <= position - token < (self.sliding_window or seq_len + num_rows)

    def first_seen(self, num_rows: int, seq_len: int) -> int:
        """First token that any row sees; ``seq_len`` if there is none."""
        seen = (
            token
            for token in range(seq_len)
            if any(self.sees(row, token, num_rows, seq_len) for row in range(num_rows))
        )
        return next(seen, seq_len)


@given(st.integers(0, 12), st.integers(0, 40), st.integers(0, 50), st.booleans())
def test_visible_tokens(num_rows: int, seq_len: int, sliding_window: int, causal: bool) -> None:
    rule = Sliding(sliding_window, causal)
    want = [
        [rule.sees(row, token, num_rows, seq_len) for token in range(seq_len)]
        for row in range(num_rows)
    ]
    got = reference.visible_tokens(num_rows, seq_len, **vars(rule))
    assert got.tolist() == want and got.shape == (num_rows, seq_len)


def query_lens(batch: PagedBatch) -> list[int]:
    return batch.query_start_loc.diff().tolist()


def hide_unseen(batch: PagedBatch, rule: Sliding) -> PagedBatch:
    """Give blocks that slid out of the window back: a block of NaN takes their place. Unseen
    tokens of other blocks become NaN."""
    layout, block_size = SlotLayout(batch.query.shape[-1]), batch.kv_cache.shape[2]
    cache, table = batch.kv_cache.clone(), batch.block_table.clone()
    nobodys = min(set(range(len(cache))) - set(table.flatten().tolist()))
    arrays = reference.block_arrays(cache, layout)
    for req, (num_rows, seq_len) in enumerate(
        zip(query_lens(batch), batch.seq_lens.tolist(), strict=True)
    ):
        position = torch.arange(rule.first_seen(num_rows, seq_len))
        block, offset = table[req, position // block_size].long(), position % block_size
        for name in ("key_scale", "value_scale"):
            arrays[name][block, :, :, offset] = torch.nan
        num_gone = len(position) // block_size
        if len(position) == seq_len:
            num_gone = -(-seq_len // block_size)
        table[req, :num_gone] = nobodys
    return replace(batch, kv_cache=cache, block_table=table)


def hide_unseen_copies(copies: RecentBatch, rule: Sliding) -> RecentBatch:
    """Make copies of unseen tokens NaN."""
    batch, recent = copies.batch, copies.recent.clone()
    layout, starts = SlotLayout(batch.query.shape[-1]), batch.seq_lens.cumsum(0) - batch.seq_lens
    arrays = reference_recent.recent_arrays(recent, layout)
    for start, num_rows, seq_len in zip(
        starts.tolist(), query_lens(batch), batch.seq_lens.tolist(), strict=True
    ):
        slots = batch.slot_mapping[start : start + rule.first_seen(num_rows, seq_len)]
        place = (copies.unit_map[slots // UNIT_TOKENS] >> 16) - 1
        offset = (slots % UNIT_TOKENS)[place >= 0]
        for name in ("key_scale", "value_scale"):
            arrays[name][place[place >= 0], :, :, offset] = torch.nan
    return replace(copies, recent=recent)


def define(batch: PagedBatch, rule: Sliding, copies: RecentBatch | None) -> tuple[Tensor, Tensor]:
    """Output and lse in float64, by definition."""
    arguments = (
        *(batch.query[: batch.num_tokens], batch.kv_cache, batch.block_table, batch.seq_lens),
        *(batch.query_start_loc, batch.key_frame, batch.scale),
    )
    if copies is None:
        return reference.attention(*arguments, **vars(rule))
    return reference_recent.attention_with_copies(
        *arguments, copies.recent, copies.unit_map, copies.window_units, **vars(rule)
    )


def attend(
    batch: PagedBatch, rule: Sliding, copies: RecentBatch | None, device: str
) -> tuple[Tensor, Tensor]:
    """Run the operator on poisoned outputs."""
    out = torch.full(batch.query.shape, torch.nan, device=device)
    lse = torch.full(batch.query.shape[1::-1], torch.nan, device=device)
    tensors = (batch.query, batch.kv_cache, batch.block_table, batch.seq_lens)
    recent = {}
    if copies is not None:
        recent = {"recent": copies.recent.to(device), "unit_map": copies.unit_map.to(device)}
        recent["window_units"] = copies.window_units
    ops.paged_attention(
        *(x.to(device) for x in (*tensors, batch.query_start_loc, batch.key_frame)),
        batch.scale,
        rule.causal,
        out,
        lse,
        **recent,
        sliding_window=rule.sliding_window,
    )
    return out[: batch.num_tokens].cpu(), lse[:, : batch.num_tokens].cpu()


def check(batch: PagedBatch, rule: Sliding, device: str, copies: RecentBatch | None = None) -> None:
    """What nobody sees is poison for the operator, and not for the definition."""
    if copies is not None:
        batch = copies.batch
    want, want_lse = define(batch, rule, copies)
    hidden = hide_unseen_copies(copies, rule) if copies is not None else None
    out, lse = attend(hide_unseen(batch, rule), rule, hidden, device)
    compare(out, lse, want, want_lse, device)


@CAUSAL_OR_NOT
@pytest.mark.parametrize("sliding_window", WINDOWS)
@pytest.mark.parametrize("name", CASES)
def test_definition(name: str, sliding_window: int, causal: bool) -> None:
    """Softmax over the decoded keys that the rule names; what nobody sees is not read."""
    batch, rule = make_batch(**vars(CASES[name]), seed=len(name)), Sliding(sliding_window, causal)
    layout, num_rows = SlotLayout(batch.query.shape[-1]), query_lens(batch)
    out, lse = define(hide_unseen(batch, rule), rule, None)
    plain = define(batch, rule, None)
    assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1])
    group_size = batch.query.shape[1] // batch.kv_cache.shape[1]
    for req, seq_len in enumerate(batch.seq_lens.tolist()):
        codes = reference.load(batch.kv_cache, batch.block_table[req], seq_len, layout)
        positions = torch.arange(seq_len)
        key = reference.decode_keys(codes[0], batch.key_frame, layout, positions=positions)
        value = reference.decode_values(codes[1], layout)
        # Of many rows, the first, the last and one between.
        for row in sorted({0, num_rows[req] // 2, num_rows[req] - 1} & set(range(num_rows[req]))):
            seen = [t for t in range(seq_len) if rule.sees(row, t, num_rows[req], seq_len)]
            at = int(batch.query_start_loc[req]) + row
            if not seen:
                assert (out[at] == 0).all() and (lse[:, at] == -torch.inf).all()
                continue
            keys, values = (x[seen].repeat_interleave(group_size, dim=1) for x in (key, value))
            scores = batch.scale * torch.einsum("hd,thd->ht", batch.query[at].double(), keys)
            torch.testing.assert_close(lse[:, at], scores.logsumexp(dim=-1))
            assert_close(out[at], torch.einsum("ht,thd->hd", scores.softmax(dim=-1), values), 1e-9)


@pytest.mark.parametrize("device", DEVICES)
@CAUSAL_OR_NOT
@pytest.mark.parametrize("sliding_window", WINDOWS)
@pytest.mark.parametrize("name", CASES)
def test_codes(name: str, sliding_window: int, causal: bool, device: str) -> None:
    batch = make_batch(**vars(CASES[name]), seed=len(name))
    check(batch, Sliding(sliding_window, causal), device)


@pytest.mark.parametrize("device", DEVICES)
@CAUSAL_OR_NOT
@pytest.mark.parametrize("window_units", [1, 3, 8])
@pytest.mark.parametrize("sliding_window", WINDOWS)
@pytest.mark.parametrize("name", CASES)
def test_copies(
    name: str, sliding_window: int, window_units: int, causal: bool, device: str
) -> None:
    """Sliding windows shorter and longer than the window of copies. The block in place of those
    that slid out has copies, too: of nobody's tokens."""
    batch = make_batch(**vars(CASES[name]), seed=len(name))
    copies = with_copies(batch, window_units, seed=sliding_window)
    check(batch, Sliding(sliding_window, causal), device, copies)


@pytest.mark.parametrize("device", DEVICES)
@given(
    case=cases(),
    rule=st.builds(Sliding, st.integers(0, 220), st.booleans()),
    window_units=st.integers(0, 8),
    seed=st.integers(0, 99),
)
def test_random_batches(
    device: str, case: Case, rule: Sliding, window_units: int, seed: int
) -> None:
    batch = make_batch(**vars(case), seed=seed, head_major=seed % 2 == 0)
    copies = with_copies(batch, window_units, seed) if window_units else None
    check(batch, rule, device, copies)


@pytest.mark.parametrize("device", DEVICES)
def test_far_from_the_start(device: str) -> None:
    """The splits divide what is seen, at every offset in a unit, batch and block."""
    lengths = tuple(range(5000, 5040, 3))
    batch = make_batch(lengths, (1, 3) * (len(lengths) // 2), 4, 1, 64, 48)
    for sliding_window in (512, 555):
        check(batch, Sliding(sliding_window), device)
        check(batch, Sliding(sliding_window), device, with_copies(batch, 3))


@pytest.mark.parametrize("device", DEVICES)
def test_a_window_of_every_token_changes_nothing(device: str) -> None:
    """Bit for bit: also the largest number that there is."""
    batch = make_batch((300, 47, 5), (1, 4, 2), 4, 2, 128)
    copies = with_copies(batch, 3)
    for causal in (True, False):
        want = attend(copies.batch, Sliding(0, causal), copies, device)
        for sliding_window in (304, 2**31, 2**63 - 1):
            got = attend(copies.batch, Sliding(sliding_window, causal), copies, device)
            assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_other_windows_give_other_results(device: str) -> None:
    """One token more or less is seen."""
    batch = make_batch((300,), (2,), 4, 2, 64)
    outs = [attend(batch, Sliding(window), None, device)[0] for window in (32, 33, 34)]
    assert (outs[0] - outs[1]).flatten(1).norm(dim=1).min() > 1e-3
    assert (outs[1] - outs[2]).flatten(1).norm(dim=1).min() > 1e-3


def test_cpus_do_not_look_at_blocks_that_nobody_sees() -> None:
    """Their ids may be anything there."""
    batch, rule = make_batch((300,), (2,), 4, 2, 64), Sliding(40)
    want = attend(batch, rule, None, "cpu")
    batch.block_table[0, : (300 - 41) // UNIT_TOKENS] = POISON_BLOCK
    got = attend(batch, rule, None, "cpu")
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_negative_windows_are_refused(device: str) -> None:
    batch = make_batch((20,), (1,), 4, 2, 64)
    with pytest.raises(RuntimeError, match="sliding_window is -1, expected 0 for none or a pos"):
        attend(batch, Sliding(-1), None, device)


def test_opcheck() -> None:
    batch = make_batch((20,), (1,), 4, 2, 64)
    tensors = (batch.query, batch.kv_cache, batch.block_table, batch.seq_lens)
    torch.library.opcheck(
        torch.ops.turboquant.paged_attention.default,
        (
            *(*tensors, batch.query_start_loc, batch.key_frame, batch.scale, True),
            *(torch.zeros_like(batch.query), torch.zeros(batch.query.shape[1::-1])),
        ),
        {"sliding_window": 7},
    )
