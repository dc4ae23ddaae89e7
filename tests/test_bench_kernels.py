"""What scripts/bench_kernels.py does around the kernels: rows, inputs, record, tables, plot."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import bench_kernels
import kernel_timing
import pytest
import torch
from bench_kernels import K, Shape, measure, plan, rivals_of
from rich.console import Console
from torch.overrides import TorchFunctionMode

MACHINE = {
    "date": "2026-01-02",
    "gpu": "A GPU",
    "driver": "1.2",
    "torch": "2.11.0",
    "vllm": "0.32.0",
    "vllm-turboquant": "0.1",
    "copy_bytes_per_s": 3e12,
}
TIMES = {"turboquant3": 50.0, "fa3_bf16": 200.0, "fa3_fp8": 125.0, "vllm_turboquant_3bit": 1600.0}
CODES_ONLY_US = 48.0


class OnCpu(TorchFunctionMode):
    """Makes every tensor for "cuda" on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


@pytest.fixture
def fake_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, Callable[[Shape], float | None]]:
    """Kernels that take as long as ``TIMES`` says, on a machine of ``MACHINE``; may be replaced."""
    rivals = {name: lambda shape, us=us: us for name, us in list(TIMES.items())[1:]}
    monkeypatch.setattr(bench_kernels, "RIVALS", rivals)
    monkeypatch.setattr(
        bench_kernels,
        "bench_turboquant",
        lambda shape, window_units=3, *, stores=False: (
            (TIMES["turboquant3"] if window_units else CODES_ONLY_US) + 4.0 * stores
        ),
    )
    monkeypatch.setattr(bench_kernels, "bench_store", lambda shape: 5.0)
    monkeypatch.setattr(bench_kernels, "describe_machine", lambda: dict(MACHINE))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return rivals


