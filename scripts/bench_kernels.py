#!/usr/bin/env python3
"""Time the CUDA kernels beside vLLM's FlashAttention-3 and TurboQuant, and the byte floor.

    bench_kernels.py --set bars --set shapes --set grid --set plot --json kernels.json
    bench_kernels.py --from-json kernels.json --plot kernels.png      (needs no GPU)

One decode step of one layer, CUDA-graph replays over inputs larger than the L2 cache, random data.
The floor is slot_bytes per token and KV head at the bandwidth of a large copy on this GPU. The
record is written after every row, so that a run that is cut keeps what it has.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import date
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from bench_engine import device
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vllm_turboquant import __version__, ops, reference
from vllm_turboquant.frame import plain_frame
from vllm_turboquant.layout import SlotLayout

K = 1024
L2_BYTES = 256 << 20  # more than any L2 cache
POOL_LIMIT_BYTES = 24 << 30  # of one cache of FlashAttention
MAX_REPLAYS, MIN_REPLAYS, ENOUGH_MS = 20, 3, 300.0
STORE_STEPS = 64

CONTEXTS = (512, 2 * K, 8 * K, 32 * K, 128 * K)
SETS: dict[str, dict[int, Sequence[int]]] = {  # contexts of each batch
    "bars": {1: [32 * K, 128 * K], 8: [8 * K, 32 * K], 32: [8 * K, 32 * K], 64: [2 * K]},
    "shapes": {1: [32 * K], 8: [32 * K], 64: [2 * K]},
    "grid": dict.fromkeys((1, 4, 16, 64, 256), CONTEXTS),
    "plot": {8: CONTEXTS},
}
STORE_SETS = {"bars"}
TRITON_SETS = {"bars", "plot"}  # the kernel takes tens of times as long as the others

FLASH_DTYPES = {"fa3_bf16": torch.bfloat16, "fa3_fp8": torch.float8_e4m3fn}
RIVAL_LABELS = {"fa3_bf16": "FA3 bf16", "fa3_fp8": "FA3 fp8", "vllm_turboquant_3bit": "3bit_nc"}


@dataclass(frozen=True)
class Shape:
    """One decode step: ``batch`` requests of ``context`` tokens, each with one query row."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    block_size: int = 16
    batch: int = 1
    context: int = 1

    def pool_blocks(self, copies: int) -> int:
        """Blocks of a pool with all requests' tokens ``copies`` times."""
        return copies * self.batch * -(-self.context // self.block_size)

    @property
    def slots_bytes(self) -> int:
        """What a step reads of a turboquant3 cache."""
        return self.batch * self.context * self.kv_heads * SlotLayout(self.head_dim).slot_bytes

    def flash_bytes(self, dtype: torch.dtype) -> int:
        """What a step reads of an uncompressed cache."""
        return 2 * self.batch * self.context * self.kv_heads * self.head_dim * dtype.itemsize

    def flash_fits(self, dtype: torch.dtype) -> bool:
        """Whether the uncompressed caches to rotate among keep to ``POOL_LIMIT_BYTES``."""
        num_bytes = self.flash_bytes(dtype)
        return num_bytes * copies_needed(num_bytes) <= POOL_LIMIT_BYTES


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


def repeat(replay_ms: Callable[[], float]) -> list[float]:
    """Times of ``MAX_REPLAYS`` replays, or of fewer once ``ENOUGH_MS`` were measured."""
    times: list[float] = []
    while len(times) < MIN_REPLAYS or (len(times) < MAX_REPLAYS and sum(times) < ENOUGH_MS):
        times.append(replay_ms())
    return times


def time_graph_us(steps: Sequence[Callable[[], object]]) -> float:
    """Median time of one step, from replays of a graph that runs all of them once."""
    for step in steps:
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    other = torch.zeros(L2_BYTES // 4, device="cuda")

    def replay_ms() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        other.sum()  # empties the L2 cache, and lasts until the replay has been submitted
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    return statistics.median(repeat(replay_ms)) * 1e3 / len(steps)


def copy_bandwidth() -> float:
    """Bytes per second that a large device copy reads and writes."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    seconds = time_graph_us([lambda: torch.mul(source, 2.0, out=target)]) * 1e-6
    return 2 * source.nbytes / seconds


def copies_needed(num_bytes: int) -> int:
    """Input sets to rotate among, so that no replay finds its input in the L2 cache."""
    return max(2, -(-L2_BYTES // num_bytes))


def random_cache(shape: Shape, num_blocks: int) -> Tensor:
    """A pool of random codes with scales between 0.5 and 1.5."""
    layout = SlotLayout(shape.head_dim)
    size = (num_blocks, shape.kv_heads, shape.block_size, layout.slot_bytes)
    cache = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
    arrays = reference.block_arrays(cache, layout)
    for name in ("key_scale", "value_scale"):
        arrays[name].uniform_(0.5, 1.5)
    return cache


def random_rows(shape: Shape, heads: int) -> Tensor:
    """[batch, heads, head_dim] bfloat16."""
    return torch.randn(shape.batch, heads, shape.head_dim, device="cuda", dtype=torch.bfloat16)


def random_frame(shape: Shape) -> Tensor:
    """[kv_heads, 3, head_dim] float32: keys are only centered."""
    return plain_frame(torch.randn(shape.kv_heads, shape.head_dim, device="cuda"))


def lengths_and_starts(shape: Shape) -> tuple[Tensor, Tensor]:
    """Sequence lengths [batch] and query starts [batch + 1], int32."""
    lengths = torch.full((shape.batch,), shape.context, device="cuda", dtype=torch.int32)
    return lengths, torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32)


def shuffled_tables(shape: Shape, copies: int) -> list[Tensor]:
    """Block tables [batch, blocks] of disjoint parts of one pool."""
    order = torch.randperm(shape.pool_blocks(copies), device="cuda", dtype=torch.int32)
    return list(order.view(copies, shape.batch, -1))


def bench_turboquant(shape: Shape) -> float:
    """Microseconds of paged_attention."""
    copies = copies_needed(shape.slots_bytes)
    cache = random_cache(shape, shape.pool_blocks(copies))
    query, frame = random_rows(shape, shape.heads), random_frame(shape)
    lengths, starts = lengths_and_starts(shape)
    out, lse = torch.empty_like(query), torch.empty(shape.heads, shape.batch, device="cuda")
    tickets = torch.zeros(shape.batch * shape.kv_heads, device="cuda", dtype=torch.int32)
    rest = (lengths, starts, frame, shape.head_dim**-0.5, True, out, lse, None, tickets)
    tables = shuffled_tables(shape, copies)
    return time_graph_us([partial(ops.paged_attention, query, cache, t, *rest) for t in tables])


def bench_store(shape: Shape) -> float:
    """Microseconds of store for one token of every request, in a pool as large as for decode.

    Every step writes blocks of its own, which are not in the L2 cache; keys and values are, as
    when the operator before has just written them.
    """
    copies = copies_needed(shape.slots_bytes)
    num_blocks = max(shape.pool_blocks(copies), STORE_STEPS * shape.batch)
    cache, frame = random_cache(shape, num_blocks), random_frame(shape)
    key, value = (random_rows(shape, shape.kv_heads) for _ in range(2))
    blocks = torch.randperm(num_blocks, device="cuda")[: STORE_STEPS * shape.batch]
    slots = blocks * shape.block_size + (shape.context - 1) % shape.block_size
    mappings = slots.view(STORE_STEPS, shape.batch)
    return time_graph_us([partial(ops.store, key, value, frame, cache, m) for m in mappings])


def bench_flash_attention(shape: Shape, dtype: torch.dtype) -> float | None:
    """Microseconds of vLLM's FlashAttention-3 over a paged cache; None where it is missing."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError:
        return None
    copies = copies_needed(shape.flash_bytes(dtype))
    size = (2, shape.pool_blocks(copies), shape.block_size, shape.kv_heads, shape.head_dim)
    cache = torch.empty(size, device="cuda", dtype=dtype)
    for part in cache.flatten(0, 1).split(4096):
        part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
    query = random_rows(shape, shape.heads)
    lengths, starts = lengths_and_starts(shape)
    out = torch.empty_like(query)
    ones = torch.ones(shape.batch, shape.kv_heads, device="cuda")
    scales = ("q_descale", "k_descale", "v_descale") if dtype.itemsize == 1 else ()
    limits = {"max_seqlen_q": 1, "max_seqlen_k": shape.context, "cu_seqlens_q": starts}
    metadata = get_scheduler_metadata(
        batch_size=shape.batch,
        num_heads_q=shape.heads,
        num_heads_kv=shape.kv_heads,
        headdim=shape.head_dim,
        cache_seqlens=lengths,
        qkv_dtype=dtype,
        page_size=shape.block_size,
        causal=True,
        **limits,
    )
    attend = partial(
        flash_attn_varlen_func,
        q=query.to(dtype),
        k=cache[0],
        v=cache[1],
        out=out,
        seqused_k=lengths,
        causal=True,
        fa_version=3,
        scheduler_metadata=metadata,
        **limits,
        **dict.fromkeys(scales, ones),
    )
    tables = shuffled_tables(shape, copies)
    return time_graph_us([partial(attend, block_table=table) for table in tables])


def bench_vllm_turboquant(shape: Shape) -> float | None:
    """Microseconds of vLLM's own decode kernels for turboquant_3bit_nc; None where missing."""
    try:
        from vllm.config.attention import AttentionConfig
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
        from vllm.v1.attention.ops import triton_turboquant_decode as decode
    except ImportError:
        return None
    config = TurboQuantConfig.from_cache_dtype("turboquant_3bit_nc", shape.head_dim)
    slot_bytes = config.slot_size_aligned
    copies = copies_needed(shape.batch * shape.context * shape.kv_heads * slot_bytes)
    # As float16, bytes below 0x3c are numbers between 0 and 1.
    size = (shape.pool_blocks(copies), shape.block_size, shape.kv_heads, slot_bytes)
    cache = torch.randint(0, 0x3C, size, dtype=torch.uint8, device="cuda")
    rotation = torch.linalg.qr(torch.randn(shape.head_dim, shape.head_dim, device="cuda"))[0]
    attend = partial(
        decode.triton_turboquant_decode_attention,
        query=random_rows(shape, shape.heads),
        kv_cache=cache,
        seq_lens=lengths_and_starts(shape)[0],
        Pi=rotation,
        PiT=rotation.T.contiguous(),
        centroids=get_centroids(shape.head_dim, config.centroid_bits).cuda(),
        scale=shape.head_dim**-0.5,
        mse_bits=config.key_mse_bits,
        key_packed_size=config.key_packed_size,
        value_quant_bits=config.effective_value_quant_bits,
        norm_correction=config.norm_correction,
        max_num_kv_splits=AttentionConfig().tq_max_kv_splits_for_cuda_graph,
    )
    tables = shuffled_tables(shape, copies)
    return time_graph_us([partial(attend, block_table=table) for table in tables])


RIVALS: dict[str, Callable[[Shape], float | None]] = {
    **{name: partial(bench_flash_attention, dtype=dtype) for name, dtype in FLASH_DTYPES.items()},
    "vllm_turboquant_3bit": bench_vllm_turboquant,
}


def measure(shape: Shape, sets: set[str], rivals: bool, bandwidth: float) -> dict[str, Any]:
    """A row of the record; a rival that fails is named in its ``errors``."""
    ours = bench_turboquant(shape)
    row: dict[str, Any] = {**asdict(shape), "sets": sorted(sets), "turboquant3_us": ours}
    row["bytes_per_s"] = shape.slots_bytes / ours * 1e6
    row["share_of_floor"] = row["bytes_per_s"] / bandwidth
    if sets & STORE_SETS:
        row["store_us"] = bench_store(shape)
        row["store_share"] = row["store_us"] / ours
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
        columns = ["batch x context", "ours, us", "TB/s", "of copy", "store, us (of ours)"]
        columns += [f"{label}, us" for label in RIVAL_LABELS.values()]
        columns += [f"ours / {label}" for label in RIVAL_LABELS.values()]
        for column in columns:
            table.add_column(column, justify="right")
        for row in filter(lambda row: heads_of(row) == title, rows):
            share = f" ({row['store_share']:.0%})" if "store_share" in row else ""
            table.add_row(
                f"{row['batch']} x {short(row['context'])}",
                cell(row, "turboquant3"),
                f"{row['bytes_per_s'] / 1e12:.2f}",
                f"{row['share_of_floor']:.0%}",
                cell(row, "store") + share,
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
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    setup = "{gpu}, driver {driver}, torch {torch}, vLLM {vllm}, {date}, copy".format(**record)
    console.print(setup, f"{record['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    for table in make_tables(record["rows"]):
        console.print(table)
    if args.plot:
        plot(args.plot, record)


if __name__ == "__main__":
    main()
