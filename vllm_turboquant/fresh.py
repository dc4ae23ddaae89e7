"""Exact attention among the tokens of one step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vllm_turboquant.reference import visible_tokens

#: On CPUs, rows that attend together where there is a sliding window, at least.
WINDOW_ROWS = 256


@dataclass(frozen=True)
class FreshRequests:
    """Consecutive requests whose tokens of this step attend to each other.

    Attributes:
        bounds: First and last + 1 row of each request, counted from the first row of them all.
        query_start_loc: [num_reqs + 1] int32, the same on the device.
    """

    bounds: list[tuple[int, int]]
    query_start_loc: Tensor

    @staticmethod
    def of_lengths(lengths: Sequence[int], device: torch.device) -> FreshRequests:
        """Requests of the given numbers of rows, one after the other."""
        starts = [0, *accumulate(lengths)]
        query_start_loc = torch.tensor(starts, dtype=torch.int32, device=device)
        return FreshRequests(list(pairwise(starts)), query_start_loc)

    @property
    def num_tokens(self) -> int:
        """Rows of all requests."""
        return self.bounds[-1][1]

    @property
    def max_query_len(self) -> int:
        """Rows of the longest request."""
        return max(last - first for first, last in self.bounds)


def fresh_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    requests: FreshRequests,
    scale: float,
    out: Tensor,
    sliding_window: int = 0,
) -> Tensor:
    """Causal self-attention of every request.

    Args:
        query: [num_tokens, num_heads, head_dim].
        key: [num_tokens, num_kv_heads, head_dim].
        value: As ``key``.
        requests: Where each request's rows are.
        scale: Softmax scale.
        out: As ``query``; written.
        sliding_window: Tokens, its own included, that a row sees at most; 0 for no limit.

    Returns:
        Log-sum-exp [num_heads, num_tokens] float32, natural logarithm.
    """
    if query.is_cuda:
        rows = (requests.query_start_loc, requests.max_query_len)
        return flash_attention(
            query, key, value, rows, rows, scale, out, causal=True, sliding_window=sliding_window
        )
    lses = []
    for first, last in requests.bounds:
        step = max(sliding_window, WINDOW_ROWS) if sliding_window else max(last - first, 1)
        for begin in range(first, last, step):
            end = min(begin + step, last)
            start = max(first, begin - sliding_window + 1) if sliding_window else first
            part, lse = _attend_on_cpu(
                query[begin:end], key[start:end], value[start:end], scale, sliding_window
            )
            out[begin:end] = part
            lses.append(lse)
    return torch.cat(lses, dim=1)


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, scale: float, sliding_window: int
) -> tuple[Tensor, Tensor]:
    """Output and lse of the last rows of a sequence."""
    mask = None
    # The operator's causal mask is for as many rows as keys.
    if len(query) < len(key) or 0 < sliding_window < len(key):
        visible = visible_tokens(len(query), len(key), sliding_window=sliding_window)
        mask = torch.where(visible, 0.0, -torch.inf).to(query.dtype)
    # The operator behind scaled_dot_product_attention, which keeps the lse to itself.
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(0, 1)[None] for x in (query, key, value)),
        0.0,
        mask is None,
        attn_mask=mask,
        scale=scale,
    )
    return out[0].transpose(0, 1), lse[0]


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: tuple[Tensor, int],
    keys: tuple[Tensor, int],
    scale: float,
    out: Tensor,
    *,
    causal: bool,
    sliding_window: int = 0,
) -> Tensor:
    """Attention of several sequences through the FlashAttention that vLLM brings along, on GPUs.

    Args:
        query: [num_tokens, num_heads, head_dim].
        key: [num_keys, num_kv_heads, head_dim].
        value: As ``key``.
        queries: First row of each sequence, [num_seqs + 1] int32, and the most rows of one.
        keys: As ``queries``, of ``key``.
        scale: Softmax scale.
        out: As ``query``; written.
        causal: Whether a sequence's last query row sees all its keys, the one before it one less.
        sliding_window: As for ``fresh_attention``; for causal attention only.

    Returns:
        As ``fresh_attention``; infinite for a row that sees nothing.
    """
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    _, lse = flash_attn_varlen_func(
        q=query,
        k=key,
        v=value,
        cu_seqlens_q=queries[0],
        max_seqlen_q=queries[1],
        cu_seqlens_k=keys[0],
        max_seqlen_k=keys[1],
        softmax_scale=scale,
        causal=causal,
        window_size=[sliding_window - 1, 0] if sliding_window else None,
        return_softmax_lse=True,
        out=out,
        fa_version=flash_attention_version(query.shape[-1]),
    )
    return lse


@cache
def flash_attention_version(head_dim: int) -> int | None:
    """The version that vLLM takes for a head size on this GPU.

    NOTE: First called while a model is built: later there is no configuration for vLLM to ask.
    """
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    return get_flash_attn_version(head_size=head_dim)
