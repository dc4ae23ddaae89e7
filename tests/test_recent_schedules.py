"""Whole schedules of requests, every output against what their true keys and values give.

No reference of the pool's state is needed: wherever a copy or a code is read, it must be that of
the request's own token.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.schedules import Request, Schedule, Span, Step
from tests.test_recent import DEVICES, EVERY_TOKEN, Places, assign, compare, empty_recent
from tests.vectors import seeded
from vllm_turboquant import ops, reference, reference_recent
from vllm_turboquant.frame import BALANCE
from vllm_turboquant.layout import UNIT_TOKENS
from vllm_turboquant.testing import empty_cache, random_frame


class Tokens:
    """True keys and values of tokens by name, and what attention may read in their place.

    Attributes:
        key: [num_tokens, num_kv_heads, head_dim] float32.
        value: As ``key``.
        coded: Keys and values as codes give them back, float64.
        copied: As 8-bit copies do.
    """

    def __init__(self, count: int, key_frame: Tensor, seed: int) -> None:
        num_kv_heads, _, head_dim = key_frame.shape
        origin = key_frame[:, :BALANCE].repeat(1, 2, 1)[:, torch.arange(count) % 3].transpose(0, 1)
        self.key, self.value = torch.randn(2, count, num_kv_heads, head_dim, generator=seeded(seed))
        self.key = origin + self.key / key_frame[:, BALANCE]
        num_units = -(-count // UNIT_TOKENS)
        cache = empty_cache(num_units, num_kv_heads, UNIT_TOKENS, head_dim)
        recent = empty_recent(num_units, num_kv_heads, head_dim)
        slots, units = torch.arange(count), torch.arange(num_units)
        unit_map = (units + 1) << 16 | EVERY_TOKEN
        reference.store(self.key, self.value, key_frame, cache, slots)
        reference_recent.store_copies(self.key, self.value, key_frame, recent, unit_map, slots)
        self.coded, self.copied = (
            reference_recent.read(cache, units, count, key_frame, recent, shown, num_units)
            for shown in (torch.zeros_like(unit_map), unit_map)
        )

    def attend(self, query: Tensor, names: Tensor, has_copy: Tensor) -> tuple[Tensor, Tensor]:
        """Attend the last rows of a request, causally.

        Args:
            query: [num_rows, num_heads, head_dim].
            names: [seq_len], of the request's tokens.
            has_copy: [seq_len], whether a token is read from its copy.

        Returns:
            Output [num_rows, num_heads, head_dim] and log-sum-exp [num_heads, num_rows].
        """
        key, value = (
            torch.where(has_copy[:, None, None], copied[names], coded[names])
            for copied, coded in zip(self.copied, self.coded, strict=True)
        )
        num_rows = len(query)
        grouped = query.double().unflatten(1, (key.shape[1], -1))
        scores = torch.einsum("qhrd,thd->qhrt", grouped, key) * query.shape[-1] ** -0.5
        last_seen = len(names) - num_rows + torch.arange(num_rows)
        hidden = torch.arange(len(names)) > last_seen[:, None]
        scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
        out = torch.einsum("qhrt,thd->qhrd", scores.softmax(dim=-1), value)
        return out.flatten(1, 2), scores.logsumexp(dim=-1).flatten(1).T


class Engine:
    """Runs steps of a schedule through the operators and checks every output.

    Attributes:
        kept: By request, those of its tokens that have a copy if there is room for every window.
    """

    NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, NUM_NAMES = 4, 2, 64, 8000

    def __init__(
        self, schedule: Schedule, num_places: int, window_units: int, device: str, seed: int
    ) -> None:
        self.schedule, self.window_units, self.device = schedule, window_units, device
        self.has_room = num_places >= window_units * schedule.most_requests
        self.generator = seeded(seed)
        num_blocks, block_size = len(schedule.users), schedule.block_size
        self.frame = random_frame(self.NUM_KV_HEADS, self.HEAD_DIM, self.generator)
        self.tokens = Tokens(self.NUM_NAMES, self.frame, seed)
        self.cache = empty_cache(num_blocks, self.NUM_KV_HEADS, block_size, self.HEAD_DIM).to(
            device
        )
        self.recent = empty_recent(num_places, self.NUM_KV_HEADS, self.HEAD_DIM).to(device)
        self.places = Places.empty(num_blocks * block_size // UNIT_TOKENS, num_places, device)
        self.kept: dict[Request, set[int]] = {}
        self.num_steps = self.num_copied = self.num_windowed = 0

    def step(self) -> None:
        step = self.schedule.step()
        self.num_steps += 1
        self.store(step)
        query = torch.randn(
            len(step.slot_mapping), self.NUM_HEADS, self.HEAD_DIM, generator=self.generator
        )
        out, lse = self.attend(step, query)
        if not step.spans:
            return
        wanted, kept = [], {}
        for span, begin in zip(step.spans, step.query_start_loc.tolist(), strict=False):
            rows = query[begin : begin + span.last - span.first]
            has_copy = self.has_copy(span)
            wanted.append(self.tokens.attend(rows, torch.tensor(span.tokens), has_copy))
            kept[span.request] = self.still_kept(span)
            if self.has_room:
                assert has_copy[list(kept[span.request])].all()
        self.kept = kept  # a request that sat a step out may have lost its places
        want, want_lse = (torch.cat(x, dim=i) for i, x in enumerate(zip(*wanted, strict=True)))
        num_rows = len(want)
        compare(out[:num_rows], lse[:, :num_rows], want, want_lse, self.device)

    def store(self, step: Step) -> None:
        """Assign places and store; rows of padding are NaN."""
        assign(self.places, step, self.schedule.block_size, self.window_units, self.num_steps)
        names = torch.tensor(step.row_tokens, dtype=torch.int64)
        padding = len(step.slot_mapping) - len(names)
        key, value = (
            torch.nn.functional.pad(x[names], (0, 0, 0, 0, 0, padding), value=torch.nan)
            for x in (self.tokens.key, self.tokens.value)
        )
        arguments = [x.to(self.device) for x in (key, value, self.frame)]
        slots = step.slot_mapping.to(self.device)
        ops.store(*arguments, self.cache, slots, self.recent, self.places.unit_map)

    def attend(self, step: Step, query: Tensor) -> tuple[Tensor, Tensor]:
        out = torch.full(query.shape, torch.nan, device=self.device)
        lse = torch.full(query.shape[1::-1], torch.nan, device=self.device)
        table, seq_lens, starts, frame = (
            x.to(self.device)
            for x in (step.block_table, step.seq_lens, step.query_start_loc, self.frame)
        )
        ops.paged_attention(
            query.to(self.device),
            self.cache,
            table,
            seq_lens,
            starts,
            frame,
            self.HEAD_DIM**-0.5,
            True,
            out,
            lse,
            recent=self.recent,
            unit_map=self.places.unit_map,
            window_units=self.window_units,
        )
        return out.cpu(), lse.cpu()

    def still_kept(self, span: Span) -> set[int]:
        """Tokens in the window that the request wrote since they are in it."""
        window = max(0, -(-span.last // UNIT_TOKENS) - self.window_units) * UNIT_TOKENS
        before = {t for t in self.kept.get(span.request, set()) if window <= t < span.first}
        return before | set(range(max(window, span.first), span.last))

    def has_copy(self, span: Span) -> Tensor:
        """[span.last], which tokens of a request the map says are read from copies."""
        position = torch.arange(span.last)
        blocks = torch.tensor(span.request.blocks)
        block_size = self.schedule.block_size
        slots = blocks[position // block_size] * block_size + position % block_size
        valid = self.places.unit_map.cpu()[slots // UNIT_TOKENS] >> slots % UNIT_TOKENS & 1
        num_units = -(-span.last // UNIT_TOKENS)
        in_window = position // UNIT_TOKENS >= num_units - self.window_units
        self.num_copied += int((valid.bool() & in_window).sum())
        self.num_windowed += int(in_window.sum())
        return valid.bool() & in_window


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("num_places", "window_units", "block_size", "num_blocks", "idle"),
    [
        (32, 4, 16, 90, 0.0),
        (8, 1, 48, 30, 0.0),
        (64, 8, 32, 40, 0.2),
        (5, 4, 16, 50, 0.0),
        (20, 3, 48, 16, 0.2),
    ],
    ids=["room for all", "short windows", "long windows", "few places", "few blocks"],
)
def test_schedule(
    num_places: int,
    window_units: int,
    block_size: int,
    num_blocks: int,
    idle: float,
    device: str,
) -> None:
    schedule = Schedule(num_places, num_blocks, block_size, most_requests=8, idle=idle)
    engine = Engine(schedule, num_places, window_units, device, seed=window_units)
    for _ in range(300):
        engine.step()
    share = engine.num_copied / engine.num_windowed
    assert share > (0.8 if engine.has_room else 0.05), share
