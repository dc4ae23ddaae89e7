"""Entry point of the vLLM plugin: make ``--kv-cache-dtype turboquant3`` exist.

vLLM calls ``register`` in every process it starts, before it parses arguments. Nothing here
imports the backend: it is named by its path, and a run with another cache dtype never loads it.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

from vllm_turboquant import CACHE_DTYPE, __version__
from vllm_turboquant.compat import SUPPORTED_VLLM, is_supported_vllm, register_cache_dtype

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.platforms.interface import Platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum
    from vllm.v1.attention.selector import AttentionSelectorConfig


def register() -> None:
    """Register the cache dtype and hook backend selection. Calling it again changes nothing."""
    import torch
    from vllm import __version__ as vllm_version
    from vllm.logger import init_logger
    from vllm.platforms import current_platform

    if not is_supported_vllm(vllm_version):
        init_logger("vllm.turboquant").warning(
            "vllm-turboquant %s supports vLLM %s and this is %s: "
            "--kv-cache-dtype %s is not available",
            __version__,
            SUPPORTED_VLLM,
            vllm_version,
            CACHE_DTYPE,
        )
        return
    register_cache_dtype(CACHE_DTYPE, torch.uint8)
    _hook_platform(type(current_platform))  # type: ignore[arg-type]  # vLLM is not followed


@functools.cache  # a platform is hooked once
def _hook_platform(platform: type[Platform]) -> None:
    _hook_backend_selection(platform)
    _hook_config_check(platform)


def _hook_backend_selection(platform: type[Platform]) -> None:
    """Let layers with our cache dtype choose our backend and all others pass through untouched.

    A hook is needed because vLLM selects from a fixed list, and on CPU, in 0.32, without looking at
    the cache dtype at all.
    """
    select = platform.get_attn_backend_cls

    @functools.wraps(select)
    def get_attn_backend_cls(
        cls: type[Platform],
        selected_backend: AttentionBackendEnum | None,
        attn_selector_config: AttentionSelectorConfig,
        num_heads: int | None = None,
    ) -> str:
        if attn_selector_config.kv_cache_dtype != CACHE_DTYPE:
            return select(selected_backend, attn_selector_config, num_heads)
        from vllm_turboquant.backend import select_backend

        return select_backend(selected_backend, attn_selector_config)

    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _hook_config_check(platform: type[Platform]) -> None:
    """Refuse what the configuration already shows in the process that the user started.

    Layers are checked again one by one when the model is built, but that is in a child process, and
    its error would stand far above the end of the log.
    """
    check = platform.check_and_update_config

    @functools.wraps(check)
    def check_and_update_config(cls: type[Platform], vllm_config: VllmConfig) -> None:
        if vllm_config.cache_config.cache_dtype == CACHE_DTYPE:
            from vllm_turboquant.backend import check_config

            check_config(vllm_config)
        elif getattr(vllm_config.speculative_config, "kv_cache_dtype", None) == CACHE_DTYPE:
            from vllm_turboquant.errors import UnsupportedError

            raise UnsupportedError("a draft model alone cannot have this cache")
        check(vllm_config)

    platform.check_and_update_config = classmethod(check_and_update_config)
