"""Centers of spans: what RoPE makes of the part of keys that is the same at all positions.

A key is its position's rotation of what it was before RoPE, k(p) = b(p) R(p). Of these b, the mean
is found by least squares from keys at a few positions; the center of any span of positions is then
the mean of its rotations, although no key was measured there. What R is, the model's own module
says, of which nothing is assumed but that it is linear.

Source: RoPE, arXiv 2104.09864, eq. 15.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.rotary_embedding import MRotaryEmbedding
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbeddingBase

from vllm_turboquant.frame import num_spans
from vllm_turboquant.layout import SPAN_TOKENS

#: Positions of a span whose rotations are averaged: one of every 16, at another place in each, so
#: that no frequency sees them in step.
SAMPLED = torch.arange(0, SPAN_TOKENS, 16) + torch.arange(SPAN_TOKENS // 16) * 7 % 16
#: Spans whose rotations are computed at a time, which take head_dim^2 elements a position.
SPANS_AT_ONCE = 4


@dataclass(frozen=True)
class Rotations:
    """What one module does at the positions that were measured, and in every span on average.

    Attributes:
        positions: [num_tokens] int64, where keys are measured.
        measured: [num_tokens, head_dim, head_dim] float32; a key before RoPE times this is the key.
        gram: [head_dim, head_dim] float64, sum of ``measured`` times its transpose.
        spans: [num_spans, head_dim, head_dim] float32, means.
    """

    positions: Tensor
    measured: Tensor
    gram: Tensor
    spans: Tensor

    @staticmethod
    def of(
        rotary: nn.Module | None,
        head_dim: int,
        dtype: torch.dtype,
        positions: Tensor,
        max_model_len: int,
    ) -> Rotations | None:
        """Ask a module of the model.

        Args:
            rotary: What the attention layer's parent calls ``rotary_emb``, if it has any.
            head_dim: Of the layer's keys.
            dtype: Of the model.
            positions: [num_tokens] int64, where keys are measured.
            max_model_len: Tokens of the longest context.

        Returns:
            None where keys do not depend on one position each, or nothing is known about how.
        """
        if not isinstance(rotary, RotaryEmbeddingBase) or isinstance(rotary, MRotaryEmbedding):
            return None
        if rotary.head_size != head_dim:
            return None

        def matrices(at: Tensor) -> Tensor:
            unit = torch.eye(head_dim, dtype=dtype, device=at.device)
            query = unit.repeat(len(at), 1, 1).flatten(1)
            rotated, _ = rotary(at, query, query[:, :head_dim].clone())
            return rotated.view(len(at), head_dim, head_dim).float()

        starts = SPAN_TOKENS * torch.arange(num_spans(max_model_len))
        sampled = (starts[:, None] + SAMPLED).clamp(max=max_model_len - 1).to(positions.device)
        means = [
            matrices(part.flatten()).unflatten(0, part.shape).mean(dim=1)
            for part in sampled.split(SPANS_AT_ONCE)
        ]
        measured = matrices(positions)
        columns = measured.transpose(0, 1).flatten(1).double()
        return Rotations(positions, measured, columns @ columns.T, torch.cat(means))

    def centers(self, key: Tensor) -> Tensor:
        """Centers of all spans.

        Args:
            key: [num_tokens, num_kv_heads, head_dim], after RoPE.

        Returns:
            [num_kv_heads, num_spans, head_dim] float32.
        """
        # The b that makes sum |k - b R|^2 smallest.
        moments = torch.einsum("thj,tij->hi", key.float(), self.measured)
        mean = torch.linalg.solve(self.gram, moments.T.double()).T
        return torch.einsum("hi,sij->hsj", mean.float(), self.spans)
