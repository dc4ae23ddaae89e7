"""vLLM's worker for this machine, measuring keys at load; see ``parallel_config.worker_cls``."""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform

from vllm_turboquant.measure import measure_keys

if current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as PlatformWorker
else:
    from vllm.v1.worker.gpu_worker import Worker as PlatformWorker


class MeasuringWorker(PlatformWorker):
    """Measures key frames as soon as the model is there."""

    def load_model(self, **kwargs: Any) -> None:
        """Load the model as vLLM does, then see ``measure.measure_keys``."""
        super().load_model(**kwargs)
        measure_keys(self.model_runner.get_model(), self.vllm_config)
