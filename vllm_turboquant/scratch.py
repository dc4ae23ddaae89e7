"""Working memory on GPUs: one buffer that all layers share, from vLLM's workspace manager.

It is reserved in the runs in which vLLM measures how much memory is left for the cache, and does
not grow after graphs have been captured.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.v1.worker.workspace import current_workspace_manager

from vllm_turboquant import ops
from vllm_turboquant.options import read_options
from vllm_turboquant.tiles import TILE_TOKENS

if TYPE_CHECKING:
    from vllm.config import VllmConfig


@dataclass(frozen=True)
class Scratch:
    """What one layer needs, at most.

    Attributes:
        decode_bytes: For the partial results of decode rows.
        tile_shape: [num_tokens, num_kv_heads, head_dim] of a tile's keys, and of its values.
        dtype: Of these.
        tickets: [num_tickets] int32, zero between the layer's calls of ``ops.paged_attention``.
    """

    decode_bytes: int
    tile_shape: tuple[int, int, int]
    dtype: torch.dtype
    tickets: Tensor

    @staticmethod
    def of_layer(
        vllm_config: VllmConfig,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        sliding_window: int = 0,
    ) -> Scratch:
        """What a layer of these sizes needs in an engine of this configuration."""
        scheduler, model = vllm_config.scheduler_config, vllm_config.model_config
        tile_tokens = TILE_TOKENS
        if not read_options(vllm_config).exact_prefill:  # a step's own tokens are a tile, too
            tile_tokens = max(tile_tokens, scheduler.max_num_batched_tokens)
        # A window tile holds a request's part at once.
        tile_tokens = max(tile_tokens, min(2 * sliding_window, model.max_model_len))
        # Graphs are captured for padded batches.
        padded_rows = vllm_config.compilation_config.max_cudagraph_capture_size or 0
        most_rows = max(scheduler.max_num_seqs, padded_rows)
        # Block tables may be wider than the longest context.
        max_tokens = 2 * model.max_model_len
        decode_bytes = _decode_bytes(most_rows, num_heads, num_kv_heads, head_dim, max_tokens)
        tickets = torch.zeros(most_rows * num_kv_heads, dtype=torch.int32)
        return Scratch(decode_bytes, (tile_tokens, num_kv_heads, head_dim), model.dtype, tickets)

    def reserve(self) -> None:
        """Make the shared buffer as large as this layer needs."""
        self.decode()
        self.tile()

    def decode(self) -> Tensor:
        """[decode_bytes] uint8, valid until the next call for scratch."""
        (buffer,) = current_workspace_manager().get_simultaneous(
            ((self.decode_bytes,), torch.uint8)
        )
        return buffer

    def tile(self) -> tuple[Tensor, Tensor]:
        """Buffers for a tile's keys and values, valid until the next call for scratch."""
        key, value = current_workspace_manager().get_simultaneous(
            *2 * [(self.tile_shape, self.dtype)]
        )
        return key, value


@cache  # layers are alike
def _decode_bytes(
    most_rows: int, num_heads: int, num_kv_heads: int, head_dim: int, max_tokens: int
) -> int:
    """What any batch of up to ``most_rows`` decode rows needs."""
    return max(
        ops.paged_attention_scratch_bytes(rows, rows, num_heads, num_kv_heads, head_dim, max_tokens)
        for rows in range(1, most_rows + 1)
    )
