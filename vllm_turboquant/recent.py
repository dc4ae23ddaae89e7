"""8-bit copies of recent tokens under vLLM: how many there are, their memory, who may have one.

``reference_recent.py`` defines them. They are allocated when the model has been loaded, so that
vLLM, which then measures how much memory is left for the cache, counts them by itself. The layers
of one KV cache group share their block tables, and so the ``RecentPool`` that assigns places.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from vllm.logger import init_logger

from vllm_turboquant import CACHE_DTYPE, ops
from vllm_turboquant.layout import UNIT_TOKENS, SlotLayout
from vllm_turboquant.options import MAX_COPIES_SHARE, read_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.attention import Attention

logger = init_logger("vllm.turboquant")

#: place + 1 and 16 bits of a unit fit into an int32.
MAX_PLACES = 32766
MAX_STEP = 2**31 - 1
REPORT_INTERVAL_S = 10.0
#: Steps of an interval that is worth a report. vLLM's warm-up, in which as many requests as allowed
#: run at a time, has fewer.
BUSY_STEPS = 100


class RecentPool:
    """State of ``ops.assign_recent`` for the layers of one KV cache group.

    Args:
        num_units: Units of 16 tokens of the group's cache.
        num_places: Units that can have copies at a time.
        block_size: Tokens of a block.
        window_units: Units of the window of a request.
        device: Of the cache.

    Attributes:
        unit_map: [num_units] int32; see ``reference_recent``. Captured by graphs: updated in place.
        window_units: As given.
    """

    def __init__(
        self,
        num_units: int,
        num_places: int,
        block_size: int,
        window_units: int,
        device: torch.device,
    ) -> None:
        self.window_units = window_units
        self.unit_map = torch.zeros(num_units, dtype=torch.int32, device=device)
        self._block_size = block_size
        self._places = torch.tensor([[-1, 0]] * num_places, dtype=torch.int32, device=device)
        self._clock = torch.zeros(3 + num_places, dtype=torch.int32, device=device)
        self._step = 0
        self._counts = torch.zeros(2, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._next_report = time.monotonic()
        self._reported_step = 0

    def fits(self, kv_cache: Tensor) -> bool:
        """Whether this is the state for a cache like ``kv_cache``."""
        return self._block_size == kv_cache.shape[2] and len(self.unit_map) == num_units(kv_cache)

    def assign(self, block_table: Tensor, seq_lens: Tensor, query_start_loc: Tensor) -> None:
        """Give the units that the next step writes a place, without waiting for the device.

        Args:
            block_table: [num_reqs, max_blocks] int32.
            seq_lens: [num_reqs] int32, tokens of each request after the step; 0 for padding.
            query_start_loc: [num_reqs + 1] int32.
        """
        self._step = self._step % MAX_STEP + 1
        ops.assign_recent(
            block_table,
            seq_lens,
            query_start_loc,
            self._block_size,
            self.window_units,
            self._step,
            self.unit_map,
            self._places,
            self._clock,
        )
        if time.monotonic() >= self._next_report:
            self._report()

    def _report(self) -> None:
        """Log how much of the windows had copies, if not all, when the interval began.

        Then, and not now, so that the device need not be waited for: its answer is long there.
        """
        self._next_report = time.monotonic() + REPORT_INTERVAL_S
        num_steps, self._reported_step = self._step - self._reported_step, self._step
        needed, placed = self._counts.tolist()
        if placed < needed:
            logger.info(
                "%s recent tokens: 8-bit copies of %.0f %% of the newest tokens of the running "
                "requests; the others are read from codes",
                CACHE_DTYPE,
                100 * placed / needed,
            )
        if num_steps < BUSY_STEPS:
            self._counts.zero_()
        else:
            self._counts.copy_(self._clock[1:3], non_blocking=True)


def num_units(kv_cache: Tensor) -> int:
    """Units of 16 tokens in [num_blocks, num_kv_heads, block_size, slot_bytes]."""
    return kv_cache.shape[0] * kv_cache.shape[2] // UNIT_TOKENS


def group_pool(layers: Sequence[Attention], window_units: int) -> RecentPool | None:
    """The pool of all layers of one KV cache group, made as soon as their cache is there.

    NOTE: kept by the layers, so that any builder of the group finds the one that they read. If
    tokens were written that it was not told of, a block could show tokens of its former owner.

    Args:
        layers: All of the group, each with its cache.
        window_units: Units of the window of a request.

    Returns:
        None where there are no copies.
    """
    if not layers or layers[0].impl.recent is None:
        return None
    impl, kv_cache = layers[0].impl, layers[0].kv_cache
    # vLLM measures the memory of graphs with a first, small cache.
    if impl.pool is None or not impl.pool.fits(kv_cache):
        pool = RecentPool(
            num_units(kv_cache),
            len(impl.recent),
            kv_cache.shape[2],
            window_units,
            kv_cache.device,
        )
        for layer in layers:
            layer.impl.pool = pool
    return impl.pool


def count_places(max_num_seqs: int, window_units: int, place_bytes: int, cache_bytes: int) -> int:
    """How many units get copies at a time.

    Args:
        max_num_seqs: Requests that run at a time.
        window_units: Units of the window of a request.
        place_bytes: What the copies of a unit take in all layers together.
        cache_bytes: Memory of the KV cache.

    Returns:
        0 if not even the window of one request fits.
    """
    # One more than a window has: a request that sits out a step then seldom loses its copies.
    wanted = max_num_seqs * (window_units + 1)
    fitting = max(int(MAX_COPIES_SHARE * cache_bytes), 0) // place_bytes
    count = min(wanted, fitting, MAX_PLACES)
    return count if count >= window_units else 0


def allocate_copies(vllm_config: VllmConfig, layers: Iterable[Attention], cache_bytes: int) -> int:
    """Give every layer memory for copies, or say why there are none.

    Args:
        vllm_config: The engine's configuration.
        layers: All turboquant3 layers of the loaded model.
        cache_bytes: Memory that the KV cache will get beside the copies.

    Returns:
        Bytes of all copies.
    """
    options = read_options(vllm_config)
    impls = [layer.impl for layer in layers]
    if not impls or not options.recent_tokens:
        return 0
    if vllm_config.parallel_config.use_ubatching:
        _log_off("the microbatches of a step would take each other's places")
        return 0
    heads = [(impl.num_kv_heads, SlotLayout(impl.head_size)) for impl in impls]
    place_bytes = sum(num * layout.unit_bytes for num, layout in heads)
    max_num_seqs = vllm_config.scheduler_config.max_num_seqs
    num_places = count_places(max_num_seqs, options.window_units, place_bytes, cache_bytes)
    if not num_places:
        _log_off(
            f"those of one request take {options.window_units * place_bytes} bytes, more than "
            f"{100 * MAX_COPIES_SHARE:.0f} % of the {max(cache_bytes, 0)} bytes of the KV cache"
        )
        return 0
    for impl, (num_kv_heads, layout) in zip(impls, heads, strict=True):
        impl.recent = torch.zeros(
            (num_places, num_kv_heads, layout.unit_bytes),
            dtype=torch.uint8,
            device=impl.key_frame.device,
        )
    element_bytes = vllm_config.model_config.dtype.itemsize
    uncompressed = sum(2 * num * layout.head_dim * element_bytes for num, layout in heads)
    compression = uncompressed / sum(num * layout.slot_bytes for num, layout in heads)
    share = num_places * place_bytes / cache_bytes
    logger.info_once(
        "%s recent tokens: 8-bit copies of the newest %d or more tokens of %d requests at a time "
        "(of at most %d), %d tokens in all; %.1f MiB, %.2f %% of the memory of the KV cache: "
        "%.2fx smaller, %.2fx with copies",
        CACHE_DTYPE,
        options.recent_tokens,
        min(max_num_seqs, num_places // options.window_units),
        max_num_seqs,
        num_places * UNIT_TOKENS,
        num_places * place_bytes / 2**20,
        100 * share,
        compression,
        compression / (1 + share),
    )
    return num_places * place_bytes


def _log_off(reason: str) -> None:
    logger.info_once("%s recent tokens: no 8-bit copies, because %s", CACHE_DTYPE, reason)
