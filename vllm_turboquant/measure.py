"""Key frames, measured once: when a model has been loaded and before its first token.

One forward pass over random tokens shows where the keys of every KV head lie: their mean, the key
of the first token, which models use as attention sink, and how much every coordinate varies and
weighs. Random tokens will do, so no data is needed. A frame has to be the same for all tokens that
ever share a cache, and the same in every replica. RoPE turns keys, and so their mean, with the
position; see ``span_centers.py``. Where that is not known, the mean over all the context has to do.

The result is deterministic: equal weights and an equal max_model_len give equal frames. Every
tensor parallel rank measures those of its own heads; ranks that each have a copy of a KV head, and
of its cache, balance it for their own query heads.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import get_layers_from_vllm_config, set_current_vllm_config
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType

from vllm_turboquant import CACHE_DTYPE
from vllm_turboquant.attention import coded_layers, implementation
from vllm_turboquant.errors import UnsupportedError
from vllm_turboquant.frame import make_frame
from vllm_turboquant.fresh import FreshRequests, fresh_attention
from vllm_turboquant.layout import SPAN_TOKENS
from vllm_turboquant.options import read_options
from vllm_turboquant.span_centers import Rotations

if TYPE_CHECKING:
    from vllm.config import VllmConfig

logger = init_logger("vllm.turboquant")

SEED = 0
NUM_TOKENS = 256
#: Parts of consecutive positions that these tokens have.
NUM_SPANS = 8
#: The first keys are those of the attention sink, which are unlike all others.
NUM_SKIPPED = 4
#: Stretching coordinates by (query power / key power)^(1 / 4) makes the error of scores smallest,
#: for the tokens that were measured; of text this is true only in part, and 0.15 is better.
BALANCE_EXPONENT = 0.15
#: No coordinate is stretched or shrunk more than this.
MAX_BALANCE = 4.0


@dataclass(frozen=True)
class KeyMoments:
    """What one layer's keys have in common, and how they differ.

    Attributes:
        frame: [num_kv_heads, 3 + num_spans, head_dim] float32; see ``frame.make_frame``.
        share: [num_kv_heads] float32, root mean square norm of the centers over that of the keys,
            0 where all keys are 0.
        is_turned: Whether spans have centers of their own.
    """

    frame: Tensor
    share: Tensor
    is_turned: bool

    @staticmethod
    def of(query: Tensor, key: Tensor, rotations: Rotations | None = None) -> KeyMoments:
        """Moments of one sequence.

        Args:
            query: [num_tokens, num_heads, head_dim], after RoPE.
            key: [num_tokens, num_kv_heads, head_dim], after RoPE.
            rotations: How RoPE turned its tokens, but for those that are skipped, if that is known.
        """
        skipped = num_skipped(key.shape[0])
        sink, key, query = key[0].float(), key[skipped:].float(), query[skipped:].float()
        center = key.mean(dim=0)
        near, span_centers, is_turned = _near_centers(key, center, rotations)
        key_power = (key - near).square().mean(dim=0)
        query_power = query.square().mean(dim=0).view(len(center), -1, center.shape[1]).mean(dim=1)
        frame = make_frame(center, sink, balance(query_power, key_power), span_centers)
        return KeyMoments(frame, _share(key, near), is_turned)

    @staticmethod
    def of_constant(key: Tensor, rotations: Rotations | None = None) -> KeyMoments:
        """Moments where nothing but the mean of the keys is known.

        Args:
            key: [num_tokens, num_kv_heads, head_dim], after RoPE.
            rotations: How RoPE turned them, if that is known.
        """
        key = key.float()
        center = key.mean(dim=0)
        near, span_centers, is_turned = _near_centers(key, center, rotations)
        frame = make_frame(center, center, torch.ones_like(center), span_centers)
        return KeyMoments(frame, _share(key, near), is_turned)


def balance(query_power: Tensor, key_power: Tensor) -> Tensor:
    """How much to stretch every coordinate of keys before a rotation spreads their error evenly.

    Stretching by b multiplies the error of scores by sum(b^2 key_power) sum(query_power / b^2).

    Args:
        query_power: [num_kv_heads, head_dim], mean square of a query's coordinate.
        key_power: As ``query_power``, of keys less their center.

    Returns:
        [num_kv_heads, head_dim] of geometric mean 1, but for coordinates at the limits.
    """
    known = (query_power > 0) & (key_power > 0)
    stretch = BALANCE_EXPONENT * torch.where(known, query_power.log() - key_power.log(), 0.0)
    stretch -= stretch.mean(dim=-1, keepdim=True)
    return stretch.exp().clamp(1 / MAX_BALANCE, MAX_BALANCE)


def num_skipped(num_tokens: int) -> int:
    """How many of the first tokens of a sequence say nothing about the others."""
    return min(NUM_SKIPPED, num_tokens - 1)


def _near_centers(
    key: Tensor, center: Tensor, rotations: Rotations | None
) -> tuple[Tensor, Tensor | None, bool]:
    """The centers that keys are nearest to, and those of spans.

    All spans have the same where their own are no nearer, as if the model does more to its keys
    than its rotary embedding says. So the shape of a frame does not depend on weights, of which
    others may be loaded when graphs have been captured.

    Args:
        key: [num_tokens, num_kv_heads, head_dim] float32.
        center: [num_kv_heads, head_dim], their mean.
        rotations: How RoPE turned them, if that is known.

    Returns:
        [num_tokens, num_kv_heads, head_dim] or ``center``; [num_kv_heads, num_spans, head_dim], or
        None without ``rotations``; whether spans have centers of their own.
    """
    if rotations is None:
        return center, None, False
    span_centers = rotations.centers(key)
    near = span_centers[:, rotations.positions // SPAN_TOKENS].transpose(0, 1)
    if (key - near).square().sum() < (key - center).square().sum():
        return near, span_centers, True
    return center, center[:, None].expand_as(span_centers), False


def _share(key: Tensor, near: Tensor) -> Tensor:
    of_keys, of_centers = (
        x.square().sum(dim=-1).expand(key.shape[:-1]).mean(dim=0).sqrt() for x in (key, near)
    )
    return torch.where(of_keys > 0, of_centers / of_keys, 0.0)


def measure_keys(model: nn.Module, vllm_config: VllmConfig) -> None:
    """Measure the key frames of all turboquant3 layers of a loaded model and register them.

    They become buffers of the model, so that sleep mode brings them back. With the option off they
    stay what they are: keys are coded as they come.

    Args:
        model: All its weights loaded and processed.
        vllm_config: The engine's configuration.
    """
    layers = coded_layers(vllm_config)
    _measure_layers(model, layers, vllm_config)
    for layer in layers.values():
        for buffer, tensor in implementation(layer).buffers().items():
            layer.register_buffer(f"{CACHE_DTYPE}_{buffer}", tensor, persistent=False)


def _measure_layers(
    model: nn.Module, layers: Mapping[str, Attention], vllm_config: VllmConfig
) -> None:
    own = set(model.modules())
    drafted = [name for name, layer in layers.items() if layer not in own]
    layers = {name: layer for name, layer in layers.items() if layer in own}
    if not layers or not read_options(vllm_config).measure_keys:
        return
    if drafted:
        logger.info_once(
            "%s keys of the draft model are coded as they come (%s); "
            '"kv_cache_dtype": "auto" in --speculative-config leaves them exact',
            CACHE_DTYPE,
            ", ".join(drafted),
        )
    start = time.perf_counter()
    positions = positions_to_measure(vllm_config).to(next(model.parameters()).device)
    with torch.inference_mode():
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            how = "the biases of the key projections, because a pipeline stage cannot run alone"
            moments = _bias_moments(model, layers, positions, vllm_config)
        else:
            how = f"{len(positions)} random tokens"
            moments = _measured_moments(model, layers, positions, vllm_config)
        for name, measured in moments.items():
            if not measured.frame.isfinite().all():
                raise UnsupportedError(
                    f"keys of {name} are not finite in a run over random tokens, which the option "
                    "measure_keys leaves out"
                )
            implementation(layers[name]).set_key_frame(measured.frame)
    share, where = max((float(m.share.max()), name) for name, m in moments.items())
    num_turned = sum(m.is_turned for m in moments.values())
    logger.info_once(
        "%s keys are centered by the mean over %s, turned to every %d positions in %d of %d "
        "layers: up to %.1f %% of a key's length (%s); took %.1f s",
        CACHE_DTYPE,
        how,
        SPAN_TOKENS,
        num_turned,
        len(layers),
        100 * share,
        where,
        time.perf_counter() - start,
    )


def positions_to_measure(vllm_config: VllmConfig) -> Tensor:
    """Where keys of this engine are measured.

    NOTE: Layers with adapters have room for the tokens of one step; with --enable-lora and very
    short steps, frames are therefore others.
    """
    most = NUM_TOKENS
    if vllm_config.lora_config:
        most = min(most, vllm_config.scheduler_config.max_num_batched_tokens)
    return measured_positions(vllm_config.model_config.max_model_len, most)


def measured_positions(max_model_len: int, most: int = NUM_TOKENS) -> Tensor:
    """Where keys are measured: everywhere, most densely where most contexts reach.

    Args:
        max_model_len: Tokens of the longest context.
        most: Positions at most.

    Returns:
        [num_tokens] int64, spans of consecutive positions; the distance of their beginnings grows
        geometrically.
    """
    length = max(most // NUM_SPANS, 1)
    if max_model_len <= most:
        return torch.arange(max_model_len)
    growth = torch.linspace(0, 1, NUM_SPANS, dtype=torch.float64)[1:]
    starts = length * ((max_model_len - length) / length) ** growth
    spans = [torch.arange(length) + round(start) for start in (0, *starts.tolist())]
    return torch.cat(spans)[:most]


def _parents(model: nn.Module) -> dict[nn.Module, Any]:
    return {child: parent for parent in model.modules() for child in parent.children()}


def _rotations(
    model: nn.Module,
    layers: Mapping[str, Attention],
    positions: Tensor,
    vllm_config: VllmConfig,
) -> dict[str, Rotations | None]:
    """What RoPE does to the keys of every layer, as far as that is known."""
    # Microbatches do not say where their tokens are.
    if vllm_config.parallel_config.use_ubatching:
        return dict.fromkeys(layers)
    config, parents = vllm_config.model_config, _parents(model)
    known: dict[tuple[nn.Module | None, int], Rotations | None] = {}
    rotations = {}
    for name, layer in layers.items():
        module = getattr(parents[layer], "rotary_emb", None)
        of = module, layer.head_size
        if of not in known:
            known[of] = Rotations.of(*of, config.dtype, positions, config.max_model_len)
        rotations[name] = known[of]
    return rotations


def _measured_moments(
    model: nn.Module,
    layers: Mapping[str, Attention],
    positions: Tensor,
    vllm_config: VllmConfig,
) -> dict[str, KeyMoments]:
    """Run the model once over random tokens at these positions, without a cache."""
    config, num_tokens = vllm_config.model_config, len(positions)
    rotations = _rotations(model, layers, positions[num_skipped(num_tokens) :], vllm_config)
    generator = torch.Generator().manual_seed(SEED)
    input_ids = torch.randint(config.get_vocab_size(), (num_tokens,), generator=generator)
    if config.uses_mrope:  # temporal, height and width positions, the same for text
        positions = positions.expand(3, -1).contiguous()
    with (
        _observed_moments(layers, rotations, vllm_config) as moments,
        set_current_vllm_config(vllm_config),
        # NOTE: compiled, this run would be the one that torch.compile specializes for.
        set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True),
    ):
        model(input_ids=input_ids.to(positions.device), positions=positions)
    missing = layers.keys() - moments.keys()
    if missing:
        raise RuntimeError(f"no keys were seen in {', '.join(sorted(missing))}")
    return moments


@contextmanager
def _observed_moments(
    layers: Mapping[str, Attention],
    rotations: Mapping[str, Rotations | None],
    vllm_config: VllmConfig,
) -> Iterator[dict[str, KeyMoments]]:
    """Collect every layer's moments; meanwhile, all layers attend without a cache.

    Those of other caches too, whose implementations would give nothing, or anything, in such a run.
    """
    moments: dict[str, KeyMoments] = {}

    def observe(name: str, query: Tensor, key: Tensor) -> None:
        moments[name] = KeyMoments.of(query, key, rotations[name])

    others = [
        layer
        for layer in get_layers_from_vllm_config(vllm_config, Attention).values()
        if layer.kv_cache_dtype != CACHE_DTYPE and layer.attn_type == AttentionType.DECODER
    ]
    for name, layer in layers.items():
        implementation(layer).observe = partial(observe, name)
    for layer in others:
        layer.impl.forward = partial(_attend_without_cache, layer)
    try:
        yield moments
    finally:
        for layer in layers.values():
            implementation(layer).observe = None
        for layer in others:
            del layer.impl.forward


def _attend_without_cache(
    layer: Attention,
    _layer: Attention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kv_cache: Tensor,
    attn_metadata: None,
    output: Tensor,
    *_scales: Tensor | None,
    **_more: Any,
) -> Tensor:
    """``AttentionImpl.forward`` of a layer with another cache, for one sequence without any."""
    sequence = FreshRequests.of_lengths([len(query)], query.device)
    fresh_attention(
        query, key, value, sequence, layer.impl.scale, output, layer.sliding_window or 0
    )
    return output


def _bias_moments(
    model: nn.Module,
    layers: Mapping[str, Attention],
    positions: Tensor,
    vllm_config: VllmConfig,
) -> dict[str, KeyMoments]:
    """Moments of keys that are nothing but their projection's bias, rotated to these positions."""
    positions = positions[num_skipped(len(positions)) :]
    rotations = _rotations(model, layers, positions, vllm_config)
    parents, moments = _parents(model), {}
    for name, layer in layers.items():
        impl, parent = implementation(layer), parents[layer]
        bias = getattr(getattr(parent, "qkv_proj", None), "bias", None)
        shape = (len(positions), impl.num_kv_heads, impl.head_size)
        if bias is None:
            moments[name] = KeyMoments.of_constant(torch.zeros(shape, device=impl.key_frame.device))
            continue
        sizes = [heads * impl.head_size for heads in (impl.num_heads, *2 * [impl.num_kv_heads])]
        query, key, _ = (
            part.contiguous() for part in bias.expand(len(positions), -1).split(sizes, dim=-1)
        )
        if hasattr(parent, "rotary_emb"):
            _, key = parent.rotary_emb(positions, query, key)
        moments[name] = KeyMoments.of_constant(key.reshape(shape), rotations[name])
    return moments
