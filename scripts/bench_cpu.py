#!/usr/bin/env python3
"""Time the CPU kernels against PyTorch's and vLLM's attention over bf16 caches of the same tokens.

    bench_cpu.py [--json benchmarks/cpu.json]

One run measures all, in turn, and prints medians and their ratios. Ours reads the newest tokens
from 8-bit copies, as by default. PyTorch's side is the faster of two ways to call
scaled_dot_product_attention: with enable_gqa, as a user would, and with the query heads of a KV
head as query rows, which only works without a causal mask. vLLM's side is the kernel behind
--kv-cache-dtype auto. Run it on an otherwise idle machine: a second thread that waits for a core
costs more than the kernels do.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

from vllm_turboquant import ops
from vllm_turboquant.evaluation.prepare import cpu_name
from vllm_turboquant.frame import make_frame, num_spans
from vllm_turboquant.layout import UNIT_TOKENS, SlotLayout
from vllm_turboquant.options import Options
from vllm_turboquant.recent import RecentPool

BLOCK_SIZE = 128
SHAPES = {  # query heads / KV heads, head_dim
    "9/3, d 64": (9, 3, 64),
    "12/2, d 128": (12, 2, 128),
    "32/8, d 128": (32, 8, 128),
}
BATCHES = [(1, 1024), (1, 8192), (1, 32768), (8, 8192)]


def medians_ms(contestants: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each, run in turn so that a slow spell of the machine hits all."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    for _ in range(rounds):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def vllm_attention(
    query: Tensor, block_table: Tensor, context: int, num_kv_heads: int
) -> Callable[[], None]:
    """Prepare vLLM's CPU attention over a bf16 cache; call the result to run it."""
    batch, num_heads, head_dim = query.shape
    size = (block_table.numel(), num_kv_heads, 2 * BLOCK_SIZE, head_dim)
    cache = torch.randn(size).bfloat16()
    key_cache, value_cache = cache.chunk(2, dim=2)
    lengths = {
        "seq_lens": torch.full((batch,), context, dtype=torch.int32),
        "query_start_loc": torch.arange(batch + 1, dtype=torch.int32),
        "causal": True,
    }
    plan = vllm_ops.cpu_attn_get_scheduler_metadata(
        num_reqs=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        dtype=query.dtype,
        sliding_window_size=-1,
        isa=_get_attn_isa(query.dtype, BLOCK_SIZE, head_dim, "auto"),
        enable_kv_split=True,
        **lengths,
    )
    return functools.partial(
        vllm_ops.cpu_attention_with_kv_cache,
        query=query,
        key_cache=key_cache,
        value_cache=value_cache,
        output=torch.empty_like(query),
        scale=head_dim**-0.5,
        alibi_slopes=None,
        sliding_window=-1,
        block_table=block_table,
        softcap=0.0,
        scheduler_metadata=plan,
        s_aux=None,
        **lengths,
    )


def measure(
    shape: tuple[int, int, int],
    batch: int,
    context: int,
    rounds: int,
) -> dict[str, float]:
    """Time one decode step of one layer, and storing its context.

    Returns:
        Milliseconds of each contestant's decode step, the ratio, and microseconds to store a token.
    """
    num_heads, num_kv_heads, head_dim = shape
    num_tokens = batch * context
    key, value = torch.randn(2, num_tokens, num_kv_heads, head_dim).bfloat16()
    query = torch.randn(batch, num_heads, head_dim).bfloat16()
    positions = torch.arange(context).repeat(batch)
    zeros = torch.zeros(num_kv_heads, num_spans(context), head_dim)
    key_frame = make_frame(zeros[:, 0], zeros[:, 0], torch.ones(num_kv_heads, head_dim), zeros)
    num_blocks = num_tokens // BLOCK_SIZE
    layout = SlotLayout(head_dim)
    cache = torch.empty(num_blocks, num_kv_heads, BLOCK_SIZE, layout.slot_bytes, dtype=torch.uint8)
    block_table = torch.randperm(num_blocks, dtype=torch.int32).view(batch, -1)
    slots = (block_table[:, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE)).flatten()
    seq_lens = torch.full((batch,), context, dtype=torch.int32)
    query_start_loc = torch.arange(batch + 1, dtype=torch.int32)
    window_units = Options().window_units
    num_places = batch * window_units
    pool = RecentPool(
        num_tokens // UNIT_TOKENS, num_places, BLOCK_SIZE, window_units, torch.device("cpu")
    )
    pool.assign(block_table, seq_lens, context * query_start_loc)
    recent = torch.zeros(num_places, num_kv_heads, layout.unit_bytes, dtype=torch.uint8)
    copies = (recent, pool.unit_map)
    store_ms = medians_ms(
        {"store": lambda: ops.store(key, value, key_frame, cache, slots, *copies, positions)},
        min(rounds, 3),
    )["store"]
    out, lse = torch.empty_like(query), torch.empty(num_heads, batch)

    def heads_first(x: Tensor) -> Tensor:
        return x.view(batch, context, num_kv_heads, head_dim).transpose(1, 2).contiguous()

    dense_key, dense_value = heads_first(key), heads_first(value)
    rows = query.view(batch, num_kv_heads, -1, head_dim)
    times = medians_ms(
        {
            "turboquant3": lambda: ops.paged_attention(
                query,
                cache,
                block_table,
                seq_lens,
                query_start_loc,
                key_frame,
                head_dim**-0.5,
                True,
                out,
                lse,
                None,
                None,
                *copies,
                window_units,
            ),
            "sdpa enable_gqa": lambda: scaled_dot_product_attention(
                query[:, :, None], dense_key, dense_value, enable_gqa=True
            ),
            "sdpa grouped": lambda: scaled_dot_product_attention(rows, dense_key, dense_value),
            "vllm auto": vllm_attention(query, block_table, context, num_kv_heads),
        },
        rounds,
    )
    best = min(times["sdpa enable_gqa"], times["sdpa grouped"])
    return {
        **{f"{name} ms": value for name, value in times.items()},
        "sdpa best / turboquant3": best / times["turboquant3"],
        "vllm auto / turboquant3": times["vllm auto"] / times["turboquant3"],
        "store us per token": 1000 * store_ms / num_tokens,
    }


def main() -> None:
    """Print the table and, if asked, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    record = {
        "date": date.today().isoformat(),
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "instruction set": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "rows": [],
    }
    where = f"{record['cpu']}, {record['threads']} threads"
    table = Table(title=f"decode step of one layer, and storing a token: {where}")
    for column in ("heads, dim", "batch x ctx", "ours ms", "SDPA /", "vLLM auto /", "store us"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, shape in SHAPES.items():
        for batch, context in BATCHES:
            row = measure(shape, batch, context, arguments.rounds)
            record["rows"].append({"shape": name, "batch": batch, "context": context, **row})
            table.add_row(
                name,
                f"{batch} x {context}",
                f"{row['turboquant3 ms']:.3f}",
                f"{row['sdpa best / turboquant3']:.2f}",
                f"{row['vllm auto / turboquant3']:.2f}",
                f"{row['store us per token']:.2f}",
            )
    Console().print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
