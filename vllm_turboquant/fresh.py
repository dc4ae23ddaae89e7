"""Exact attention among the tokens of one step, and its merge with attention to earlier ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FreshRequests:
    """Consecutive requests whose tokens of this step attend to each other.

    Attributes:
        bounds: First and last + 1 row of each request, counted from the first row of them all.
        query_start_loc: [num_reqs + 1] int32, the same on the device.
    """

    bounds: list[tuple[int, int]]
    query_start_loc: Tensor

    @property
    def num_tokens(self) -> int:
        """Rows of all requests."""
        return self.bounds[-1][1]

    @property
    def max_query_len(self) -> int:
        """Rows of the longest request."""
        return max(last - first for first, last in self.bounds)


def fresh_attention(
    query: Tensor, key: Tensor, value: Tensor, requests: FreshRequests, scale: float
) -> tuple[Tensor, Tensor]:
    """Causal self-attention of every request.

    Args:
        query: [num_tokens, num_heads, head_dim].
        key: [num_tokens, num_kv_heads, head_dim].
        value: As ``key``.
        requests: Where each request's rows are.
        scale: Softmax scale.

    Returns:
        Output [num_tokens, num_heads, head_dim] in ``query``'s dtype and log-sum-exp
        [num_heads, num_tokens] float32, natural logarithm.
    """
    if query.is_cuda:
        return _fresh_attention_cuda(query, key, value, requests, scale)
    outs, lses = [], []
    for first, last in requests.bounds:
        # The operator behind scaled_dot_product_attention, which keeps the lse to itself.
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(x[first:last].transpose(0, 1)[None] for x in (query, key, value)),
            0.0,
            True,
            scale=scale,
        )
        outs.append(out[0].transpose(0, 1))
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=1)


def _fresh_attention_cuda(
    query: Tensor, key: Tensor, value: Tensor, requests: FreshRequests, scale: float
) -> tuple[Tensor, Tensor]:
    """The same through the FlashAttention that vLLM brings along."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    out, lse = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        max_seqlen_q=requests.max_query_len,
        cu_seqlens_q=requests.query_start_loc,
        max_seqlen_k=requests.max_query_len,
        cu_seqlens_k=requests.query_start_loc,
        softmax_scale=scale,
        causal=True,
        return_softmax_lse=True,
        fa_version=get_flash_attn_version(head_size=query.shape[-1]),
    )
    return out, lse


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> Tensor:
    """Combine attention over two disjoint sets of keys.

    Args:
        out: [num_tokens, num_heads, head_dim], over the first set.
        lse: [num_heads, num_tokens], finite.
        other: As ``out``, float32, over the second set; 0 where ``other_lse`` is -inf.
        other_lse: As ``lse``, -inf where the second set is empty.

    Returns:
        [num_tokens, num_heads, head_dim] float32.
    """
    weight = torch.sigmoid(other_lse - lse).T[..., None]
    return torch.lerp(out.float(), other, weight)
