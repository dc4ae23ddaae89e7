"""paged_attention with new tokens is store, then paged_attention, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.test_ops import attention_arguments, store_arguments
from tests.test_recent import DEVICES, RecentBatch, on, with_copies
from tests.vectors import seeded
from vllm_turboquant import ops
from vllm_turboquant.frame import FIRST_SPAN
from vllm_turboquant.testing import PagedBatch, make_batch

#: Decode steps that follow each other before anyone waits for the device.
NUM_STEPS = 12

BATCHES = {
    "one short": (1,),
    "one long": (5000,),  # a GPU has room for its store and its splits at once
    "a few": (700, 33, 0, 16, 160),
    "many": (48, 17, 300, 1) * 20,
    "shared": (97, 96),
    "where spans meet": (512, 513, 514, 1024, 1025, 1700),  # the last two belong to one of two
}
SHAPES = [(6, 2, 128), (9, 3, 64), (4, 2, 256)]


def attend(
    batch: PagedBatch, query: Tensor, fill: float, *options: object
) -> tuple[Tensor, Tensor]:
    """Output and lse, where they are written; ``options`` as the operator has them after these."""
    out = torch.full_like(query, fill)
    lse = torch.full(query.shape[1::-1], fill, device=out.device)
    rest = (batch.block_table, batch.seq_lens, batch.query_start_loc, batch.key_frame, batch.scale)
    ops.paged_attention(query, batch.kv_cache, *rest, True, out, lse, None, None, *options)
    return out, lse


class Steps:
    """The newest token of every request is written, and attended to, again and again.

    Attributes:
        case: Its cache and copies belong to these steps alone.
        query: [num_reqs, num_heads, head_dim].
        slot_mapping: [num_reqs] int64, of the newest tokens; -1 where there is none.
        positions: [num_reqs] int64, likewise.
        results: Outputs and log-sum-exps of the steps so far, in turn.
    """

    def __init__(self, case: RecentBatch, device: str) -> None:
        batch = on(device, case.batch)
        batch = replace(batch, kv_cache=batch.kv_cache.clone())
        last = batch.seq_lens.cumsum(0) - 1
        slots = batch.slot_mapping[last.clamp(min=0)]
        self.case = replace(
            case,
            batch=batch,
            recent=case.recent.to(device, copy=True),
            unit_map=case.unit_map.to(device),
        )
        self.query = batch.query[: batch.num_tokens]
        self.slot_mapping = torch.where(batch.seq_lens > 0, slots, -1)
        self.positions = batch.seq_lens.long() - 1
        self.results: list[Tensor] = []

    def run(self, key: Tensor, value: Tensor, *, at_once: bool) -> tuple[Tensor, Tensor]:
        """Output and lse of one step, of which nobody knows when it is done."""
        case, batch = self.case, self.case.batch
        copies = (case.recent, case.unit_map) if case.window_units else (None, None)
        if not at_once:
            ops.store(
                *(key, value, batch.key_frame, batch.kv_cache, self.slot_mapping, *copies),
                positions=self.positions,
            )
        new = (key, value, self.slot_mapping, self.positions) if at_once else ()
        return attend(batch, self.query, torch.nan, *copies, case.window_units, 0, *new)


def make_steps(
    name: str, shape: tuple[int, int, int], window_units: int, device: str
) -> tuple[Callable[[], Steps], Tensor]:
    """Steps over one batch, as often as wanted, and keys and values: [steps, 2, reqs, ...]."""
    seq_lens = BATCHES[name]
    num_heads, num_kv_heads, head_dim = shape
    batch = make_batch(
        seq_lens, (1,) * len(seq_lens), num_heads, num_kv_heads, head_dim, dtype=torch.bfloat16
    )
    if window_units:
        case = with_copies(batch, window_units)
    else:
        nothing = torch.empty(0)
        case = RecentBatch(batch, nothing, nothing, 0, 0)
    size = (NUM_STEPS, 2, len(seq_lens), num_kv_heads, head_dim)
    new = torch.randn(size, generator=seeded(1)).to(torch.bfloat16)
    return lambda: Steps(case, device), new.to(device)


def check_equal(steps: Steps, others: Steps) -> None:
    """The same bits in caches and copies, and in what was computed from them."""
    assert torch.equal(steps.case.batch.kv_cache, others.case.batch.kv_cache)
    assert torch.equal(*(s.case.recent.view(torch.uint8) for s in (steps, others)))
    for step, (got, want) in enumerate(zip(steps.results, others.results, strict=True)):
        assert not want.isnan().any(), f"step {step} read poison"
        assert torch.equal(got, want), f"step {step}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window_units", [0, 3], ids=["codes", "copies"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_store_comes_first(
    name: str, shape: tuple[int, int, int], window_units: int, device: str
) -> None:
    make, new = make_steps(name, shape, window_units, device)
    together, apart = make(), make()
    for steps, at_once in ((together, True), (apart, False)):
        for key, value in new:
            steps.results += steps.run(key, value, at_once=at_once)
    check_equal(together, apart)
    changes = [
        (a != b).any() for a, b in zip(apart.results[:-2:2], apart.results[2::2], strict=True)
    ]
    assert all(changes), "every step must attend to what it stored"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("window_units", [0, 3], ids=["codes", "copies"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_new_may_be_shared(
    shape: tuple[int, int, int], window_units: int, device: str
) -> None:
    """A request that joins in a step shares a block that another one completes in it."""
    joins, completes = BATCHES["shared"]
    make, new = make_steps("shared", shape, window_units, device)
    together, apart = make(), make()
    for steps, at_once in ((together, True), (apart, False)):
        batch = steps.case.batch
        batch.block_table[0, : completes // 16] = batch.block_table[1, : completes // 16]
        # The window of the one begins a unit after that of the other, whose codes are poisoned.
        tokens = slice(joins + completes - 48, joins + completes - 32)
        slots, positions = batch.slot_mapping[tokens], batch.positions[tokens]
        key, value = torch.ones(2, 16, *shape[1:], device=device)
        ops.store(key, value, batch.key_frame, batch.kv_cache, slots, positions=positions)
        for key, value in new:
            steps.results += steps.run(key, value, at_once=at_once)
    check_equal(together, apart)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", BATCHES)
def test_graph_replay(name: str, shape: tuple[int, int, int]) -> None:
    """All steps in one graph; between them, a kernel that writes what the next step stores."""
    make, new = make_steps(name, shape, 3, "cuda")
    together, apart = make(), make()
    for key, value in new:
        apart.results += apart.run(key, value, at_once=False)
    key, value = new[0].clone()

    def run() -> list[Tensor]:
        results: list[Tensor] = []
        for i in range(NUM_STEPS):
            key.copy_(new[i, 0]), value.copy_(new[i, 1])
            results += together.run(key, value, at_once=True)
        return results

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        together.results = run()
    for _ in range(3):
        for result in together.results:
            result.fill_(torch.nan)
        graph.replay()
        check_equal(together, apart)


@pytest.mark.parametrize("device", DEVICES)
def test_nothing_but_padding(device: str) -> None:
    batch = on(device, make_batch((40, 20), (0, 0), 6, 2, 128))
    before = batch.kv_cache.clone()
    key, value = torch.randn(2, 2, 2, 128, device=device)
    none = torch.full((2,), -1, device=device)
    out, lse = attend(batch, batch.query, 7.0, None, None, 0, 0, key, value, none, none)
    assert torch.equal(before, batch.kv_cache)
    assert (out == 7).all() and (lse == 7).all()


def test_arguments_come_together() -> None:
    arguments = attention_arguments()
    new = store_arguments()
    for left_out in ("key", "value", "slot_mapping"):
        some = {name: new[name] for name in {"key", "value", "slot_mapping"} - {left_out}}
        with pytest.raises(
            RuntimeError, match="key, value and slot_mapping must be given together"
        ):
            ops.paged_attention(**arguments, **some)


def test_positions_may_be_left_out_only_without_spans() -> None:
    arguments, new = attention_arguments(), store_arguments()
    some = {name: new[name][:2] for name in ("key", "value", "slot_mapping")}
    with pytest.raises(RuntimeError, match="positions must be given for a key_frame with 2 spans"):
        ops.paged_attention(**arguments, **some)
    with pytest.raises(RuntimeError, match="positions is int32, expected int64"):
        ops.paged_attention(**arguments, **some, positions=new["positions"][:2].int())
    arguments["key_frame"] = arguments["key_frame"][:, :FIRST_SPAN].contiguous()
    ops.paged_attention(**arguments, **some)


def test_opcheck() -> None:
    arguments = attention_arguments()
    new = store_arguments()
    some = {name: new[name][:2] for name in ("key", "value", "slot_mapping", "positions")}
    torch.library.opcheck(
        torch.ops.turboquant.paged_attention.default, tuple(arguments.values()), some
    )
