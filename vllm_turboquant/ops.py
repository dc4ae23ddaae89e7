"""The native operators ``torch.ops.turboquant.*``: loading, typed wrappers and fakes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor


def _load_cpu_library() -> str:
    """Load the library for this CPU; as for PyTorch, ATEN_CPU_CAPABILITY may choose another."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    variant = capability if capability in ("avx2", "avx512") else "default"
    if variant == "avx512" and not torch.cpu._is_vnni_supported():
        variant = "avx2"  # the AVX-512 kernels need VNNI, which the first CPUs with AVX-512 lack
    folder = Path(__file__).parent
    libraries = sorted(folder.glob(f"_cpu_{variant}.*so"))
    if not libraries:
        raise ImportError(
            f"vllm-turboquant's native library _cpu_{variant} was not built in {folder}; "
            "build it with: pip install --no-build-isolation --no-deps -e ."
        )
    torch.ops.load_library(libraries[0])
    return variant


def _load_cuda_library() -> bool:
    """Load the CUDA operators where PyTorch has CUDA; without them, a call on a GPU says so."""
    if torch.version.cuda is None:
        return False
    folder = Path(__file__).parent
    libraries = sorted(folder.glob("_cuda.*so"))
    if libraries:
        torch.ops.load_library(libraries[0])
        return True

    def refuse(*args: object) -> None:
        raise RuntimeError(
            f"vllm-turboquant's native library _cuda was not built in {folder}; with nvcc on PATH, "
            "build it with: pip install --no-build-isolation --no-deps -e ."
        )

    for name in ("store", "paged_attention", "dequantize", "assign_recent"):
        torch.library.impl(f"turboquant::{name}", "cuda", refuse)
    return False


#: Instruction set of the loaded CPU kernels: default, avx2 or avx512.
CPU_VARIANT = _load_cpu_library()
#: Whether the CUDA kernels are loaded.
HAS_CUDA = _load_cuda_library()


