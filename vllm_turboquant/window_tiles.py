"""Prefill over cached tokens on GPUs, of layers with a sliding window.

Of the rows of a request, only the first sliding_window - 1 see any earlier token, and only the last
sliding_window - 1 of these are seen:

    tokens     |earlier ... c0 c1 c2 c3|p0 p1 p2 p3|p4 p5 ...        sliding_window = 5
    row p0                  xx xx xx xx xx
    row p3                           xx xx xx xx xx
    row p4                              xx xx xx xx xx

A window tile holds what these rows see: the end of the context, reconstructed, and their own keys
and values. So their attention is complete, and takes the place of that to this step's tokens alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import torch
from torch import Tensor
from vllm.utils.torch_utils import async_tensor_h2d

from vllm_turboquant.fresh import FreshRequests, flash_attention
from vllm_turboquant.tiles import CachedTokens


@dataclass(frozen=True)
class WindowPiece:
    """The rows of one request that see its context, and what they see.

    Attributes:
        req: Which request.
        start: First cached token that a row sees.
        num_earlier: Tokens of the context from there on, at least one.
        num_rows: Rows, at least one.
    """

    req: int
    start: int
    num_earlier: int
    num_rows: int

    @property
    def length(self) -> int:
        """Tokens that the rows see together."""
        return self.num_earlier + self.num_rows


@dataclass(frozen=True)
class WindowTile(CachedTokens):
    """A tile and the rows that see the end of a context in it.

    Attributes:
        rows: [num_rows] int64, these rows, counted from the first prefill row.
        own: [num_rows] int64, where in the tile each row's own token is.
    """

    rows: Tensor
    own: Tensor


def plan_window_tiles(
    context_lens: Sequence[int], query_lens: Sequence[int], sliding_window: int, tile_tokens: int
) -> list[list[WindowPiece]]:
    """Pack what rows see of contexts, and themselves, into tiles, in the order of requests.

    Args:
        context_lens: Cached tokens of each request before this step; 0 is allowed.
        query_lens: Rows of each request.
        sliding_window: Tokens, its own included, that a row sees at most; at least 1.
        tile_tokens: Most tokens of a tile that has more than one request.

    Returns:
        Pieces of every tile, each with at least one, at most one of a request.
    """
    tiles: list[list[WindowPiece]] = []
    room = 0
    for req, (context_len, query_len) in enumerate(zip(context_lens, query_lens, strict=True)):
        num_earlier, num_rows = (min(n, sliding_window - 1) for n in (context_len, query_len))
        if not num_earlier or not num_rows:
            continue
        piece = WindowPiece(req, context_len - num_earlier, num_earlier, num_rows)
        if not tiles or piece.length > room:
            tiles.append([])
            room = tile_tokens
        tiles[-1].append(piece)
        room -= piece.length
    return tiles


def make_window_tile(
    pieces: Sequence[WindowPiece], fresh: FreshRequests, block_table: Tensor
) -> WindowTile:
    """Describe one tile to the device, without waiting for it.

    Args:
        pieces: At most one of a request, in order of requests.
        fresh: Query rows of all prefill requests.
        block_table: [num_reqs, max_blocks] int32 of all prefill requests.
    """
    first, last = pieces[0].req, pieces[-1].req
    of_req = {piece.req: piece for piece in pieces}
    # Requests between these that have no piece have neither rows nor tokens here.
    nothing = WindowPiece(-1, 0, 0, 0)
    every = [of_req.get(req, nothing) for req in range(first, last + 1)]
    query_starts = [0, *accumulate(piece.num_rows for piece in every)]
    token_starts = [0, *accumulate(piece.length for piece in every)]
    starts = [piece.start for piece in every]
    bounds = fresh.bounds[first : last + 1]
    rows = chain.from_iterable(
        range(row, row + piece.num_rows) for (row, _), piece in zip(bounds, every, strict=True)
    )
    own = chain.from_iterable(
        range(end - piece.num_rows, end) for end, piece in zip(token_starts[1:], every, strict=True)
    )
    device = block_table.device
    parts = [query_starts, starts, token_starts]
    flat = async_tensor_h2d([*chain.from_iterable(parts)], device=device, dtype=torch.int32)
    query_start_loc, seq_starts, cu_seq_lens = flat.split([len(part) for part in parts])
    indices = async_tensor_h2d([*rows, *own], device=device, dtype=torch.int64)
    return WindowTile(
        query_start_loc=query_start_loc,
        block_table=block_table[first : last + 1],
        seq_starts=seq_starts,
        cu_seq_lens=cu_seq_lens,
        num_tokens=token_starts[-1],
        max_query_len=max(piece.num_rows for piece in pieces),
        max_seq_len=max(piece.length for piece in pieces),
        rows=indices[: query_starts[-1]],
        own=indices[query_starts[-1] :],
    )


def attend_window_tile(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tile: WindowTile,
    scale: float,
    sliding_window: int,
    out: Tensor,
) -> None:
    """Replace what the tile's rows have seen by all that they see.

    Args:
        query: [num_tokens, num_heads, head_dim], all prefill rows.
        key: [tile.num_tokens, num_kv_heads, head_dim], of the tile.
        value: As ``key``.
        tile: Which rows attend to which tokens.
        scale: Softmax scale.
        sliding_window: Tokens, its own included, that a row sees at most.
        out: [num_tokens, num_heads, head_dim]; the tile's rows are written.
    """
    rows = query[tile.rows]
    tile_out = torch.empty_like(rows)
    flash_attention(
        rows,
        key,
        value,
        (tile.query_start_loc, tile.max_query_len),
        (tile.cu_seq_lens, tile.max_seq_len),
        scale,
        tile_out,
        causal=True,
        sliding_window=sliding_window,
    )
    out[tile.rows] = tile_out
