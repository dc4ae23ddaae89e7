"""The attention implementation: compress on write, attend to codes and recent copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_turboquant import CACHE_DTYPE, ops
from vllm_turboquant.errors import UnsupportedError
from vllm_turboquant.frame import CENTER, plain_frame, relative_frame
from vllm_turboquant.fresh import FreshRequests, flash_attention_version, fresh_attention
from vllm_turboquant.metadata import PagedRequests, PrefillRequests, TurboQuant3Metadata
from vllm_turboquant.recent import RecentPool
from vllm_turboquant.scratch import Scratch
from vllm_turboquant.tiles import CachedTokens, attend_tile, merge_into, reconstruct
from vllm_turboquant.window_tiles import WindowTile, attend_window_tile

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer


#: Query rows whose scores with the center are computed at once.
CENTER_ROWS = 512


class TurboQuant3Impl(AttentionImpl[TurboQuant3Metadata]):
    """Attention of one layer.

    Attributes:
        sliding_window: Tokens, its own included, that a row sees at most; 0 for no limit.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32, what keys are coded in. Set
            before the first token is stored and constant from then on.
        relative_frame: The same for keys less their center.
        observe: Set while frames are measured: receives queries [num_tokens, num_heads, head_dim]
            and keys [num_tokens, num_kv_heads, head_dim] of one sequence, in a run without a cache.
        recent: [num_places, num_kv_heads, unit_bytes] uint8, 8-bit copies of recent tokens; None
            where there are none.
        pool: Says which tokens have a copy; None without ``recent``, and before there is a cache.

    Raises:
        UnsupportedError: The layer needs something that is not supported; one line names it.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        **extra: Any,
    ) -> None:
        for needed, feature in (
            (alibi_slopes is not None, "ALiBi is not supported, only rotary embeddings are"),
            (bool(logits_soft_cap), "a logits soft cap is not supported yet"),
            (kv_sharing_target_layer_name is not None, "KV sharing is not supported yet"),
            *((value is not None, f"{name} is not supported yet") for name, value in extra.items()),
        ):
            if needed:
                raise UnsupportedError(feature)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sliding_window = sliding_window or 0
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.key_frame = plain_frame(torch.zeros(self.num_kv_heads, head_size))
        # Keys that only meet each other, or scores without the center's share, do without the
        # center: small numbers lose least in the model's dtype.
        self.relative_frame = relative_frame(self.key_frame)
        self.observe: Callable[[Tensor, Tensor], None] | None = None
        self.recent: Tensor | None = None
        self.pool: RecentPool | None = None
        self.scratch: Scratch | None = None
        if self.key_frame.is_cuda:
            flash_attention_version(head_size)
            self.scratch = Scratch.of_layer(
                get_current_vllm_config(),
                num_heads,
                self.num_kv_heads,
                head_size,
                self.sliding_window,
            )

    def buffers(self) -> dict[str, Tensor]:
        """What has to keep its contents, by name."""
        buffers = {"key_frame": self.key_frame, "relative_frame": self.relative_frame}
        return buffers | ({"tickets": self.scratch.tickets} if self.scratch else {})

    def set_key_frame(self, key_frame: Tensor) -> None:
        """Fix the frame of all keys to come: [num_kv_heads, 3 + num_spans, head_dim].

        In place where the frame has been measured before, which graphs have seen: it has as many
        spans, whatever the weights.
        """
        relative = relative_frame(key_frame)
        if key_frame.shape == self.key_frame.shape:
            self.key_frame.copy_(key_frame)
            self.relative_frame.copy_(relative)
        else:
            self.key_frame, self.relative_frame = key_frame, relative

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: TurboQuant3Metadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Store this step's keys and values, then attend; ``TurboQuant3Metadata`` says to what.

        Every token is stored before any is read: a prefix that is new in this step may be shared.

        Args:
            layer: Not used.
            query: [num_tokens, num_heads, head_dim], after RoPE.
            key: [num_tokens, num_kv_heads, head_dim], after RoPE.
            value: As ``key``.
            kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
            attn_metadata: None in runs without a cache: those in which vLLM measures memory, and
                the one that measures key frames.
            output: [num_tokens, num_heads, head_dim], written in place.
            output_scale: None; this implementation offers no fused output quantization.
            output_block_scale: As ``output_scale``.

        Returns:
            ``output``.
        """
        if attn_metadata is None:
            return self._forward_without_cache(query, key, value, output)
        decode, prefill = attn_metadata.decode, attn_metadata.prefill
        new_tokens: tuple[Tensor, ...] | None
        new_tokens = key, value, attn_metadata.slot_mapping, attn_metadata.positions
        if prefill is not None:
            self._store(*new_tokens, kv_cache)
            new_tokens = None
        rows = attn_metadata.num_decode_tokens
        if decode is not None:
            self._attend_cache(
                query[:rows],
                kv_cache,
                decode,
                output[:rows],
                self.pool,
                causal=True,
                new_tokens=new_tokens,
            )
        if prefill is not None:
            part = slice(rows, rows + prefill.fresh.num_tokens)
            self._prefill(query[part], key[part], value[part], kv_cache, prefill, output[part])
        return output

    def _forward_without_cache(
        self, query: Tensor, key: Tensor, value: Tensor, output: Tensor
    ) -> Tensor:
        """Give nothing, or, while observed, exact attention over one sequence."""
        if self.observe is None:
            if self.scratch:
                self.scratch.reserve()
            return output.zero_()
        self.observe(query, key)
        sequence = FreshRequests.of_lengths([len(query)], query.device)
        fresh_attention(query, key, value, sequence, self.scale, output, self.sliding_window)
        return output

    def _store(
        self,
        key: Tensor,
        value: Tensor,
        slot_mapping: Tensor,
        positions: Tensor,
        kv_cache: Tensor,
    ) -> None:
        """Compress keys and values into their slots, and copy the newest."""
        recent, unit_map = (self.recent, self.pool.unit_map) if self.pool else (None, None)
        ops.store(key, value, self.key_frame, kv_cache, slot_mapping, recent, unit_map, positions)

    def _prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        prefill: PrefillRequests,
        output: Tensor,
    ) -> None:
        """Attend to the tokens of this step, then to earlier ones, and merge."""
        if prefill.cached:
            self._attend_cache(query, kv_cache, prefill.cached, output, None, causal=True)
            return
        fresh_tile = prefill.fresh_tile
        if fresh_tile:
            key, value = self._reconstruct(kv_cache, fresh_tile, None)
        lse = fresh_attention(
            query, key, value, prefill.fresh, self.scale, output, self.sliding_window
        )
        pool = None if fresh_tile else self.pool
        if self.sliding_window in prefill.window_tiles:
            own = None if fresh_tile else (key, value)
            for window_tile in prefill.window_tiles[self.sliding_window]:
                self._attend_window_tile(query, own, kv_cache, window_tile, pool, output)
            return
        if prefill.context:
            earlier = torch.empty(query.shape, dtype=torch.float32, device=query.device)
            earlier_lse = self._attend_cache(
                query, kv_cache, prefill.context, earlier, self.pool, causal=False
            )
            merge_into(output, lse, slice(len(query)), earlier, earlier_lse)
        if prefill.context_tiles and not fresh_tile:
            lse -= self._center_scores(query)  # tiles hold keys without their center
        for tile in prefill.context_tiles:
            key, value = self._reconstruct(kv_cache, tile, pool)
            attend_tile(query, key, value, tile, self.scale, output, lse)

    def _attend_window_tile(
        self,
        query: Tensor,
        own: tuple[Tensor, Tensor] | None,
        kv_cache: Tensor,
        tile: WindowTile,
        pool: RecentPool | None,
        output: Tensor,
    ) -> None:
        """Attend the rows that see the end of a context to it and to this step's tokens.

        These are exact where ``own`` has the keys and values of all prefill rows, and otherwise as
        they can be read back.
        """
        tile_key, tile_value = self._reconstruct(kv_cache, tile, pool)
        if own is not None:
            key, value = (x[tile.rows] for x in own)
            relative = key.float() - self.key_frame[:, CENTER]  # as all keys of the tile are
            tile_key[tile.own], tile_value[tile.own] = relative.to(key.dtype), value
        attend_window_tile(
            query, tile_key, tile_value, tile, self.scale, self.sliding_window, output
        )

    def _reconstruct(
        self, kv_cache: Tensor, tile: CachedTokens, pool: RecentPool | None
    ) -> tuple[Tensor, Tensor]:
        """Read a tile back into scratch, keys less their center.

        Tokens are read from copies where ``pool`` has them.
        """
        assert self.scratch is not None, "tiles are planned on GPUs only"
        copies = (self.recent, pool.unit_map) if pool else ()
        return reconstruct(kv_cache, tile, self.relative_frame, self.scratch.tile(), *copies)

    def _center_scores(self, query: Tensor) -> Tensor:
        """What the center adds to every score of a row: [num_heads, num_tokens] float32."""
        center = self.scale * self.key_frame[:, CENTER].repeat_interleave(
            self.num_heads // self.num_kv_heads, dim=0
        )
        # A part at a time: the product takes four bytes a coordinate, which nobody has reserved.
        parts = [(part * center).sum(dim=-1) for part in query.split(CENTER_ROWS)]
        return torch.cat(parts).T

    def _attend_cache(
        self,
        query: Tensor,
        kv_cache: Tensor,
        requests: PagedRequests,
        output: Tensor,
        pool: RecentPool | None,
        *,
        causal: bool,
        new_tokens: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """Attend to cached tokens; fill ``output`` and return lse [num_heads, num_tokens].

        The last units of every request are read from copies where ``pool`` has them. Keys, values,
        slots and positions of ``new_tokens`` are stored first, with copies likewise.
        """
        key, value, slot_mapping, positions = new_tokens or (None,) * 4
        lse = torch.empty(self.num_heads, query.shape[0], dtype=torch.float32, device=query.device)
        ops.paged_attention(
            query,
            kv_cache,
            requests.block_table,
            requests.seq_lens,
            requests.query_start_loc,
            self.key_frame,
            self.scale,
            causal,
            output,
            lse,
            self.scratch.decode() if self.scratch else None,
            self.scratch.tickets if self.scratch else None,
            recent=self.recent if pool else None,
            unit_map=pool.unit_map if pool else None,
            window_units=pool.window_units if pool else 0,
            sliding_window=self.sliding_window,
            key=key,
            value=value,
            slot_mapping=slot_mapping,
            positions=positions,
        )
        return lse


def coded_layers(vllm_config: VllmConfig) -> dict[str, Attention]:
    """The model's attention layers that have this cache, by name.

    Raises:
        UnsupportedError: A layer brings an attention of its own, which does not know this cache.
    """
    layers = {
        name: layer
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items()
        if layer.kv_cache_dtype == CACHE_DTYPE
    }
    for name, layer in layers.items():
        if not isinstance(layer.impl, TurboQuant3Impl):
            raise UnsupportedError(
                f"the attention of {name} is {type(layer.impl).__name__}, which the model chose"
            )
    return layers


def implementation(layer: Attention) -> TurboQuant3Impl:
    """What a layer of ``coded_layers`` runs."""
    return cast(TurboQuant3Impl, layer.impl)
