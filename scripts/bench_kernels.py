"""Times the decode kernel beside vLLM's FlashAttention-3 and TurboQuant, and the byte floor.

One decode step of one layer, CUDA-graph replays over inputs larger than the L2 cache, random data.
The floor is slot_bytes per token and KV head at the bandwidth of a large copy on this GPU.

    python scripts/bench_kernels.py --rivals --json result.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vllm_turboquant import ops, reference
from vllm_turboquant.layout import SlotLayout

ROWS = [(1, 32768), (1, 131072), (8, 8192), (8, 32768), (32, 32768), (64, 2048)]
L2_BYTES = 256 << 20  # more than any L2 cache


def time_graph_us(steps: Sequence[Callable[[], object]], repeats: int = 20) -> float:
    """Median time of one step, from replays of a graph that runs all of them once."""
    for step in steps:
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(steps))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second that a large device copy reads and writes."""
    source = torch.randn(1 << 30, device="cuda")
    target = torch.empty_like(source)
    seconds = time_graph_us([lambda: torch.mul(source, 2.0, out=target)], 5) * 1e-6
    return 2 * source.nbytes / seconds


def copies_needed(num_bytes: int) -> int:
    """Input sets to rotate among, so that no replay finds its input in the L2 cache."""
    return max(2, -(-L2_BYTES // num_bytes))


def random_cache(num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int) -> Tensor:
    """A pool of random codes with scales between 0.5 and 1.5."""
    layout = SlotLayout(head_dim)
    shape = (num_blocks, num_kv_heads, block_size, layout.slot_bytes)
    cache = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    arrays = reference.block_arrays(cache, layout)
    for name in ("key_scale", "value_scale"):
        arrays[name].uniform_(0.5, 1.5)
    return cache


def shuffled_tables(batch: int, blocks: int, copies: int) -> list[Tensor]:
    """Block tables [batch, blocks] of disjoint parts of one pool."""
    order = torch.randperm(batch * blocks * copies, device="cuda", dtype=torch.int32)
    return list(order.view(copies, batch, blocks))


def bench_turboquant(batch: int, context: int, args: argparse.Namespace) -> float:
    """Microseconds of paged_attention."""
    blocks = -(-context // args.block_size)
    slot_bytes = SlotLayout(args.head_dim).slot_bytes
    copies = copies_needed(batch * context * args.kv_heads * slot_bytes)
    cache = random_cache(batch * blocks * copies, args.kv_heads, args.block_size, args.head_dim)
    shape = (batch, args.heads, args.head_dim)
    query = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    center = torch.randn(args.kv_heads, args.head_dim, device="cuda")
    out, lse = torch.empty_like(query), torch.empty(args.heads, batch, device="cuda")

    def step(table: Tensor) -> Callable[[], None]:
        return lambda: ops.paged_attention(
            query, cache, table, lengths, starts, center, args.head_dim**-0.5, True, out, lse
        )

    return time_graph_us([step(table) for table in shuffled_tables(batch, blocks, copies)])


def bench_flash_attention(
    batch: int, context: int, args: argparse.Namespace, dtype: torch.dtype
) -> float | None:
    """Microseconds of vLLM's FlashAttention-3 over a paged cache; None where it is missing."""
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func, get_scheduler_metadata
    except ImportError:
        return None
    blocks = -(-context // args.block_size)
    row_bytes = 2 * args.kv_heads * args.head_dim * dtype.itemsize
    copies = copies_needed(batch * context * row_bytes)
    pool = batch * blocks * copies
    shape = (2, pool, args.block_size, args.kv_heads, args.head_dim)
    cache = torch.empty(shape, device="cuda", dtype=dtype)
    for part in cache.flatten(0, 1).split(4096):
        part.copy_(torch.randn(part.shape, device="cuda", dtype=torch.bfloat16))
    query = torch.randn(batch, args.heads, args.head_dim, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    starts = torch.arange(batch + 1, device="cuda", dtype=torch.int32)
    out = torch.empty_like(query)
    fp8 = dtype.itemsize == 1
    ones = torch.ones(batch, args.kv_heads, device="cuda") if fp8 else None
    query = query.to(dtype)
    metadata = get_scheduler_metadata(
        batch_size=batch,
        max_seqlen_q=1,
        max_seqlen_k=context,
        num_heads_q=args.heads,
        num_heads_kv=args.kv_heads,
        headdim=args.head_dim,
        cache_seqlens=lengths,
        qkv_dtype=dtype,
        cu_seqlens_q=starts,
        page_size=args.block_size,
        causal=True,
        num_splits=0,
    )

    def step(table: Tensor) -> Callable[[], None]:
        return lambda: flash_attn_varlen_func(
            q=query,
            k=cache[0],
            v=cache[1],
            out=out,
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=context,
            seqused_k=lengths,
            softmax_scale=args.head_dim**-0.5,
            causal=True,
            block_table=table,
            fa_version=3,
            scheduler_metadata=metadata,
            q_descale=ones,
            k_descale=ones,
            v_descale=ones,
            num_splits=0,
        )

    return time_graph_us([step(table) for table in shuffled_tables(batch, blocks, copies)])


def bench_vllm_turboquant(batch: int, context: int, args: argparse.Namespace) -> float | None:
    """Microseconds of vLLM's own decode kernels for turboquant_3bit_nc; None where missing."""
    try:
        from vllm.config.attention import AttentionConfig
        from vllm.model_executor.layers.quantization.turboquant.centroids import get_centroids
        from vllm.model_executor.layers.quantization.turboquant.config import TurboQuantConfig
        from vllm.v1.attention.ops.triton_turboquant_decode import (
            triton_turboquant_decode_attention,
        )
    except ImportError:
        return None
    config = TurboQuantConfig.from_cache_dtype("turboquant_3bit_nc", args.head_dim)
    blocks = -(-context // args.block_size)
    copies = copies_needed(batch * context * args.kv_heads * config.slot_size_aligned)
    shape = (
        batch * blocks * copies,
        args.block_size,
        args.kv_heads,
        config.slot_size_aligned,
    )
    # As float16, bytes below 0x3c are numbers between 0 and 1.
    cache = torch.randint(0, 0x3C, shape, dtype=torch.uint8, device="cuda")
    query = torch.randn(batch, args.heads, args.head_dim, device="cuda", dtype=torch.bfloat16)
    lengths = torch.full((batch,), context, device="cuda", dtype=torch.int32)
    rotation = torch.linalg.qr(torch.randn(args.head_dim, args.head_dim, device="cuda"))[0]
    transposed = rotation.T.contiguous()
    centroids = get_centroids(args.head_dim, config.centroid_bits).cuda()
    splits = AttentionConfig().tq_max_kv_splits_for_cuda_graph

    def step(table: Tensor) -> Callable[[], object]:
        return lambda: triton_turboquant_decode_attention(
            query=query,
            kv_cache=cache,
            block_table=table,
            seq_lens=lengths,
            Pi=rotation,
            PiT=transposed,
            centroids=centroids,
            scale=args.head_dim**-0.5,
            mse_bits=config.key_mse_bits,
            key_packed_size=config.key_packed_size,
            value_quant_bits=config.effective_value_quant_bits,
            norm_correction=config.norm_correction,
            max_num_kv_splits=splits,
        )

    return time_graph_us([step(table) for table in shuffled_tables(batch, blocks, copies)])


def main() -> None:
    """Print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--rivals", action="store_true", help="also time vLLM's kernels")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bandwidth = copy_bandwidth()
    gpu, copied = torch.cuda.get_device_name(), f"copy {bandwidth / 1e12:.2f} TB/s"
    print(f"{gpu}, torch {torch.__version__}, {copied}")
    print(f"{args.heads}/{args.kv_heads} heads, head_dim {args.head_dim}, block {args.block_size}")
    print(
        f"{'batch x context':>16} {'us':>9} {'TB/s':>6} {'floor':>6} {'FA3 bf16':>9} "
        f"{'FA3 fp8':>9} {'3bit_nc':>9}"
    )
    rows = []
    for batch, context in ROWS:
        ours = bench_turboquant(batch, context, args)
        num_bytes = batch * context * args.kv_heads * SlotLayout(args.head_dim).slot_bytes
        row = {"batch": batch, "context": context, "turboquant3_us": ours}
        row["bytes_per_s"] = num_bytes / ours * 1e6
        row["share_of_floor"] = row["bytes_per_s"] / bandwidth
        if args.rivals:
            row["fa3_bf16_us"] = bench_flash_attention(batch, context, args, torch.bfloat16)
            row["fa3_fp8_us"] = bench_flash_attention(batch, context, args, torch.float8_e4m3fn)
            row["vllm_turboquant_3bit_us"] = bench_vllm_turboquant(batch, context, args)
        torch.cuda.empty_cache()
        rows.append(row)
        others = " ".join(
            f"{row[name]:9.1f}" if row.get(name) else f"{'-':>9}"
            for name in ("fa3_bf16_us", "fa3_fp8_us", "vllm_turboquant_3bit_us")
        )
        print(
            f"{batch:>8} x {context:<6} {ours:9.1f} {row['bytes_per_s'] / 1e12:6.2f} "
            f"{row['share_of_floor']:6.0%} {others}",
            flush=True,
        )
    if args.json:
        result = {
            "date": datetime.date.today().isoformat(),
            "gpu": gpu,
            "torch": torch.__version__,
            "copy_bytes_per_s": bandwidth,
            "shape": {
                key: getattr(args, key) for key in ("heads", "kv_heads", "head_dim", "block_size")
            },
            "rows": rows,
        }
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
