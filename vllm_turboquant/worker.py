"""vLLM's worker for this machine, with what follows a load; see ``parallel_config.worker_cls``."""

from __future__ import annotations

import gc
from typing import Any

import psutil
import torch
from vllm.platforms import current_platform
from vllm.utils.mem_utils import MemorySnapshot

from vllm_turboquant.attention import coded_layers
from vllm_turboquant.measure import measure_keys, positions_to_measure
from vllm_turboquant.options import MAX_COPIES_SHARE
from vllm_turboquant.recent import allocate_copies

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class MeasuringWorker(PlatformWorker):
    """Measures key frames and allocates copies of recent tokens as soon as the model is there."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the model as vLLM does; see ``measure_keys`` and ``allocate_copies``."""
        super().load_model(**kwargs)
        self._measure_keys()
        cache_bytes = self._cache_bytes()
        # Sleep mode discards copies with the cache, and ``unit_map``, which lies elsewhere, still
        # says that there are some. They are not read: vLLM forgets all blocks when it discards
        # them, and a token that is written anew takes the place of its copy, too.
        with self._maybe_get_memory_pool_context(tag="kv_cache"):
            layers = coded_layers(self.vllm_config).values()
            copies = allocate_copies(self.vllm_config, layers, cache_bytes)
        self._taken_from_given = copies if self.cache_config.kv_cache_memory_bytes else 0

    def reload_weights(self, *args: Any, **kwargs: Any) -> None:
        """Reload as vLLM does, and measure the keys of the new weights; what is cached is stale."""
        super().reload_weights(*args, **kwargs)
        self._measure_keys()

    def finish_weight_update(self) -> None:
        """As ``reload_weights``, for weights that were sent."""
        super().finish_weight_update()
        self._measure_keys()

    def determine_available_memory(self) -> int:
        """Memory of the cache itself: what vLLM finds, or was given for the cache with copies."""
        return super().determine_available_memory() - self._taken_from_given

    def _measure_keys(self) -> None:
        if self.vllm_config.lora_config:
            # Adapters are looked up for every token, also where none has one.
            none = (0,) * len(positions_to_measure(self.vllm_config))
            self.model_runner._set_active_loras(none, none, set())
        measure_keys(self.model_runner.get_model(), self.vllm_config)

    def _cache_bytes(self) -> int:
        """Memory that the KV cache will get beside copies, by all that is known before vLLM
        measures what a forward pass takes."""
        given = self.cache_config.kv_cache_memory_bytes
        if given:
            left = given
        elif current_platform.is_cpu():
            left = self.requested_cpu_memory - psutil.Process().memory_info().rss
        else:
            gc.collect()
            torch.accelerator.empty_cache()
            now = MemorySnapshot(device=self.device)
            taken = self.init_snapshot.free_memory - now.free_memory
            left = self.requested_memory - taken
        return int(left / (1 + MAX_COPIES_SHARE))
