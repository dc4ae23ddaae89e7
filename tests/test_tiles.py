"""Tiles cover every context once, in order, within their bounds."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_turboquant.fresh import FreshRequests
from vllm_turboquant.tiles import Piece, make_tile, plan_tiles

pytestmark = pytest.mark.vllm


@given(st.lists(st.integers(0, 300), max_size=8), st.integers(1, 200))
def test_plan_covers_contexts_in_order(context_lens: list[int], tile_tokens: int) -> None:
    tiles = plan_tiles(context_lens, tile_tokens)
    sizes = [sum(piece.length for piece in tile) for tile in tiles]
    assert all(size == tile_tokens for size in sizes[:-1])
    assert sum(sizes) == sum(context_lens)
    covered = [
        (piece.req, token)
        for tile in tiles
        for piece in tile
        for token in range(piece.start, piece.start + piece.length)
    ]
    assert covered == [(req, token) for req, n in enumerate(context_lens) for token in range(n)]
    assert all(len({piece.req for piece in tile}) == len(tile) for tile in tiles)


def test_tile_describes_its_requests_only() -> None:
    fresh = FreshRequests.of_lengths([5, 2, 7, 1], torch.device("cpu"))
    table = torch.arange(12, dtype=torch.int32).view(4, 3)
    tile = make_tile([Piece(1, 32, 10), Piece(3, 0, 4)], fresh, table)
    assert tile.rows == slice(5, 15)
    assert tile.query_start_loc.tolist() == [0, 2, 9, 10]
    assert tile.seq_starts.tolist() == [32, 0, 0]
    assert tile.cu_seq_lens.tolist() == [0, 10, 10, 14]
    assert torch.equal(tile.block_table, table[1:4])
    assert (tile.num_tokens, tile.max_query_len, tile.max_seq_len) == (14, 7, 10)
