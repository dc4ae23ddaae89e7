"""Per-step attention metadata: which query rows read the cache, and which fresh tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.config import get_layers_from_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills

from vllm_turboquant import CACHE_DTYPE
from vllm_turboquant.fresh import FreshRequests
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.options import read_options
from vllm_turboquant.recent import group_pool
from vllm_turboquant.tiles import TILE_TOKENS, Piece, Tile, make_tile, plan_tiles
from vllm_turboquant.window_tiles import WindowTile, make_window_tile, plan_window_tiles

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import AttentionSpec

logger = init_logger("vllm.turboquant")


@dataclass(frozen=True)
class PagedRequests:
    """Consecutive requests and the cached tokens their query rows attend to.

    Attributes:
        query_start_loc: [num_reqs + 1] int32, first query row of each request, counted from the
            first row of these requests.
        seq_lens: [num_reqs] int32, cached tokens to read.
        block_table: [num_reqs, max_blocks] int32.
    """

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor


@dataclass(frozen=True)
class PrefillRequests:
    """Requests that do not decode: in general those with more than one row in this step.

    Attributes:
        fresh: Their tokens of this step.
        fresh_tile: The same tokens in the cache, where they are to be read back from codes; None
            where they attend to each other exactly.
        context: Their earlier tokens, read from codes and copies on CPUs; None if there are none.
        context_tiles: The same on GPUs, reconstructed; from codes only beside a ``fresh_tile``.
            Where all layers have a sliding window, none.
        window_tiles: By sliding window, what layers that have it read of the context instead.
        cached: All their tokens, where CPUs are to read everything from codes; None where they
            attend to each other exactly. There is no ``context`` then.
    """

    fresh: FreshRequests
    fresh_tile: Tile | None = None
    context: PagedRequests | None = None
    context_tiles: tuple[Tile, ...] = ()
    window_tiles: Mapping[int, tuple[WindowTile, ...]] = field(default_factory=dict)
    cached: PagedRequests | None = None


@dataclass
class TurboQuant3Metadata(AttentionMetadata):
    """How one step's query rows attend. Requests that decode come first:

        rows    |d0|d1|d2|p0 p0 p0 p0|p1 p1 p1|padding
                 decode   prefill

    A decode row reads every token, its own included, from the cache: from codes or, in its window,
    from 8-bit copies. A prefill row reads the tokens computed in earlier steps (its context) from
    the cache and those of this step from the model's own keys and values; the two results are
    merged by log-sum-exp. With a sliding window, on GPUs, the rows that see any of their context
    get both at once instead; see ``window_tiles.py``. Without ``exact_prefill``, a prefill row
    reads everything from codes: copies are those of its request's window, which ends at the last
    row.

    Attributes:
        slot_mapping: [>= num_tokens] int64, where this step's tokens are stored; -1 for padding.
        positions: [>= num_tokens] int64, which token of its request each is; of padding, anything.
        num_decode_tokens: Rows of the decode requests.
        decode: Decode requests over all their tokens; None without any.
        prefill: The other requests; None without any.
    """

    slot_mapping: Tensor
    positions: Tensor
    num_decode_tokens: int
    decode: PagedRequests | None
    prefill: PrefillRequests | None


class TurboQuant3MetadataBuilder(AttentionMetadataBuilder[TurboQuant3Metadata]):
    """Builds the metadata of a KV cache group."""

    reorder_batch_threshold: int = 1
    # Rows of one token each are captured; batches with longer ones are planned on the host.
    _cudagraph_support = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.options = read_options(vllm_config)
        layers = vllm_config.compilation_config.static_forward_context
        self.layers = [layers[name] for name in layer_names]
        # Layers without and with a window share a group where vLLM's hybrid cache manager is off.
        self.sliding_windows = sorted({layer.impl.sliding_window for layer in self.layers})
        _log_start(vllm_config, kv_cache_spec.head_size)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> TurboQuant3Metadata:
        """Split the batch, see ``TurboQuant3Metadata``, and assign places for copies.

        vLLM builds once a step, before any of its tokens is stored and outside of graphs. Requests
        of its dummy batches own nothing but the null block, which no other one reads.
        """
        batch = common_attn_metadata
        pool = group_pool(self.layers, self.options.window_units)
        if pool:
            pool.assign(
                batch.block_table_tensor[: batch.num_reqs],
                batch.seq_lens[: batch.num_reqs],
                batch.query_start_loc[: batch.num_reqs + 1],
            )
        num_decodes, num_prefills, num_decode_tokens, _ = split_decodes_and_prefills(
            batch, decode_threshold=self.reorder_batch_threshold
        )
        decode = prefill = None
        if num_decodes:
            decode = PagedRequests(
                batch.query_start_loc[: num_decodes + 1],
                batch.seq_lens[:num_decodes],
                batch.block_table_tensor[:num_decodes],
            )
        if num_prefills:
            prefill = self._build_prefill(batch, num_decodes)
        positions = positions_of(batch) if batch.positions is None else batch.positions
        return TurboQuant3Metadata(
            batch.slot_mapping, positions, num_decode_tokens, decode, prefill
        )

    def _build_prefill(self, batch: CommonAttentionMetadata, first_req: int) -> PrefillRequests:
        """Describe the requests from ``first_req`` on."""
        starts = batch.query_start_loc_cpu[first_req : batch.num_reqs + 1].tolist()
        query_start_loc = batch.query_start_loc[first_req : batch.num_reqs + 1] - starts[0]
        fresh = FreshRequests(
            [(first - starts[0], last - starts[0]) for first, last in pairwise(starts)],
            query_start_loc,
        )
        block_table = batch.block_table_tensor[first_req : batch.num_reqs]
        if self.device.type == "cpu" and not self.options.exact_prefill:
            lengths = batch.seq_lens[first_req : batch.num_reqs]
            cached = PagedRequests(query_start_loc, lengths, block_table)
            return PrefillRequests(fresh, cached=cached)
        # On the host, so that the device need not be waited for. Exact but for requests that verify
        # drafts under asynchronous scheduling, which are refused.
        seq_lens = batch.seq_lens_cpu_upper_bound
        if seq_lens is None:
            seq_lens = batch.seq_lens.cpu()
        query_lens = [last - first for first, last in fresh.bounds]
        context_lens = [
            seq_len - query_len
            for seq_len, query_len in zip(
                seq_lens[first_req : batch.num_reqs].tolist(), query_lens, strict=True
            )
        ]
        if self.device.type == "cpu":
            context = None
            if any(context_lens):
                lengths = torch.tensor(context_lens, dtype=torch.int32)
                context = PagedRequests(query_start_loc, lengths, block_table)
            return PrefillRequests(fresh, context=context)
        tiles: list[Tile] = []
        window_tiles = {}
        for window in self.sliding_windows:
            if window:
                plan = plan_window_tiles(context_lens, query_lens, window, TILE_TOKENS)
                window_tiles[window] = tuple(
                    make_window_tile(pieces, fresh, block_table) for pieces in plan
                )
            else:
                tiles += [
                    make_tile(pieces, fresh, block_table)
                    for pieces in plan_tiles(context_lens, TILE_TOKENS)
                ]
        fresh_tile = None
        if not self.options.exact_prefill:
            pieces = [
                Piece(req, *span)
                for req, span in enumerate(zip(context_lens, query_lens, strict=True))
            ]
            fresh_tile = make_tile(pieces, fresh, block_table)
        return PrefillRequests(
            fresh, fresh_tile, context_tiles=tuple(tiles), window_tiles=window_tiles
        )


def positions_of(batch: CommonAttentionMetadata) -> Tensor:
    """Which token of its request each is, where vLLM does not say.

    Returns:
        [len(slot_mapping)] int64.
    """
    token = torch.arange(len(batch.slot_mapping), device=batch.seq_lens.device)
    ends = batch.query_start_loc[1 : batch.num_reqs + 1]
    req = torch.searchsorted(ends, token, right=True, out_int32=False)
    req = req.clamp(max=batch.num_reqs - 1)
    return batch.seq_lens[req] + token - ends[req]


def _log_start(vllm_config: VllmConfig, head_dim: int) -> None:
    """Say once what a slot takes and how many of the model's attention layers are compressed."""
    layers = [
        layer
        for layer in get_layers_from_vllm_config(vllm_config, Attention).values()
        if layer.attn_type == AttentionType.DECODER
    ]
    num_ours = sum(layer.kv_cache_dtype == CACHE_DTYPE for layer in layers)
    layout = SlotLayout(head_dim)
    element_bytes = vllm_config.model_config.dtype.itemsize
    coverage = "every one" if num_ours == len(layers) else f"only {num_ours}"
    logger.info_once(
        "%s KV cache: %d bytes per token and KV head instead of %d, %.2fx smaller, in %s of "
        "the model's %d attention layers",
        CACHE_DTYPE,
        layout.slot_bytes,
        2 * head_dim * element_bytes,
        layout.compression(element_bytes),
        coverage,
        len(layers),
    )
