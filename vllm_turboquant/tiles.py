"""Prefill over cached tokens on GPUs: keys and values reconstructed in tiles of bounded size.

A prefill has many query rows for every cached token, so it pays to reconstruct keys and values once
and leave the rest to vLLM's FlashAttention. A tile holds the context of some consecutive requests,
or a part of it; its result is merged into what the rows have seen so far by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.attention.ops.merge_attn_states import merge_attn_states

from vllm_turboquant import ops
from vllm_turboquant.fresh import FreshRequests, flash_attention

#: Cached tokens of a tile: enough to keep the device busy, little beside a model's weights.
TILE_TOKENS = 16384


@dataclass(frozen=True)
class Piece:
    """Consecutive cached tokens of one request.

    Attributes:
        req: Which request.
        start: Its first token.
        length: How many, at least one.
    """

    req: int
    start: int
    length: int


@dataclass(frozen=True)
class CachedTokens:
    """Cached tokens of some requests that are reconstructed together, and who attends to them.

    Attributes:
        query_start_loc: [num_reqs + 1] int32, each request's first row of those that attend.
        block_table: [num_reqs, max_blocks] int32.
        seq_starts: [num_reqs] int32, first token of each request.
        cu_seq_lens: [num_reqs + 1] int32, first row of each request in the tile.
        num_tokens: Tokens of the tile.
        max_query_len: Query rows of the request that has most of them.
        max_seq_len: Tokens of the request that has most of them.
    """

    query_start_loc: Tensor
    block_table: Tensor
    seq_starts: Tensor
    cu_seq_lens: Tensor
    num_tokens: int
    max_query_len: int
    max_seq_len: int


@dataclass(frozen=True)
class Tile(CachedTokens):
    """A tile and all rows of its requests.

    Attributes:
        rows: Query rows of the tile's requests, counted from the first prefill row.
    """

    rows: slice


def plan_tiles(context_lens: Sequence[int], tile_tokens: int) -> list[list[Piece]]:
    """Pack contexts into as few tiles as possible, in the order of requests and tokens.

    Args:
        context_lens: Cached tokens of each request; 0 is allowed.
        tile_tokens: Most tokens of a tile, at least 1.

    Returns:
        Pieces of every tile, each with at least one.
    """
    tiles: list[list[Piece]] = []
    room = 0
    for req, context_len in enumerate(context_lens):
        start = 0
        while start < context_len:
            if room == 0:
                tiles.append([])
                room = tile_tokens
            length = min(room, context_len - start)
            tiles[-1].append(Piece(req, start, length))
            start, room = start + length, room - length
    return tiles


def make_tile(pieces: Sequence[Piece], fresh: FreshRequests, block_table: Tensor) -> Tile:
    """Describe one tile to the device, without waiting for it.

    Args:
        pieces: At most one of a request, in order of requests.
        fresh: Query rows of all prefill requests.
        block_table: [num_reqs, max_blocks] int32 of all prefill requests.
    """
    first, last = pieces[0].req, pieces[-1].req
    bounds = fresh.bounds[first : last + 1]
    rows = slice(bounds[0][0], bounds[-1][1])
    starts, lengths = [0] * len(bounds), [0] * len(bounds)
    for piece in pieces:
        starts[piece.req - first], lengths[piece.req - first] = piece.start, piece.length
    query_starts = [row - rows.start for row, _ in bounds] + [rows.stop - rows.start]
    parts = [query_starts, starts, [0, *accumulate(lengths)]]
    flat = async_tensor_h2d(
        [number for part in parts for number in part],
        device=block_table.device,
        dtype=torch.int32,
    )
    query_start_loc, seq_starts, cu_seq_lens = flat.split([len(part) for part in parts])
    return Tile(
        rows=rows,
        query_start_loc=query_start_loc,
        block_table=block_table[first : last + 1],
        seq_starts=seq_starts,
        cu_seq_lens=cu_seq_lens,
        num_tokens=sum(lengths),
        max_query_len=max(end - start for start, end in bounds),
        max_seq_len=max(lengths),
    )


def reconstruct(
    kv_cache: Tensor,
    tile: CachedTokens,
    key_frame: Tensor,
    buffers: tuple[Tensor, Tensor],
    recent: Tensor | None = None,
    unit_map: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Read a tile back from its codes and, where there are any, copies.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
        tile: Which tokens.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32.
        buffers: For keys and values, [>= num_tokens, num_kv_heads, head_dim].
        recent: [num_places, num_kv_heads, unit_bytes] uint8; None to read codes only.
        unit_map: [num_units] int32, given together with ``recent``.

    Returns:
        Keys and values, [num_tokens, num_kv_heads, head_dim], in ``buffers``.
    """
    key, value = (buffer[: tile.num_tokens] for buffer in buffers)
    ops.dequantize(
        kv_cache,
        tile.block_table,
        tile.seq_starts,
        tile.cu_seq_lens,
        key_frame,
        key,
        value,
        recent,
        unit_map,
    )
    return key, value


def attend_tile(
    query: Tensor, key: Tensor, value: Tensor, tile: Tile, scale: float, out: Tensor, lse: Tensor
) -> None:
    """Let the tile's rows also see its tokens.

    Args:
        query: [num_tokens, num_heads, head_dim], all prefill rows.
        key: [tile.num_tokens, num_kv_heads, head_dim], with the same center as those seen so far.
        value: As ``key``.
        tile: Which rows attend to which tokens.
        scale: Softmax scale.
        out: [num_tokens, num_heads, head_dim], what the rows have seen so far; updated.
        lse: [num_heads, num_tokens] float32, its log-sum-exp; updated.
    """
    tile_out = torch.empty_like(query[tile.rows])
    tile_lse = flash_attention(
        query[tile.rows],
        key,
        value,
        (tile.query_start_loc, tile.max_query_len),
        (tile.cu_seq_lens, tile.max_seq_len),
        scale,
        tile_out,
        causal=False,
    )
    merge_into(out, lse, tile.rows, tile_out, tile_lse)


def merge_into(out: Tensor, lse: Tensor, rows: slice, other: Tensor, other_lse: Tensor) -> None:
    """Combine attention of some rows over two disjoint sets of keys.

    Args:
        out: [num_tokens, num_heads, head_dim], over the first set; ``rows`` of it are updated.
        lse: [num_heads, num_tokens] float32, likewise.
        rows: Which rows ``other`` is about.
        other: As ``out[rows]``, over the second set.
        other_lse: As ``lse[:, rows]``, infinite where the second set is empty.
    """
    seen = lse[:, rows].contiguous()
    merged = torch.empty_like(seen)  # not in place: threads of one row read what others would write
    merge_attn_states(out[rows], other, other_lse, out[rows], seen, merged)
    lse[:, rows] = merged
