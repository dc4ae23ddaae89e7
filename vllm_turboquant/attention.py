"""The attention implementation: compress on write, attend to codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_turboquant import ops
from vllm_turboquant.errors import UnsupportedError
from vllm_turboquant.fresh import FreshRequests, fresh_attention, merge
from vllm_turboquant.metadata import PagedRequests, TurboQuant3Metadata

if TYPE_CHECKING:
    from vllm.v1.attention.backend import AttentionLayer


class TurboQuant3Impl(AttentionImpl[TurboQuant3Metadata]):
    """Attention of one layer.

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
            (sliding_window is not None, "sliding-window layers are not supported yet"),
            (bool(logits_soft_cap), "a logits soft cap is not supported yet"),
            (kv_sharing_target_layer_name is not None, "KV sharing is not supported yet"),
            *((value is not None, f"{name} is not supported yet") for name, value in extra.items()),
        ):
            if needed:
                raise UnsupportedError(feature)
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.center = torch.zeros(self.num_kv_heads, head_size, dtype=torch.float32)

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Compress this step's keys and values into their slots.

        Args:
            layer: Not used.
            key: [>= num_tokens, num_kv_heads, head_dim], after RoPE.
            value: As ``key``.
            kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
            slot_mapping: [num_tokens] int64, -1 for padding.
        """
        ops.store(key, value, self.center, kv_cache, slot_mapping)

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
        """Attend; see ``TurboQuant3Metadata`` for which rows read what.

        Args:
            layer: Not used.
            query: [num_tokens, num_heads, head_dim], after RoPE.
            key: [num_tokens, num_kv_heads, head_dim].
            value: As ``key``.
            kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
            attn_metadata: None in vLLM's profiling runs.
            output: [num_tokens, num_heads, head_dim], written in place.
            output_scale: None; this implementation offers no fused output quantization.
            output_block_scale: As ``output_scale``.

        Returns:
            ``output``.
        """
        if attn_metadata is None:
            return output.zero_()
        rows = attn_metadata.num_decode_tokens
        if attn_metadata.decode is not None:
            self._attend_codes(
                query[:rows], kv_cache, attn_metadata.decode, output[:rows], causal=True
            )
        if attn_metadata.fresh is not None:
            prefill = slice(rows, rows + attn_metadata.fresh.num_tokens)
            self._prefill(
                query[prefill],
                key[prefill],
                value[prefill],
                kv_cache,
                attn_metadata.fresh,
                attn_metadata.context,
                output[prefill],
            )
        return output

    def _prefill(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        fresh: FreshRequests,
        context: PagedRequests | None,
        output: Tensor,
    ) -> None:
        """Attend to fresh tokens exactly and to context from codes, and merge."""
        out, lse = fresh_attention(query, key, value, fresh, self.scale)
        if context is not None:
            earlier = torch.empty(query.shape, dtype=torch.float32, device=query.device)
            earlier_lse = self._attend_codes(query, kv_cache, context, earlier, causal=False)
            out = merge(out, lse, earlier, earlier_lse)
        output.copy_(out)

    def _attend_codes(
        self,
        query: Tensor,
        kv_cache: Tensor,
        requests: PagedRequests,
        output: Tensor,
        *,
        causal: bool,
    ) -> Tensor:
        """Attend to cached tokens; fill ``output`` and return lse [num_heads, num_tokens]."""
        lse = torch.empty(self.num_heads, query.shape[0], dtype=torch.float32, device=query.device)
        ops.paged_attention(
            query,
            kv_cache,
            requests.block_table,
            requests.seq_lens,
            requests.query_start_loc,
            self.center,
            self.scale,
            causal,
            output,
            lse,
        )
        return lse
