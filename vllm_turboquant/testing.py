"""Inputs and comparisons that tests and benchmarks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from vllm_turboquant import reference
from vllm_turboquant.frame import BALANCE, SINK, make_frame, near_origins
from vllm_turboquant.layout import SlotLayout

#: Stands in a block table behind a request's last block: reading it would leave every pool.
POISON_BLOCK = 2**30
#: Fills what nobody wrote; as a float16 scale it is NaN.
POISON_BYTE = 0xFF


class Store(Protocol):
    """``reference.store`` or ``ops.store``."""

    def __call__(
        self,
        key: Tensor,
        value: Tensor,
        key_frame: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        *,
        positions: Tensor | None,
    ) -> None:
        """Write the codes of tokens."""


@dataclass(frozen=True)
class PagedBatch:
    """Requests whose tokens are stored in shuffled blocks of a poisoned pool.

    Attributes:
        query: [num_tokens + spare rows of NaN, num_heads, head_dim].
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
        block_table: [num_reqs, max_blocks] int32.
        seq_lens: [num_reqs] int32.
        query_start_loc: [num_reqs + 1] int32.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32.
        slot_mapping: [sum(seq_lens)] int64, slots of all tokens, request by request.
        positions: [sum(seq_lens)] int64, which token of its request each is.
    """

    query: Tensor
    kv_cache: Tensor
    block_table: Tensor
    seq_lens: Tensor
    query_start_loc: Tensor
    key_frame: Tensor
    slot_mapping: Tensor
    positions: Tensor

    @property
    def num_tokens(self) -> int:
        """Query rows that belong to a request."""
        return int(self.query_start_loc[-1])

    @property
    def scale(self) -> float:
        """The usual softmax scale."""
        return float(self.query.shape[-1] ** -0.5)


def empty_cache(
    num_blocks: int, num_kv_heads: int, block_size: int, head_dim: int, *, head_major: bool = False
) -> Tensor:
    """A poisoned pool.

    Args:
        num_blocks: Blocks of the pool.
        num_kv_heads: KV heads.
        block_size: Tokens per block.
        head_dim: Head size.
        head_major: Store all blocks of a head together, so that strides are not those of a
            contiguous tensor.

    Returns:
        [num_blocks, num_kv_heads, block_size, slot_bytes] uint8.
    """
    region = (block_size, SlotLayout(head_dim).slot_bytes)
    if head_major:
        pool = torch.full((num_kv_heads, num_blocks, *region), POISON_BYTE, dtype=torch.uint8)
        return pool.transpose(0, 1)
    return torch.full((num_blocks, num_kv_heads, *region), POISON_BYTE, dtype=torch.uint8)


def random_frame(
    num_kv_heads: int, head_dim: int, generator: torch.Generator, num_spans: int = 0
) -> Tensor:
    """A frame with origins far apart, and coordinates stretched by up to 4."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(num_kv_heads, *shape, head_dim, generator=generator)

    fixed = 2 * normal(), 2 * normal(), normal().clamp(-2, 2).exp2()
    return make_frame(*fixed, 2 * normal(num_spans) if num_spans else None)


def make_batch(
    seq_lens: Sequence[int],
    query_lens: Sequence[int],
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    store: Store = reference.store,
    head_major: bool = False,
    num_spans: int = 2,
) -> PagedBatch:
    """Store random keys, a fifth of them around the sink, and values; draw random queries.

    Other keys lie around the center of their span.

    Args:
        seq_lens: Cached tokens of each request; 0 is allowed.
        query_lens: Query rows of each request.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Head size.
        block_size: Tokens per block.
        dtype: Of queries, keys and values.
        seed: Of everything random.
        store: What writes the codes.
        head_major: See ``empty_cache``.
        num_spans: Of the frame; longer requests have tokens past the last one.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    blocks_of = [-(-seq_len // block_size) for seq_len in seq_lens]
    num_blocks = sum(blocks_of) + 2
    kv_cache = empty_cache(num_blocks, num_kv_heads, block_size, head_dim, head_major=head_major)
    block_table = torch.full((len(seq_lens), max(blocks_of) + 1), POISON_BLOCK, dtype=torch.int32)
    free = torch.randperm(num_blocks, generator=generator).int()
    positions = torch.cat([torch.arange(seq_len) for seq_len in seq_lens])
    slots = [torch.empty(0, dtype=torch.int64)]
    for req, seq_len in enumerate(seq_lens):
        block_table[req, : blocks_of[req]], free = free[: blocks_of[req]], free[blocks_of[req] :]
        position = torch.arange(seq_len)
        block = block_table[req, position // block_size].long()
        slots.append(block * block_size + position % block_size)
    slot_mapping = torch.cat(slots)
    key_frame = random_frame(num_kv_heads, head_dim, generator, num_spans)
    at_sink = torch.rand(len(slot_mapping), 1, 1, generator=generator) < 0.2
    origin = torch.where(at_sink, key_frame[:, SINK], near_origins(key_frame, positions))
    key = origin + normal(slot_mapping.numel(), num_kv_heads, head_dim) / key_frame[:, BALANCE]
    value = normal(slot_mapping.numel(), num_kv_heads, head_dim)
    store(key.to(dtype), value.to(dtype), key_frame, kv_cache, slot_mapping, positions=positions)
    query = normal(sum(query_lens) + 3, num_heads, head_dim).to(dtype)
    query[sum(query_lens) :] = torch.nan
    query_start_loc = torch.tensor([0, *query_lens]).cumsum(0).int()
    return PagedBatch(
        query,
        kv_cache,
        block_table,
        torch.tensor(list(seq_lens), dtype=torch.int32),
        query_start_loc,
        key_frame,
        slot_mapping,
        positions,
    )


def relative_error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of ``want``, in float64; NaN if anything is NaN."""
    want = want.double()
    return float((got.double() - want).norm() / want.norm())


def assert_close(got: Tensor, want: Tensor, bound: float, what: str = "result") -> None:
    """Hold a relative error against a bound.

    Args:
        got: What a kernel computed.
        want: The reference, same shape.
        bound: Largest allowed ``relative_error``.
        what: Named in the message.

    Raises:
        AssertionError: With the error, the worst position and both values there.
    """
    error = relative_error(got, want)
    if error <= bound:
        return
    difference = (got.double() - want.double()).abs().nan_to_num(nan=torch.inf)
    worst = tuple(int(i) for i in torch.unravel_index(difference.argmax(), got.shape))
    raise AssertionError(
        f"{what}: relative error {error:.3e} > {bound:.1e}; worst at {worst}: "
        f"got {float(got[worst]):.6g}, want {float(want[worst]):.6g}"
    )
