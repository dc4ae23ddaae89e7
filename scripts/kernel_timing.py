"""Timing of single CUDA kernels on random data: ours, and those of vLLM that they compete with.

One decode step of one layer, CUDA-graph replays over inputs larger than the L2 cache.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from vllm_turboquant import ops, reference, reference_recent
from vllm_turboquant.frame import make_frame, num_spans
from vllm_turboquant.layout import UNIT_TOKENS, SlotLayout

L2_BYTES = 256 << 20  # more than any L2 cache
POOL_LIMIT_BYTES = 24 << 30  # of one cache of FlashAttention
MAX_REPLAYS, MIN_REPLAYS, ENOUGH_MS = 20, 3, 300.0
STORE_STEPS = 64

WINDOW_UNITS = 3  # of 16 tokens, with 8-bit copies: what requests have by default

FLASH_DTYPES = {"fa3_bf16": torch.bfloat16, "fa3_fp8": torch.float8_e4m3fn}


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
    """[kv_heads, 3 + num_spans, head_dim] float32, with a center for every span of a request."""
    size = (shape.kv_heads, 3 + num_spans(shape.context), shape.head_dim)
    center, sink, balance, *of_spans = torch.randn(size, device="cuda").unbind(dim=1)
    return make_frame(center, sink, balance.exp2(), torch.stack(of_spans, dim=1))


def lengths_and_starts(shape: Shape) -> tuple[Tensor, Tensor]:
    """Sequence lengths [batch] and query starts [batch + 1], int32."""
    lengths = torch.full((shape.batch,), shape.context, device="cuda", dtype=torch.int32)
    return lengths, torch.arange(shape.batch + 1, device="cuda", dtype=torch.int32)


def shuffled_tables(shape: Shape, copies: int) -> list[Tensor]:
    """Block tables [batch, blocks] of disjoint parts of one pool."""
    order = torch.randperm(shape.pool_blocks(copies), device="cuda", dtype=torch.int32)
    return list(order.view(copies, shape.batch, -1))


def random_copies(shape: Shape, num_units: int, units: Tensor) -> tuple[Tensor, Tensor]:
    """A pool with random 8-bit copies of ``units``, each a row of 16 tokens, and the map of it.

    Args:
        shape: Heads.
        num_units: Units of the cache.
        units: [num_copied] int64.
    """
    layout = SlotLayout(shape.head_dim)
    size = (len(units), shape.kv_heads, layout.unit_bytes)
    recent = torch.randint(0, 256, size, dtype=torch.uint8, device="cuda")
    arrays = reference_recent.recent_arrays(recent, layout)
    for name in ("key_scale", "value_scale"):
        arrays[name].uniform_(0.01, 0.03)
    unit_map = torch.zeros(num_units, dtype=torch.int32, device="cuda")
    places = torch.arange(1, len(units) + 1, dtype=torch.int32, device="cuda")
    unit_map[units] = places * 65536 + reference_recent.EVERY_TOKEN
    return recent, unit_map


def last_units(shape: Shape, table: Tensor, count: int) -> Tensor:
    """The last units of every request, [batch * count] int64; fewer where contexts are shorter."""
    per_block = shape.block_size // UNIT_TOKENS
    end = -(-shape.context // UNIT_TOKENS)
    units = torch.arange(max(0, end - count), end, device=table.device)
    return (table[:, units // per_block].long() * per_block + units % per_block).flatten()


def last_slots(shape: Shape, table: Tensor) -> Tensor:
    """Slot of every request's last token, [batch] int64."""
    block, offset = divmod(shape.context - 1, shape.block_size)
    return table[:, block].long() * shape.block_size + offset


def last_positions(shape: Shape) -> Tensor:
    """Position of every request's last token, [batch] int64."""
    return torch.full((shape.batch,), shape.context - 1, device="cuda", dtype=torch.int64)


def bench_turboquant(
    shape: Shape, window_units: int = WINDOW_UNITS, *, stores: bool = False
) -> float:
    """Microseconds of paged_attention.

    Args:
        shape: The step.
        window_units: Units at the end of every request that have 8-bit copies; 0 for none.
        stores: Whether it stores the last token of every request first, as a step does.
    """
    copies = copies_needed(shape.slots_bytes)
    cache = random_cache(shape, shape.pool_blocks(copies))
    query, frame = random_rows(shape, shape.heads), random_frame(shape)
    lengths, starts = lengths_and_starts(shape)
    out, lse = torch.empty_like(query), torch.empty(shape.heads, shape.batch, device="cuda")
    tickets = torch.zeros(shape.batch * shape.kv_heads, device="cuda", dtype=torch.int32)
    rest = (lengths, starts, frame, shape.head_dim**-0.5, True, out, lse, None, tickets)
    tables = shuffled_tables(shape, copies)
    if window_units:
        units = torch.cat([last_units(shape, table, window_units) for table in tables])
        num_units = cache.shape[0] * shape.block_size // UNIT_TOKENS
        rest += (*random_copies(shape, num_units, units), window_units)
    steps = [partial(ops.paged_attention, query, cache, table, *rest) for table in tables]
    if stores:
        names = ("key", "value", "positions")
        rows = (random_rows(shape, shape.kv_heads) for _ in range(2))
        new = dict(zip(names, (*rows, last_positions(shape)), strict=True))
        steps = [
            partial(step, slot_mapping=last_slots(shape, table), **new)
            for step, table in zip(steps, tables, strict=True)
        ]
    return time_graph_us(steps)


def bench_store(shape: Shape) -> float:
    """Microseconds of store for one token of every request, in a pool as large as for decode.

    Every step writes blocks of its own, and 8-bit copies, which are not in the L2 cache; keys and
    values are, as when the operator before has just written them.
    """
    copies = copies_needed(shape.slots_bytes)
    num_blocks = max(shape.pool_blocks(copies), STORE_STEPS * shape.batch)
    cache, frame = random_cache(shape, num_blocks), random_frame(shape)
    key, value = (random_rows(shape, shape.kv_heads) for _ in range(2))
    blocks = torch.randperm(num_blocks, device="cuda")[: STORE_STEPS * shape.batch]
    slots = blocks * shape.block_size + (shape.context - 1) % shape.block_size
    num_units = num_blocks * shape.block_size // UNIT_TOKENS
    rest = (*random_copies(shape, num_units, slots // UNIT_TOKENS), last_positions(shape))
    mappings = slots.view(STORE_STEPS, shape.batch)
    return time_graph_us(
        [partial(ops.store, key, value, frame, cache, mapping, *rest) for mapping in mappings]
    )


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
