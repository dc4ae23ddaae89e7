"""Window tiles hold what rows see of a context; attention over them is that to all tokens."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("vllm")
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vllm_turboquant.fresh import WINDOW_ROWS, FreshRequests, fresh_attention
from vllm_turboquant.window_tiles import WindowPiece, make_window_tile, plan_window_tiles

pytestmark = pytest.mark.vllm
LENGTHS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 60)), min_size=1, max_size=8)


def seen(position: int, sliding_window: int) -> set[int]:
    """Tokens that the row at a position sees."""
    return set(range(max(0, position - sliding_window + 1), position + 1))


@given(LENGTHS, st.integers(1, 80), st.integers(1, 400))
def test_plan_has_the_rows_that_see_a_context_and_what_they_see(
    lengths: list[tuple[int, int]], sliding_window: int, tile_tokens: int
) -> None:
    context_lens, query_lens = zip(*lengths, strict=True)
    tiles = plan_window_tiles(context_lens, query_lens, sliding_window, tile_tokens)
    pieces = [piece for tile in tiles for piece in tile]
    assert [piece.req for piece in pieces] == sorted({piece.req for piece in pieces})
    of_req = {piece.req: piece for piece in pieces}
    for req, (context, rows) in enumerate(lengths):
        sees_context = [
            row for row in range(rows) if min(seen(context + row, sliding_window)) < context
        ]
        piece = of_req.get(req, WindowPiece(req, context, 0, 0))
        assert list(range(piece.num_rows)) == sees_context
        tokens = set(range(piece.start, piece.start + piece.length))
        want = set().union(*(seen(context + row, sliding_window) for row in sees_context))
        assert tokens == want
    for tile in tiles:
        assert tile and (len(tile) == 1 or sum(piece.length for piece in tile) <= tile_tokens)
    for tile, following in pairwise(tiles):
        assert sum(piece.length for piece in [*tile, following[0]]) > tile_tokens


@given(LENGTHS, st.integers(2, 80), st.integers(1, 400))
def test_tile_describes_its_pieces(
    lengths: list[tuple[int, int]], sliding_window: int, tile_tokens: int
) -> None:
    context_lens, query_lens = zip(*lengths, strict=True)
    fresh = FreshRequests.of_lengths(query_lens, torch.device("cpu"))
    table = torch.arange(3 * len(lengths), dtype=torch.int32).view(-1, 3)
    for pieces in plan_window_tiles(context_lens, query_lens, sliding_window, tile_tokens):
        tile = make_window_tile(pieces, fresh, table)
        first, last = pieces[0].req, pieces[-1].req
        assert torch.equal(tile.block_table, table[first : last + 1])
        # A tile's request, and the position in it, of every row and token.
        rows, tokens = [], []
        for i, req in enumerate(range(first, last + 1)):
            own = tile.rows[tile.query_start_loc[i] : tile.query_start_loc[i + 1]].tolist()
            rows += [(req, context_lens[req] + row - fresh.bounds[req][0]) for row in own]
            assert all(fresh.bounds[req][0] <= row < fresh.bounds[req][1] for row in own)
            begin, end = tile.cu_seq_lens[i : i + 2].tolist()
            start = int(tile.seq_starts[i])
            tokens += [(req, start + j) for j in range(end - begin)]
        assert rows == [tokens[i] for i in tile.own.tolist()]
        assert rows == [
            (piece.req, context_lens[piece.req] + row)
            for piece in pieces
            for row in range(piece.num_rows)
        ]
        assert len(tokens) == tile.num_tokens == sum(piece.length for piece in pieces)
        assert tile.max_query_len == tile.query_start_loc.diff().max()
        assert tile.max_seq_len == tile.cu_seq_lens.diff().max()


def test_a_tile_skips_requests_without_a_piece() -> None:
    fresh = FreshRequests.of_lengths([5, 2, 7, 1], torch.device("cpu"))
    table = torch.arange(12, dtype=torch.int32).view(4, 3)
    (pieces,) = plan_window_tiles([0, 40, 0, 2], [5, 2, 7, 1], 4, 100)
    tile = make_window_tile(pieces, fresh, table)
    assert pieces == [WindowPiece(1, 37, 3, 2), WindowPiece(3, 0, 2, 1)]
    assert tile.query_start_loc.tolist() == [0, 2, 2, 3]
    assert tile.seq_starts.tolist() == [37, 0, 0]
    assert tile.cu_seq_lens.tolist() == [0, 5, 5, 8]
    assert tile.rows.tolist() == [5, 6, 14] and tile.own.tolist() == [3, 4, 7]


def attention(query: Tensor, key: Tensor, value: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Output and lse of one sequence in float64."""
    key, value = (x.double().repeat_interleave(2, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,thd->hqt", query.double(), key) / 8
    position = torch.arange(len(query))
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance < (window or len(query)))
    scores = scores.masked_fill(~visible, -torch.inf)
    return torch.einsum("hqt,thd->qhd", scores.softmax(dim=-1), value), scores.logsumexp(dim=-1)


@pytest.mark.parametrize("sliding_window", [0, 1, 5, 255, 300, 2000])
def test_fresh_rows_see_their_window(sliding_window: int) -> None:
    """Sequences that end within the first rows that attend together, with them, and past them."""
    lengths = [3, WINDOW_ROWS, WINDOW_ROWS + 1, 700]
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(sum(lengths), 4, 64, generator=generator)
    key, value = torch.randn(2, sum(lengths), 2, 64, generator=generator)
    requests = FreshRequests.of_lengths(lengths, torch.device("cpu"))
    out = torch.full_like(query, torch.nan)
    lse = fresh_attention(query, key, value, requests, 1 / 8, out, sliding_window)
    for first, last in requests.bounds:
        rows = slice(first, last)
        want, want_lse = attention(query[rows], key[rows], value[rows], sliding_window)
        torch.testing.assert_close(out[rows].double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse[:, rows].double(), want_lse, rtol=1e-5, atol=1e-5)