def store(
    key: Tensor,
    value: Tensor,
    key_frame: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    recent: Tensor | None = None,
    unit_map: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Compress keys and values into their slots; see ``reference.store``.

    Args:
        key: [>= num_tokens, num_kv_heads, head_dim] float32 | float16 | bfloat16, last axis
            contiguous.
        value: As ``key``.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32; see ``frame.make_frame``.
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8, each (block, head)
            contiguous.
        slot_mapping: [num_tokens] int64; negative slots are skipped.
        recent: [num_places, num_kv_heads, unit_bytes] uint8, where tokens whose unit has a place
            are also kept in 8 bits; see ``reference_recent.store_copies``.
        unit_map: [num_blocks * block_size / 16] int32, given together with ``recent``.
        positions: [>= num_tokens] int64, which token of its request each is, by which the center of
            its span is chosen; None where the frame has no spans.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype or stride; the message names it.
    """
    torch.ops.turboquant.store(
        key, value, key_frame, kv_cache, slot_mapping, recent, unit_map, positions
    )


def paged_attention(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    key_frame: Tensor,
    scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    scratch: Tensor | None = None,
    tickets: Tensor | None = None,
    recent: Tensor | None = None,
    unit_map: Tensor | None = None,
    window_units: int = 0,
    sliding_window: int = 0,
    key: Tensor | None = None,
    value: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Store new tokens, if any are given, and attend to cached ones; see ``reference.attention``.

    On GPUs of compute capability 9.0 and higher, this takes less time than two calls do.

    Args:
        query: [num_tokens, num_heads, head_dim] float32 | float16 | bfloat16, last axis contiguous.
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8, each (block, head)
            contiguous.
        block_table: [num_reqs, max_blocks] int32; entries past a request's tokens are not read, and
            of blocks that no row sees, which must exist, nothing enters the result.
        seq_lens: [num_reqs] int32.
        query_start_loc: [num_reqs + 1] int32.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32; see ``frame.make_frame``.
        scale: Softmax scale.
        causal: Whether the last query row of a request sees all its tokens, the one before it one
            less; otherwise, every row sees all, as if it came after them.
        out: [>= num_tokens, num_heads, head_dim], any of the dtypes of ``query``; rows past
            ``query_start_loc[-1]`` stay untouched.
        lse: [num_heads, >= num_tokens] float32, natural logarithm.
        scratch: [>= paged_attention_scratch_bytes(...)] uint8, overwritten; allocated where it is
            None. Not used on CPUs.
        tickets: [>= num_reqs * num_kv_heads] int32, zero before and after; calls that may overlap
            need different ones. Allocated, and not used, likewise.
        recent: [num_places, num_kv_heads, unit_bytes] uint8, 8-bit copies that are read instead of
            codes where a request's window has them; see ``reference_recent``.
        unit_map: [num_blocks * block_size / 16] int32, given together with ``recent``.
        window_units: Units of 16 tokens of a window, 1 to 8.
        sliding_window: Tokens, its own included, that a row sees at most; 0 for no limit. See
            ``reference.visible_tokens``.
        key: Of tokens to store first. This and the next two are as in ``store``, given together.
            Tokens of a request may be in blocks that another one reads, too, if the new tokens of
            that one begin at a multiple of 16: they do where it joins in this step.
        value: As ``key``.
        slot_mapping: Where to.
        positions: As in ``store``.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype or stride; the message names it.
    """
    torch.ops.turboquant.paged_attention(
        query,
        kv_cache,
        block_table,
        seq_lens,
        query_start_loc,
        key_frame,
        scale,
        causal,
        out,
        lse,
        scratch,
        tickets,
        recent,
        unit_map,
        window_units,
        sliding_window,
        key,
        value,
        slot_mapping,
        positions,
    )


def paged_attention_scratch_bytes(
    num_reqs: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_tokens: int,
) -> int:
    """Scratch that ``paged_attention`` needs on the current GPU, at most.

    Args:
        num_reqs: Requests of a call.
        num_tokens: Query rows of a call.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Head size.
        max_tokens: Tokens that a row of its block table has room for.
    """
    return torch.ops.turboquant.paged_attention_scratch_bytes(
        num_reqs, num_tokens, num_heads, num_kv_heads, head_dim, max_tokens
    )


def dequantize(
    kv_cache: Tensor,
    block_table: Tensor,
    seq_starts: Tensor,
    cu_seq_lens: Tensor,
    key_frame: Tensor,
    key_out: Tensor,
    value_out: Tensor,
    recent: Tensor | None = None,
    unit_map: Tensor | None = None,
) -> None:
    """Reconstruct a range of tokens of every request.

    Request i writes its tokens from ``seq_starts[i]`` on to rows ``cu_seq_lens[i]`` to
    ``cu_seq_lens[i + 1]``, so that a context of any length can be read in tiles of bounded size.

    Args:
        kv_cache: [num_blocks, num_kv_heads, block_size, slot_bytes] uint8, each (block, head)
            contiguous.
        block_table: [num_reqs, max_blocks] int32.
        seq_starts: [num_reqs] int32.
        cu_seq_lens: [num_reqs + 1] int32.
        key_frame: [num_kv_heads, 3 + num_spans, head_dim] float32.
        key_out: [>= cu_seq_lens[-1], num_kv_heads, head_dim] float32 | float16 | bfloat16.
        value_out: As ``key_out``.
        recent: [num_places, num_kv_heads, unit_bytes] uint8, 8-bit copies that are read instead of
            codes wherever there is one; see ``reference_recent.read``.
        unit_map: [num_blocks * block_size / 16] int32, given together with ``recent``.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype or stride; the message names it.
    """
    torch.ops.turboquant.dequantize(
        kv_cache,
        block_table,
        seq_starts,
        cu_seq_lens,
        key_frame,
        key_out,
        value_out,
        recent,
        unit_map,
    )


def assign_recent(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    block_size: int,
    window_units: int,
    step: int,
    unit_map: Tensor,
    places: Tensor,
    clock: Tensor,
) -> None:
    """Give units that a step writes a place for 8-bit copies; see ``reference_recent.assign``.

    Args:
        block_table: [num_reqs, max_blocks] int32.
        seq_lens: [num_reqs] int32, tokens of each request after this step.
        query_start_loc: [num_reqs + 1] int32.
        block_size: Tokens of a block, a multiple of 16.
        window_units: Units of a window, 1 to 8.
        step: Counts the calls.
        unit_map: [num_units] int32; updated.
        places: [num_places, 2] int32; updated.
        clock: [3 + num_places] int32; updated.

    Raises:
        RuntimeError: An argument has a wrong shape, dtype or stride; the message names it.
    """
    torch.ops.turboquant.assign_recent(
        block_table,
        seq_lens,
        query_start_loc,
        block_size,
        window_units,
        step,
        unit_map,
        places,
        clock,
    )


@torch.library.register_fake("turboquant::store")
def _store_fake(
    key: Tensor,
    value: Tensor,
    key_frame: Tensor,
    kv_cache: Tensor,
    slot_mapping: Tensor,
    recent: Tensor | None = None,
    unit_map: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Writes in place, returns nothing."""


@torch.library.register_fake("turboquant::paged_attention")
def _paged_attention_fake(
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    key_frame: Tensor,
    scale: float,
    causal: bool,
    out: Tensor,
    lse: Tensor,
    scratch: Tensor | None = None,
    tickets: Tensor | None = None,
    recent: Tensor | None = None,
    unit_map: Tensor | None = None,
    window_units: int = 0,
    sliding_window: int = 0,
    key: Tensor | None = None,
    value: Tensor | None = None,
    slot_mapping: Tensor | None = None,
    positions: Tensor | None = None,
) -> None:
    """Writes in place, returns nothing."""


@torch.library.register_fake("turboquant::assign_recent")
def _assign_recent_fake(
    block_table: Tensor,
    seq_lens: Tensor,
    query_start_loc: Tensor,
    block_size: int,
    window_units: int,
    step: int,
    unit_map: Tensor,
    places: Tensor,
    clock: Tensor,
) -> None:
    """Writes in place, returns nothing."""


@torch.library.register_fake("turboquant::dequantize")
def _dequantize_fake(
    kv_cache: Tensor,
    block_table: Tensor,
    seq_starts: Tensor,
    cu_seq_lens: Tensor,
    key_frame: Tensor,
    key_out: Tensor,
    value_out: Tensor,
    recent: Tensor | None = None,
    unit_map: Tensor | None = None,
) -> None:
    """Writes in place, returns nothing."""
