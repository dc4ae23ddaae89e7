"""What ends the start of an engine: one line with the reason and the way out.

Not ValueErrors, which the validation of vLLM's configuration would wrap in several lines.
"""

from __future__ import annotations

from vllm_turboquant import CACHE_DTYPE


class UnsupportedError(RuntimeError):
    """The model or the engine's configuration needs what this cache does not support."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"--kv-cache-dtype {CACHE_DTYPE} cannot serve this model as configured: {reason}. "
            f"Change that, or use --kv-cache-dtype auto."
        )


class OptionsError(RuntimeError):
    """The ``turboquant`` object of ``--additional-config`` is not valid."""
