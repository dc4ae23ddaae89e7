"""The only file that knows that vLLM versions differ."""

from __future__ import annotations

from typing import TYPE_CHECKING, get_args

if TYPE_CHECKING:
    import torch

SUPPORTED_VLLM = ">=0.32,<0.34"


def is_supported_vllm(version: str) -> bool:
    """Whether this package was written for ``version`` of vLLM, be it a pre-release or local."""
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(SUPPORTED_VLLM).contains(version, prereleases=True)


def register_cache_dtype(name: str, torch_dtype: torch.dtype) -> None:
    """Make ``--kv-cache-dtype name`` known to vLLM. Calling it again changes nothing.

    Args:
        name: Value of the option.
        torch_dtype: Element type of the cache tensors.
    """
    from vllm.config import cache

    if hasattr(cache, "register_kv_cache_dtype"):
        _register_handler(name, torch_dtype)
    else:
        _extend_literal(name, torch_dtype)


def _register_handler(name: str, torch_dtype: torch.dtype) -> None:
    """vLLM 0.33: its registry of cache dtypes."""
    from vllm.config.cache import is_known_kv_cache_dtype, register_kv_cache_dtype

    if is_known_kv_cache_dtype(name):
        return

    class Handler:
        def __init__(self) -> None:
            self.name = name

        def torch_dtype(self) -> torch.dtype:
            return torch_dtype

        def quant_mode(self):  # type: ignore[no-untyped-def]  # a KVQuantMode, too early to import
            from vllm.v1.kv_cache_interface import KVQuantMode

            # NOTE: not CUSTOM, which in 0.33.0 is an alias of another format's member. NONE keeps
            # vLLM's scale handling off, rightly: our scales live inside the slots.
            return KVQuantMode.NONE

    register_kv_cache_dtype(name)(Handler)


def _extend_literal(name: str, torch_dtype: torch.dtype) -> None:
    """vLLM 0.32: the accepted names are a Literal that all its readers share as one object."""
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import cache
    from vllm.config.speculative import SpeculativeConfig
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    if name in get_args(cache.CacheDType):
        return
    STR_DTYPE_TO_TORCH_DTYPE[name] = torch_dtype
    cache.CacheDType.__args__ = (*get_args(cache.CacheDType), name)
    for config in (cache.CacheConfig, SpeculativeConfig):  # their validators copied the Literal
        rebuild_dataclass(config, force=True)
