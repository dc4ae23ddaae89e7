"""Centers of keys: measured once, when a model has been loaded and before its first token.

The keys of real models are mostly one constant vector per layer and KV head. A softmax does not see
a constant that all keys share, so it is subtracted before keys are coded, and the code's bits are
left for what differs between them. The constant has to be the same for all tokens that ever share a
cache; the mean key of random tokens is as good as that of text, so no data is needed.

The result is deterministic: equal weights give equal centers in every replica, and every tensor
parallel rank measures those of its own heads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention

from vllm_turboquant import CACHE_DTYPE
from vllm_turboquant.attention import TurboQuant3Impl
from vllm_turboquant.options import read_options

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.turboquant")

BUFFER = "turboquant3_center"
SEED = 0
NUM_TOKENS = 256
#: The first keys are those of the attention sink, which are unlike all others.
NUM_SKIPPED = 4


@dataclass(frozen=True)
class KeyMoments:
    """What one layer's keys have in common.

    Attributes:
        mean: [num_kv_heads, head_dim] float32.
        share: [num_kv_heads] float32, norm of the mean over the root mean square norm of a key, in
            0..1; 0 where all keys are 0.
    """

    mean: Tensor
    share: Tensor

    @staticmethod
    def of(key: Tensor) -> KeyMoments:
        """Moments of keys.

        Args:
            key: [num_tokens, num_kv_heads, head_dim], after RoPE.
        """
        key = key.float()
        mean = key.mean(dim=0)
        rms = key.square().sum(dim=-1).mean(dim=0).sqrt()
        share = torch.where(rms > 0, torch.linalg.vector_norm(mean, dim=-1) / rms, 0.0)
        return KeyMoments(mean, share)


def center_keys(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Measure the centers of all turboquant3 layers of a loaded model and register them.

    They become buffers of the model, so that sleep mode brings them back. With the option off they
    stay zero.

    Args:
        model: All its weights loaded and processed.
        vllm_config: The engine's configuration.
    """
    layers = {
        name: layer
        for name, layer in get_layers_from_vllm_config(vllm_config, Attention).items()
        if layer.kv_cache_dtype == CACHE_DTYPE
    }
    for layer in layers.values():
        layer.register_buffer(BUFFER, _impl(layer).center, persistent=False)
    if not layers or not read_options(vllm_config).center_keys:
        return
    start = time.perf_counter()
    with torch.inference_mode():
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            how = "the biases of the key projections, because a pipeline stage cannot run alone"
            moments = _bias_moments(model, layers)
        else:
            how = f"{_num_tokens(vllm_config)} random tokens"
            moments = _measured_moments(model, layers, vllm_config)
        for name, measured in moments.items():
            _impl(layers[name]).center.copy_(measured.mean)
    share, where = max((float(m.share.max()), name) for name, m in moments.items())
    logger.info_once(
        "%s keys are centered by the mean over %s: up to %.1f %% of a key's length (%s); "
        "took %.1f s",
        CACHE_DTYPE,
        how,
        100 * share,
        where,
        time.perf_counter() - start,
    )


def _impl(layer: Attention) -> TurboQuant3Impl:
    return cast(TurboQuant3Impl, layer.impl)


def _num_tokens(vllm_config: VllmConfig) -> int:
    return min(NUM_TOKENS, vllm_config.model_config.max_model_len)


def _measured_moments(
    model: nn.Module, layers: Mapping[str, Attention], vllm_config: VllmConfig
) -> dict[str, KeyMoments]:
    """Run the model once over random tokens, without a cache."""
    config = vllm_config.model_config
    num_tokens = _num_tokens(vllm_config)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.randint(config.get_vocab_size(), (num_tokens,), generator=generator)
    positions = torch.arange(num_tokens)
    if config.uses_mrope:  # temporal, height and width positions, the same for text
        positions = positions.expand(3, -1).contiguous()
    with (
        _observed_keys(layers) as moments,
        set_current_vllm_config(vllm_config),
        # NOTE: compiled, this run would be the one that torch.compile specializes for.
        set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True),
    ):
        model(input_ids=input_ids.to(device), positions=positions.to(device))
    missing = layers.keys() - moments.keys()
    if missing:
        raise RuntimeError(f"no keys were seen in {', '.join(sorted(missing))}")
    return moments


@contextmanager
def _observed_keys(layers: Mapping[str, Attention]) -> Iterator[dict[str, KeyMoments]]:
    """Collect the moments of every layer's keys; meanwhile, layers attend without a cache."""
    moments: dict[str, KeyMoments] = {}

    def observe(name: str, key: Tensor) -> None:
        first = min(NUM_SKIPPED, key.shape[0] - 1)
        moments[name] = KeyMoments.of(key[first:])

    for name, layer in layers.items():
        _impl(layer).observe_keys = lambda key, name=name: observe(name, key)
    try:
        yield moments
    finally:
        for layer in layers.values():
            _impl(layer).observe_keys = None


def _bias_moments(model: nn.Module, layers: Mapping[str, Attention]) -> dict[str, KeyMoments]:
    """Moments of keys that are nothing but their projection's bias, rotated to every position."""
    parents: dict[nn.Module, Any] = {
        child: parent for parent in model.modules() for child in parent.children()
    }
    moments = {}
    for name, layer in layers.items():
        impl, parent = _impl(layer), parents[layer]
        bias = getattr(getattr(parent, "qkv_proj", None), "bias", None)
        positions = torch.arange(NUM_SKIPPED, NUM_TOKENS, device=impl.center.device)
        shape = (len(positions), impl.num_kv_heads, impl.head_size)
        if bias is None:
            moments[name] = KeyMoments.of(torch.zeros(shape, device=impl.center.device))
            continue
        sizes = [heads * impl.head_size for heads in (impl.num_heads, *2 * [impl.num_kv_heads])]
        query, key, _ = (
            part.contiguous() for part in bias.expand(len(positions), -1).split(sizes, dim=-1)
        )
        if hasattr(parent, "rotary_emb"):
            _, key = parent.rotary_emb(positions, query, key)
        moments[name] = KeyMoments.of(key.reshape(shape))
    return moments
