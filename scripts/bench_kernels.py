#!/usr/bin/env python3
"""Time the CUDA kernels beside vLLM's FlashAttention-3 and TurboQuant, and the byte floor.

    bench_kernels.py --set bars --set shapes --set grid --set plot --json kernels.json
    bench_kernels.py --from-json kernels.json --plot kernels.png      (needs no GPU)

One decode step of one layer, CUDA-graph replays over inputs larger than the L2 cache, random data.
Requests have 8-bit copies of their last tokens, as by default, but in the column "codes only".
The floor is slot_bytes per token and KV head at the bandwidth of a large copy on this GPU. The
record is written after every row, so that a run that is cut keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from bench_engine import device
from kernel_timing import (
    FLASH_DTYPES,
    RIVALS,
    Shape,
    bench_store,
    bench_turboquant,
    copy_bandwidth,
)
from rich.console import Console
from rich.table import Table

from vllm_turboquant import __version__

K = 1024
CONTEXTS = (512, 2 * K, 8 * K, 32 * K, 128 * K)
SETS: dict[str, dict[int, Sequence[int]]] = {  # contexts of each batch
    "bars": {1: [32 * K, 128 * K], 8: [8 * K, 32 * K], 32: [8 * K, 32 * K], 64: [2 * K, 8 * K]},
    "shapes": {1: [32 * K], 8: [32 * K], 64: [2 * K]},
    "grid": dict.fromkeys((1, 4, 16, 64, 256), CONTEXTS),
    "plot": {8: CONTEXTS},
}
STORE_SETS = {"bars"}
CODES_ONLY_SETS = {"bars", "shapes"}
TRITON_SETS = {"bars", "plot"}  # the kernel takes tens of times as long as the others

RIVAL_LABELS = {"fa3_bf16": "FA3 bf16", "fa3_fp8": "FA3 fp8", "vllm_turboquant_3bit": "3bit_nc"}


#: Heads of the set `shapes`.
SHAPES = (Shape(12, 2, 128), Shape(64, 8, 128), Shape(32, 8, 64), Shape(16, 8, 256))


def plan(names: Iterable[str], base: Shape) -> dict[Shape, set[str]]:
    """Every shape of the sets, each once, as far as FlashAttention's fp8 cache fits.

    Args:
        names: Of ``SETS``.
        base: Heads, head_dim and block size; `shapes` has its own.

    Returns:
        Shape to the sets that it is in.
    """
    rows: dict[Shape, set[str]] = {}
    for name in names:
        for heads in SHAPES if name == "shapes" else (base,):
            for batch, contexts in SETS[name].items():
                for context in contexts:
                    shape = replace(heads, batch=batch, context=context)
                    if shape.flash_fits(torch.float8_e4m3fn):
                        rows.setdefault(shape, set()).add(name)
    return rows


def rivals_of(shape: Shape, sets: set[str]) -> list[str]:
    """Names of vLLM's kernels to time on a shape."""
    names = [name for name, dtype in FLASH_DTYPES.items() if shape.flash_fits(dtype)]
    return names + ["vllm_turboquant_3bit"] * bool(sets & TRITON_SETS)


def time_ours(shape: Shape, codes_only: bool) -> dict[str, float]:
    """Columns of our kernel; with and without copies in turn, each first and last, twice.

    So that neither a drift nor what ran before them is taken for what copies cost.
    """
    if not codes_only:
        return {"turboquant3_us": bench_turboquant(shape)}
    with_copies, without = partial(bench_turboquant, shape), partial(bench_turboquant, shape, 0)
    turns = [[bench() for bench in (with_copies, without, without, with_copies)] for _ in range(2)]
    return {
        "turboquant3_us": mean(time for turn in turns for time in (turn[0], turn[3])),
        "codes_only_us": mean(time for turn in turns for time in (turn[1], turn[2])),
    }


def measure(shape: Shape, sets: set[str], rivals: bool, bandwidth: float) -> dict[str, Any]:
    """A row of the record; a rival that fails is named in its ``errors``."""
    times = time_ours(shape, bool(sets & CODES_ONLY_SETS))
    row: dict[str, Any] = {**asdict(shape), "sets": sorted(sets), **times}
    ours = times["turboquant3_us"]
    row["bytes_per_s"] = shape.slots_bytes / ours * 1e6
    row["share_of_floor"] = row["bytes_per_s"] / bandwidth
    if sets & STORE_SETS:
        row["store_us"] = bench_store(shape)
        row["store_share"] = row["store_us"] / ours
        row["with_store_us"] = bench_turboquant(shape, stores=True)
    for name in rivals_of(shape, sets) if rivals else ():
        torch.cuda.empty_cache()
        try:
            row[f"{name}_us"] = RIVALS[name](shape)
        except Exception as error:  # what another's kernel refuses does not end the run
            row[f"{name}_us"] = None
            row.setdefault("errors", {})[name] = f"{type(error).__name__}: {error}"
    torch.cuda.empty_cache()
    return row


def describe_machine() -> dict[str, Any]:
    """Date, GPU, versions and the bandwidth of a copy."""
    return {
        "date": date.today().isoformat(),
        "gpu": torch.cuda.get_device_name(),
        "driver": device()["driver"],
        "torch": torch.__version__,
        "vllm": version("vllm") if find_spec("vllm") else None,
        "vllm-turboquant": __version__,
        "copy_bytes_per_s": copy_bandwidth(),
    }


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write the JSON file; never half of it."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(path)