@pytest.fixture
def timed_steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Any, ...]]]:
    """Arguments of every operator that is timed, of inputs on the CPU; nothing is computed."""
    calls: list[tuple[Any, ...]] = []

    def run_once(steps: Sequence[Callable[[], object]]) -> float:
        for step in steps:
            step()
        return 1.0

    def note(*args: Any, **new_tokens: Any) -> None:
        calls.append((*args, *new_tokens.values()))

    for name in ("paged_attention", "store"):
        monkeypatch.setattr(kernel_timing.ops, name, note)
    monkeypatch.setattr(kernel_timing, "time_graph_us", run_once)
    monkeypatch.setattr(kernel_timing, "L2_BYTES", 1 << 18)
    with OnCpu():
        yield calls


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run the script with these arguments."""
    monkeypatch.setattr(sys, "argv", ["bench_kernels.py", *map(str, arguments)])
    bench_kernels.main()


def sizes(*names: str) -> list[tuple[int, int]]:
    return [(shape.batch, shape.context) for shape in plan(names, Shape())]


def row(sets: set[str], context: int = 8 * K, **times: float | None) -> dict[str, Any]:
    figures = {f"{name}_us": value for name, value in {**TIMES, **times}.items()}
    shape = vars(Shape(batch=8, context=context))
    return {**shape, "sets": sorted(sets), "bytes_per_s": 2e12, "share_of_floor": 0.66, **figures}


def test_bars_and_plot() -> None:
    assert sizes("bars") == [
        *((1, 32768), (1, 131072), (8, 8192), (8, 32768)),
        *((32, 8192), (32, 32768), (64, 2048), (64, 8192)),
    ]
    assert sizes("plot") == [(8, 512), (8, 2048), (8, 8192), (8, 32768), (8, 131072)]
    heads = {(s.heads, s.kv_heads, s.head_dim, s.block_size) for s in plan(["bars"], Shape())}
    assert heads == {(32, 8, 128, 16)}


def test_shapes_have_their_own_heads() -> None:
    shapes = plan(["shapes"], Shape(heads=1, kv_heads=1))
    heads = {(s.heads, s.kv_heads, s.head_dim) for s in shapes}
    assert heads == {(12, 2, 128), (64, 8, 128), (32, 8, 64), (16, 8, 256)}
    assert len(shapes) == 12
    assert {(s.batch, s.context) for s in shapes} == {(1, 32768), (8, 32768), (64, 2048)}


def test_other_sets_have_the_heads_that_are_asked_for() -> None:
    asked = Shape(28, 4, 64, 32)
    for shape in plan(["bars", "grid", "plot"], asked):
        assert (shape.heads, shape.kv_heads, shape.head_dim, shape.block_size) == (28, 4, 64, 32)


def test_the_grid_ends_where_caches_of_fp8_exceed_24_gib() -> None:
    contexts = (512, 2048, 8192, 32768, 131072)
    everything = {(batch, context) for batch in (1, 4, 16, 64, 256) for context in contexts}
    left_out = {(64, 131072), (256, 32768), (256, 131072)}
    assert set(sizes("grid")) == everything - left_out
    half = {(shape.batch, shape.context) for shape in plan(["grid"], Shape(kv_heads=4))}
    assert half == everything - {(256, 131072)}


def test_a_shape_of_several_sets_is_measured_once() -> None:
    rows = plan(["bars", "grid", "plot"], Shape())
    assert rows[Shape(batch=8, context=8 * K)] == {"bars", "plot"}
    assert rows[Shape(batch=1, context=32 * K)] == {"bars", "grid"}
    assert rows[Shape(batch=4, context=512)] == {"grid"}


def test_rivals_that_are_slow_or_do_not_fit_are_left_out() -> None:
    small = Shape(batch=8, context=8 * K)
    flash = ["fa3_bf16", "fa3_fp8"]
    assert rivals_of(small, {"bars"}) == rivals_of(small, {"grid", "plot"})
    assert rivals_of(small, {"bars"}) == [*flash, "vllm_turboquant_3bit"]
    assert rivals_of(small, {"grid", "shapes"}) == flash
    large = Shape(heads=64, kv_heads=16, batch=16, context=128 * K)  # 16 GiB in fp8, twice that
    assert rivals_of(large, {"grid"}) == ["fa3_fp8"]


@pytest.mark.parametrize(("replay_ms", "replays"), [(1.0, 20), (50.0, 6), (149.0, 3), (400.0, 3)])
def test_slow_steps_are_repeated_less(replay_ms: float, replays: int) -> None:
    assert kernel_timing.repeat(lambda: replay_ms) == [replay_ms] * replays


@pytest.mark.parametrize("num_bytes", [1 << 20, (256 << 20) - 1, 256 << 20, 1 << 40])
def test_inputs_together_exceed_the_cache(num_bytes: int) -> None:
    copies = kernel_timing.copies_needed(num_bytes)
    assert copies >= 2
    assert copies * num_bytes >= 256 << 20
    assert copies == 2 or (copies - 1) * num_bytes < 256 << 20


def test_decode_steps_share_no_block(timed_steps: list[tuple[Any, ...]]) -> None:
    shape = Shape(4, 2, 64, batch=3, context=40)  # 3 blocks a request, all in one span
    kernel_timing.bench_turboquant(shape)
    copies = -(-(1 << 18) // (3 * 40 * 2 * 44))
    assert len(timed_steps) == copies
    _, cache, table, lengths, starts, frame = timed_steps[0][:6]
    assert table.shape == (3, 3)
    assert lengths.tolist() == [40] * 3 and starts.tolist() == [0, 1, 2, 3]
    assert frame.shape == (2, 4, 64)
    tables = torch.cat([call[2].flatten() for call in timed_steps])
    assert sorted(tables.tolist()) == list(range(cache.shape[0]))


def test_the_last_units_of_every_request_have_copies(timed_steps: list[tuple[Any, ...]]) -> None:
    shape = Shape(4, 2, 64, block_size=32, batch=3, context=72)  # 5 units in 3 blocks
    kernel_timing.bench_turboquant(shape)
    recent, unit_map, window_units = timed_steps[0][-3:]
    assert window_units == 3
    copied: set[int] = set()
    for call in timed_steps:
        for blocks in call[2].tolist():
            units = [blocks[u // 2] * 2 + u % 2 for u in range(5)]
            assert [bool(unit_map[u]) for u in units] == [False, False, True, True, True]
            copied |= {int(unit_map[u]) >> 16 for u in units[2:]}
    assert copied == set(range(1, len(recent) + 1))
    kernel_timing.bench_turboquant(shape, window_units=0)
    assert len(timed_steps[-1]) == len(timed_steps[0]) - 3


def test_steps_store_the_last_token_of_every_request(timed_steps: list[tuple[Any, ...]]) -> None:
    shape = Shape(4, 2, 64, batch=3, context=40)
    kernel_timing.bench_turboquant(shape, stores=True)
    for call in timed_steps:
        table, (slots, key, value, positions) = call[2], call[-4:]
        assert key.shape == value.shape == (3, 2, 64)
        assert positions.tolist() == [39] * 3
        assert slots.tolist() == [int(row[39 // 16]) * 16 + 39 % 16 for row in table]


def test_short_requests_have_fewer_copies() -> None:
    table = torch.tensor([[4, 7], [1, 0]])
    units = kernel_timing.last_units(Shape(batch=2, context=20), table, 3)
    assert units.tolist() == [4, 7, 1, 0]


def test_store_steps_share_no_block(timed_steps: list[tuple[Any, ...]]) -> None:
    shape = Shape(4, 2, 64, batch=3, context=40)
    kernel_timing.bench_store(shape)
    assert len(timed_steps) == kernel_timing.STORE_STEPS
    key, value, frame, cache, slots, recent, unit_map, positions = timed_steps[0]
    assert key.shape == value.shape == (3, 2, 64)
    assert frame.shape == (2, 4, 64)
    assert slots.shape == (3,) and slots.dtype == torch.int64
    assert positions.tolist() == [39] * 3
    slots = torch.cat([call[4] for call in timed_steps])
    places = unit_map[slots // 16] >> 16
    assert sorted(places.tolist()) == list(range(1, len(recent) + 1))  # each a copy of its own
    assert set((slots % 16).tolist()) == {39 % 16}  # the last token's
    blocks = (slots // 16).tolist()
    assert len(set(blocks)) == len(blocks) and max(blocks) < cache.shape[0]


@pytest.mark.usefixtures("fake_kernels")
def test_a_row_says_how_long_store_takes_beside_attention() -> None:
    shape = Shape(batch=8, context=8 * K)
    bars, grid = (measure(shape, {name}, True, 3e12) for name in ("bars", "grid"))
    assert (bars["store_us"], bars["store_share"], bars["with_store_us"]) == (5.0, 0.1, 54.0)
    assert "store_us" not in grid
    assert bars["bytes_per_s"] == pytest.approx(8 * 8 * K * 8 * 84 / 50e-6)
    assert bars["share_of_floor"] == pytest.approx(bars["bytes_per_s"] / 3e12)
    assert {name: bars[f"{name}_us"] for name in TIMES} == TIMES
    alone = measure(shape, {"bars"}, False, 3e12)
    assert [key for key in alone if key.endswith("_us")] == [
        "turboquant3_us",
        "codes_only_us",
        "store_us",
        "with_store_us",
    ]
    assert alone["codes_only_us"] == CODES_ONLY_US and "codes_only_us" not in grid


def test_a_drift_does_not_change_what_copies_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    drift = iter((8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0))
    monkeypatch.setattr(
        bench_kernels,
        "bench_turboquant",
        lambda shape, window_units=3: (50.0 if window_units else 48.0) + next(drift),
    )
    times = bench_kernels.time_ours(Shape(batch=8, context=8 * K), codes_only=True)
    assert times == {"turboquant3_us": 54.5, "codes_only_us": 52.5}


def test_a_rival_that_fails_or_is_missing_does_not_end_the_run(
    fake_kernels: dict[str, Callable[[Shape], float | None]],
) -> None:
    def fail(shape: Shape) -> float:
        raise RuntimeError("no such head_dim")

    fake_kernels |= {"fa3_bf16": fail, "fa3_fp8": lambda shape: None}
    result = measure(Shape(batch=8, context=8 * K), {"bars"}, True, 3e12)
    assert result["fa3_bf16_us"] is None and result["fa3_fp8_us"] is None
    assert result["errors"] == {"fa3_bf16": "RuntimeError: no such head_dim"}
    assert result["vllm_turboquant_3bit_us"] == 1600.0


def test_a_cut_run_keeps_its_rows(
    fake_kernels: dict[str, Callable[[Shape], float | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def cut_at_third(shape: Shape) -> float:
        if (shape.batch, shape.context) == (8, 8 * K):
            raise KeyboardInterrupt
        return 125.0

    fake_kernels["fa3_fp8"] = cut_at_third
    with pytest.raises(KeyboardInterrupt):
        command(monkeypatch, "--json", tmp_path / "cut.json")
    written = json.loads((tmp_path / "cut.json").read_text())
    assert [(r["batch"], r["context"]) for r in written["rows"]] == [(1, 32 * K), (1, 128 * K)]


@pytest.mark.usefixtures("fake_kernels")
def test_what_is_timed_first_belongs_to_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = chain([1000.0], repeat(50.0))
    monkeypatch.setattr(bench_kernels, "bench_turboquant", lambda *_, **__: next(times))
    command(monkeypatch, "--set", "bars", "--json", tmp_path / "record.json")
    rows = bench_kernels.read_record(tmp_path / "record.json")["rows"]
    assert {row["turboquant3_us"] for row in rows} == {50.0}


@pytest.mark.usefixtures("fake_kernels")
def test_a_record_is_read_as_it_was_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "record.json"
    command(monkeypatch, "--set", "bars", "--set", "shapes", "--json", path)
    measured = capsys.readouterr().out
    record = bench_kernels.read_record(path)
    assert record.items() >= MACHINE.items()
    assert len(record["rows"]) == 8 + 12
    assert record["rows"][0].items() >= vars(Shape(batch=1, context=32 * K)).items()
    assert record["rows"][-1].items() >= vars(Shape(16, 8, 256, 16, 64, 2 * K)).items()
    command(monkeypatch, "--from-json", path)
    shown = capsys.readouterr().out
    assert "16/8 heads, head_dim 256" in shown
    assert measured.endswith(shown)


def test_a_record_of_other_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"rows": [{"batch": 1, "context": 1, "turboquant3_us": 1.0}]}))
    with pytest.raises(SystemExit, match=r"old.json has rows without block_size, head_dim, heads"):
        bench_kernels.read_record(path)


def test_tables_compare_with_every_rival() -> None:
    rows = [
        row({"bars"}, with_store=54.0)
        | {"codes_only_us": CODES_ONLY_US, "store_us": 5.0, "store_share": 0.1},
        row({"grid"}, 512, fa3_fp8=None) | {"errors": {"fa3_fp8": "no"}},
        row({"grid"}) | {"head_dim": 64},
    ]
    del rows[1]["vllm_turboquant_3bit_us"]
    tables = bench_kernels.make_tables(rows)
    assert [table.title for table in tables] == [
        "32/8 heads, head_dim 128, block 16",
        "32/8 heads, head_dim 64, block 16",
    ]
    assert [table.row_count for table in tables] == [2, 1]
    console = Console(width=145, record=True)
    console.print(tables[0])
    lines = console.export_text().splitlines()
    cells = {
        parts[0]: parts[1:]
        for line in lines
        if len(parts := [part.strip() for part in line.strip("│").split("│")]) > 1
    }
    assert cells["8 x 8K"] == [
        *("50.0", "48.0", "2.00", "66%", "5.0 (10%)", "54.0", "200.0", "125.0", "1,600.0"),
        *("0.250", "0.400", "0.031"),
    ]
    assert cells["8 x 512"][4:] == ["-", "-", "200.0", "failed", "-", "0.250", "-", "-"]


def test_the_plot_shows_four_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Figure = pytest.importorskip("matplotlib.figure").Figure
    record = {
        **MACHINE,
        "rows": [
            row({"plot", "bars"}, 8 * K, turboquant3=70.0),
            row({"bars"}, 32 * K),
            row({"plot"}, 512, turboquant3=60.0, fa3_fp8=None),
        ],
    }
    (tmp_path / "record.json").write_text(json.dumps(record))
    figures = []
    save = Figure.savefig

    def savefig(self: Any, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", savefig)
    png = tmp_path / "plot.png"
    command(monkeypatch, "--from-json", tmp_path / "record.json", "--plot", png)
    assert png.read_bytes().startswith(b"\x89PNG")
    (axes,) = figures[0].axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {
        "FA3 bf16": [[512, 200], [8192, 200]],
        "FA3 fp8": [[8192, 125]],
        "vLLM's turboquant_3bit_nc": [[512, 1600], [8192, 1600]],
        "turboquant3": [[512, 60], [8192, 70]],
    }
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["512", "8K"]


def test_a_record_without_rows_to_plot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no rows of the set plot; measure them with --set plot"):
        bench_kernels.plot(tmp_path / "plot.png", {**MACHINE, "rows": [row({"bars"})]})


@pytest.mark.parametrize(
    ("arguments", "gpu", "refusal"),
    [
        ([], False, "there is no GPU to measure here; show a record with --from-json"),
        (["--plot", "p.png"], True, "--plot draws the set plot; add --set plot"),
        (["--from-json", "r.json", "--set", "grid"], True, "--from-json measures nothing"),
        (["--from-json", "r.json", "--json", "s.json"], True, "--from-json measures nothing"),
    ],
    ids=["no GPU", "no set plot", "set and record", "two records"],
)
def test_refusals_of_the_command(
    arguments: list[str],
    gpu: bool,
    refusal: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    with pytest.raises(SystemExit):
        command(monkeypatch, *arguments)
    assert refusal in capsys.readouterr().err
