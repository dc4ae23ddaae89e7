"""Methods that an evaluation adds to vLLM's workers, by ``worker_extension_cls``.

They are called by name through ``LLM.collective_rpc`` on every rank. Hidden states stay in the
worker: the reference's go to files, and every other row is scored against these where its own are.
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from copy import copy
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

from vllm_turboquant.evaluation.fidelity import score_window
from vllm_turboquant.evaluation.recording import Recording

FakeQuantizer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Recorder:
    """Mixed into vLLM's worker, whose ``rank``, ``vllm_config`` and ``model_runner`` it uses."""

    rank: int
    vllm_config: Any
    model_runner: Any
    recording: Recording
    recording_hook: Any

    def describe_cache(self) -> dict[str, Any]:
        """Count the decoder layers by the name of their backend and by their cache dtype.

        Returns:
            ``backends`` and ``dtypes``, each a count by name, and ``unread``, the cache dtypes that
            a layer was given although its backend does not know them.
        """
        layers = decoder_layers(self.model_runner.get_model())
        return {
            "backends": Counter(layer.attn_backend.get_name() for layer in layers),
            "dtypes": Counter(layer.kv_cache_dtype for layer in layers),
            "unread": sorted(
                {
                    layer.kv_cache_dtype
                    for layer in layers
                    if not layer.attn_backend.supports_kv_cache_dtype(layer.kv_cache_dtype)
                }
            ),
        }

    def capacity_tokens(self, step_tokens: int) -> int:
        """Tokens that fit in the cache, by vLLM's own arithmetic.

        For a layer with a window vLLM reserves room for the window and the tokens of one step, so
        that engines can be compared only for steps of the same size.

        Args:
            step_tokens: Most tokens computed in one step, in place of this engine's own setting.
        """
        config = copy(self.vllm_config)
        config.scheduler_config = copy(config.scheduler_config)
        config.scheduler_config.max_num_batched_tokens = step_tokens
        return get_kv_cache_capacity(config, self.model_runner.kv_cache_config)[0]

    def fake_quantize(self, function: str) -> int:
        """Replace keys and values of every layer by what a code would make of them.

        To be called before the first request. What enters the cache, and what attention reads, then
        went through ``function``, whatever the dtype of the cache.

        Args:
            function: ``module:function`` that maps key and value, [num_tokens, num_kv_heads,
                head_dim], to tensors of the same shape and dtype.

        Returns:
            Number of layers.

        Raises:
            RuntimeError: The model has no layer with separate keys and values.
        """
        module, _, name = function.partition(":")
        quantizer = getattr(importlib.import_module(module), name)
        layers = decoder_layers(self.model_runner.get_model())
        if not layers:
            raise RuntimeError("the model has no attention layers with separate keys and values")
        for layer in layers:
            layer.register_forward_pre_hook(_quantizing_hook(quantizer), with_kwargs=True)
        return len(layers)

    def record(self, windows: list[list[int]], in_lockstep: bool) -> None:
        """Keep the hidden states of the windows that are computed next, and of nothing else."""
        if hasattr(self, "recording_hook"):
            self.recording_hook.remove()
        recording = self.recording = Recording.expect(windows, in_lockstep)

        def keep(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
        ) -> None:
            recording.take(hidden, kwargs.get("input_ids"), kwargs["positions"])

        self.recording_hook = self.model_runner.get_model().register_forward_hook(
            keep, with_kwargs=True
        )

    def save_reference(self, paths: list[str]) -> None:
        """Write the hidden states of the recorded windows, one file each."""
        hidden = self._recorded()
        if self.rank == 0:  # every rank has the same
            for path, window in zip(paths, hidden, strict=False):
                save_file({"hidden": window.cpu().contiguous()}, path)

    @torch.inference_mode()
    def score(self, paths: list[str]) -> list[dict[str, Any] | None]:
        """Compare the recorded windows with the reference's.

        Args:
            paths: Files of ``save_reference``, one for each window; windows past their number stay
                unscored.

        Returns:
            For each path the fields of ``plan.WindowScore``; None on ranks without logits.
        """
        hidden = self._recorded()
        compute_logits = self.model_runner.get_model().compute_logits
        return [
            score_window(
                compute_logits,
                load_file(path)["hidden"].to(hidden.device),
                window,
                tokens.to(hidden.device),
            )
            for path, window, tokens in zip(paths, hidden, self.recording.tokens, strict=False)
        ]

    def _recorded(self) -> Tensor:
        """Stop recording and return what was recorded."""
        self.recording_hook.remove()
        return self.recording.complete()


def decoder_layers(model: nn.Module) -> list[Any]:
    """The attention layers of ``model`` that have a KV cache."""
    return [
        module
        for module in model.modules()
        if isinstance(module, Attention) and module.attn_type == AttentionType.DECODER
    ]


def _quantizing_hook(
    quantizer: FakeQuantizer,
) -> Callable[
    [Any, tuple[Any, ...], dict[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None
]:
    """A forward pre-hook for one layer, whose forward is ``(query, key, value, ...)``."""

    def replace(
        layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        named = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
        key, value = named["key"], named["value"]
        if key is None:  # this layer reads the cache of an earlier one
            return None
        new_key, new_value = quantizer(
            key.reshape(-1, layer.num_kv_heads, layer.head_size),
            value.reshape(-1, layer.num_kv_heads, layer.head_size_v),
        )
        named |= {"key": new_key.reshape(key.shape), "value": new_value.reshape(value.shape)}
        return (named.pop("query"), named.pop("key"), named.pop("value"), *args[3:]), named

    return replace