def read_record(path: Path) -> dict[str, Any]:
    """Read what ``write_record`` wrote.

    Raises:
        SystemExit: Its rows lack something; the message names it.
    """
    needed = {"sets", "turboquant3_us", *(field.name for field in fields(Shape))}
    record: dict[str, Any] = json.loads(path.read_text())
    if lacking := {key for row in record["rows"] for key in needed - row.keys()}:
        sys.exit(f"{path} has rows without {', '.join(sorted(lacking))}; measure them again")
    return record


def short(tokens: int) -> str:
    """A context as 512 or 32K."""
    return f"{tokens // K}K" if tokens % K == 0 else str(tokens)


def cell(row: dict[str, Any], name: str) -> str:
    """Microseconds of a kernel."""
    value = row.get(f"{name}_us")
    if value is None:
        return "failed" if name in row.get("errors", {}) else "-"
    return f"{value:,.1f}"


def fraction(row: dict[str, Any], name: str) -> str:
    """Our time as a fraction of another kernel's."""
    value = row.get(f"{name}_us")
    return f"{row['turboquant3_us'] / value:.3f}" if value else "-"


def heads_of(row: dict[str, Any]) -> str:
    """What the rows of a table share."""
    return "{heads}/{kv_heads} heads, head_dim {head_dim}, block {block_size}".format(**row)


def make_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """One table for all rows of the same heads, head_dim and block size."""
    tables = []
    for title in dict.fromkeys(map(heads_of, rows)):
        table = Table(title=title)
        columns = ["batch x context", "ours, us", "codes", "TB/s", "of copy"]
        columns += ["store (of ours)", "with store"]
        columns += [f"{label}, us" for label in RIVAL_LABELS.values()]
        columns += [f"ours / {label}" for label in RIVAL_LABELS.values()]
        for column in columns:
            table.add_column(column, justify="right")
        for row in filter(lambda row: heads_of(row) == title, rows):
            share = f" ({row['store_share']:.0%})" if "store_share" in row else ""
            table.add_row(
                f"{row['batch']} x {short(row['context'])}",
                cell(row, "turboquant3"),
                cell(row, "codes_only"),
                f"{row['bytes_per_s'] / 1e12:.2f}",
                f"{row['share_of_floor']:.0%}",
                cell(row, "store") + share,
                cell(row, "with_store"),
                *(cell(row, name) for name in RIVAL_LABELS),
                *(fraction(row, name) for name in RIVAL_LABELS),
            )
        tables.append(table)
    return tables


def plot(path: Path, record: dict[str, Any]) -> None:
    """Draw the time of every kernel against the context, from the rows of the set `plot`.

    Raises:
        SystemExit: The record has no such rows.
    """
    from matplotlib.figure import Figure

    rows = sorted((r for r in record["rows"] if "plot" in r["sets"]), key=lambda r: r["context"])
    if not rows:
        sys.exit("no plot: the record has no rows of the set plot; measure them with --set plot")
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    labels = RIVAL_LABELS | {"vllm_turboquant_3bit": "vLLM's turboquant_3bit_nc"}
    for name, label in {**labels, "turboquant3": "turboquant3"}.items():
        points = [(row["context"], row[f"{name}_us"]) for row in rows if row.get(f"{name}_us")]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    contexts = [row["context"] for row in rows]
    axes.set_xticks(contexts, map(short, contexts))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(
        xlabel="context, tokens",
        ylabel="one decode step of one layer, us",
        title=f"{record['gpu']}, batch {rows[0]['batch']}, {heads_of(rows[0])}",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=150)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--set", action="append", choices=SETS, dest="sets", help="rows to time; default: bars"
    )
    for field in ("heads", "kv-heads", "head-dim", "block-size"):
        default = getattr(Shape, field.replace("-", "_"))
        parser.add_argument(f"--{field}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--no-rivals", action="store_true", help="leave vLLM's kernels out")
    parser.add_argument("--json", type=Path, help="the record, written after every row")
    parser.add_argument("--from-json", type=Path, help="show this record and measure nothing")
    parser.add_argument("--plot", type=Path, help="PNG of the set plot: time against context")
    args = parser.parse_args()
    if args.from_json and (args.sets or args.json):
        parser.error("--from-json measures nothing; leave out --set and --json")
    args.sets = args.sets or ["bars"]
    if args.plot and not args.from_json and "plot" not in args.sets:
        parser.error("--plot draws the set plot; add --set plot")
    if args.plot and find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib: pip install 'vllm-turboquant[plot]'")
    if not args.from_json and not torch.cuda.is_available():
        parser.error("there is no GPU to measure here; show a record with --from-json")
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the rows of the sets, and write the record after each."""
    record: dict[str, Any] = {**describe_machine(), "rows": []}
    rows = plan(args.sets, Shape(args.heads, args.kv_heads, args.head_dim, args.block_size))
    bench_turboquant(next(iter(rows)))  # what a process times first is slow, and belongs to no row
    for place, (shape, sets) in enumerate(rows.items(), start=1):
        row = measure(shape, sets, not args.no_rivals, record["copy_bytes_per_s"])
        record["rows"].append(row)
        if args.json:
            write_record(args.json, record)
        print(f"[bench] {place}/{len(rows)} {json.dumps(row)}", flush=True)
    return record


def main() -> None:
    """Measure, or read a record; print its tables and draw its plot."""
    args = parse_arguments()
    record = read_record(args.from_json) if args.from_json else run(args)
    console = Console(width=None if sys.stdout.isatty() else 145, highlight=False)
    setup = "{gpu}, driver {driver}, torch {torch}, vLLM {vllm}, {date}, copy".format(**record)
    console.print(setup, f"{record['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    for table in make_tables(record["rows"]):
        console.print(table)
    if args.plot:
        plot(args.plot, record)


if __name__ == "__main__":
    main()
