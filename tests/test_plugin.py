"""The plugin registers one cache dtype, refuses what it cannot serve, and changes nothing else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm.config import CacheConfig, VllmConfig, set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_turboquant import plugin
from vllm_turboquant.compat import is_supported_vllm
from vllm_turboquant.errors import OptionsError, UnsupportedError
from vllm_turboquant.layout import SlotLayout

pytestmark = pytest.mark.vllm

HOOKS = ("get_attn_backend_cls", "check_and_update_config")


@pytest.fixture(autouse=True)
def registered() -> None:
    plugin.register()


def engine_config(model: Path, **engine_args: Any) -> VllmConfig:
    args = {"kv_cache_dtype": "turboquant3", "skip_tokenizer_init": True, **engine_args}
    return EngineArgs(model=str(model), **args).create_engine_config()


def platform_backend(config: VllmConfig) -> str:
    """Name of the backend that vLLM itself chooses for the layers of ``build_layer``."""
    from vllm.v1.attention.selector import AttentionSelectorConfig

    select = current_platform.get_attn_backend_cls.__wrapped__
    needs = AttentionSelectorConfig(64, torch.bfloat16, "auto", config.cache_config.block_size)
    with set_current_vllm_config(config):
        return resolve_obj_by_qualname(select(None, needs)).get_name()


def build_layer(config: VllmConfig, **overrides: Any) -> Attention:
    """Construct an attention layer as a model would, backend selection included."""
    arguments: dict[str, Any] = {
        "num_heads": 4,
        "head_size": 64,
        "scale": 0.125,
        "num_kv_heads": 2,
        "cache_config": config.cache_config,
        "prefix": "model.layers.0.self_attn.attn",
        **overrides,
    }
    config.compilation_config.static_forward_context.clear()
    with set_current_vllm_config(config):
        return Attention(**arguments)


def test_a_layer_gets_our_backend_and_a_page_of_slots(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama)
    layer = build_layer(config)
    assert layer.attn_backend.get_name() == "TURBOQUANT3"
    spec = layer.attn_backend.customize_spec(layer.get_kv_cache_spec(config))
    assert spec.page_size_bytes == 2 * config.cache_config.block_size * SlotLayout(64).slot_bytes


def test_registration_is_idempotent() -> None:
    hooks = {name: vars(type(current_platform))[name] for name in HOOKS}
    plugin.register()
    assert {name: vars(type(current_platform))[name] for name in HOOKS} == hooks
    assert CacheConfig(cache_dtype="turboquant3").cache_dtype == "turboquant3"


def test_other_cache_dtypes_keep_their_backend_and_their_checks(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama, kv_cache_dtype="auto")
    assert build_layer(config).attn_backend.get_name() == platform_backend(config) != "TURBOQUANT3"
    with pytest.raises(ValueError, match="cache_dtype"):
        CacheConfig(cache_dtype="turboquant9")


def test_skipped_layers_keep_their_backend(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama, kv_cache_dtype_skip_layers=["1"])
    names = [
        build_layer(config, prefix=f"model.layers.{i}.self_attn.attn").attn_backend.get_name()
        for i in range(2)
    ]
    assert names == ["TURBOQUANT3", platform_backend(config)]


def test_sliding_window_layers_have_pages_of_slots(tiny_llama: Path) -> None:
    from vllm.v1.kv_cache_interface import SlidingWindowSpec

    config = engine_config(tiny_llama)
    layer = build_layer(config, per_layer_sliding_window=128)
    assert layer.impl.sliding_window == 128
    spec = layer.get_kv_cache_spec(config)
    full = build_layer(config, prefix="model.layers.1.self_attn.attn").get_kv_cache_spec(config)
    assert isinstance(spec, SlidingWindowSpec) and spec.sliding_window == 128
    assert spec.page_size_bytes == full.page_size_bytes


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        ({"head_size": 80}, "head size 80 is not supported, only 64, 128, 256, 384, 512 are"),
        ({"alibi_slopes": [1.0] * 4}, "ALiBi is not supported"),
        ({"logits_soft_cap": 30.0}, "a logits soft cap is not supported yet"),
        ({"sinks": torch.zeros(4)}, "attention sinks are not supported yet"),
        ({"kv_sharing_target_layer_name": "model.layers.0"}, "KV sharing is not supported yet"),
        ({"attn_type": "encoder_only"}, "encoder-only attention has no KV cache to compress"),
        ({"attn_type": "encoder_decoder"}, "cross attention is not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_layers_are_refused(
    tiny_llama: Path, overrides: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedError) as error:
        build_layer(engine_config(tiny_llama), **overrides)
    assert_one_line(error.value, reason)


@pytest.mark.parametrize(
    ("needs", "reason"),
    [
        ({"use_mla": True}, "MLA (multi-head latent attention) is not supported"),
        ({"use_sparse": True}, "sparse attention is not supported"),
        ({"use_per_head_quant_scales": True}, "float8 attention"),
        ({"use_kv_connector": True}, "KV connectors are not supported yet"),
        ({"use_dcp": True}, "DCP not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"block_size": 24}, "--block-size 24 is not supported, only multiples of 16 are"),
        ({"dtype": torch.float64}, "dtype not supported"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_unsupported_selections_are_refused(
    tiny_llama: Path, needs: dict[str, Any], reason: str
) -> None:
    from vllm.v1.attention.selector import AttentionSelectorConfig

    supported = AttentionSelectorConfig(64, torch.bfloat16, "turboquant3", 16)
    with set_current_vllm_config(engine_config(tiny_llama)):
        assert current_platform.get_attn_backend_cls(None, supported).endswith("TurboQuant3Backend")
        with pytest.raises(UnsupportedError) as error:
            current_platform.get_attn_backend_cls(None, supported._replace(**needs))
    assert_one_line(error.value, reason)


@pytest.mark.parametrize(
    ("device", "capability", "built", "needs", "reason"),
    [
        ("cuda", (7, 5), True, {}, "compute capability 7.5 is not supported, only 8.0 and newer"),
        ("cuda", (9, 0), False, {}, "the CUDA operators were not built; with nvcc on PATH, build"),
        ("cuda", (9, 0), True, {"dtype": torch.float32}, "float32 models are not supported on"),
        ("cuda", (9, 0), True, {"head_size": 512}, "head size 512 is not supported on GPUs"),
        ("xpu", None, True, {}, "the device xpu is not supported, only CPUs and NVIDIA GPUs are"),
        ("cuda", (9, 0), True, {}, None),
    ],
    ids=["old GPU", "not built", "float32", "head size", "another device", "supported"],
)
def test_devices(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    capability: tuple[int, int] | None,
    built: bool,
    needs: dict[str, Any],
    reason: str | None,
) -> None:
    from vllm.platforms.interface import DeviceCapability
    from vllm.v1.attention.selector import AttentionSelectorConfig

    from vllm_turboquant import backend

    known = DeviceCapability(*capability) if capability else None
    platform = SimpleNamespace(
        device_name=device,
        is_cpu=lambda: False,
        is_cuda=lambda: device == "cuda",
        get_device_capability=lambda: known,
    )
    monkeypatch.setattr(backend, "current_platform", platform)
    monkeypatch.setattr(backend.ops, "HAS_CUDA", built)
    layer = AttentionSelectorConfig(128, torch.bfloat16, "turboquant3", 16)._replace(**needs)
    if reason is None:
        assert backend.select_backend(None, layer).endswith("TurboQuant3Backend")
        return
    with pytest.raises(UnsupportedError) as error:
        backend.select_backend(None, layer)
    assert_one_line(error.value, reason)


def test_another_attention_backend_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(UnsupportedError) as error:
        engine_config(tiny_llama, attention_backend=AttentionBackendEnum.FLASH_ATTN)
    assert_one_line(error.value, "--attention-backend FLASH_ATTN names another backend")


def test_an_unsupported_configuration_is_refused_before_the_engine_starts(tiny_llama: Path) -> None:
    with pytest.raises(UnsupportedError) as error:
        engine_config(tiny_llama, block_size=24)
    assert_one_line(error.value, "--block-size 24 is not supported")
    with pytest.raises(UnsupportedError) as error:
        engine_config(tiny_llama, worker_cls="my.Worker")
    assert_one_line(error.value, "--worker-cls my.Worker takes the place of the worker that")


@pytest.mark.parametrize(
    ("part", "name", "value", "reason"),
    [
        ("parallel_config", "enable_elastic_ep", True, "--enable-elastic-ep is not supported"),
        ("", "speculative_config", SimpleNamespace(), "--no-async-scheduling turns that off"),
        ("model_config", "_model_info", SimpleNamespace(is_hybrid=True), "Mamba or linear"),
    ],
    ids=["elastic EP", "asynchronous speculation", "hybrid model"],
)
def test_what_would_be_served_wrongly_is_refused(
    tiny_llama: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    name: str,
    value: Any,
    reason: str,
) -> None:
    from vllm_turboquant import backend

    config = engine_config(tiny_llama)
    monkeypatch.setattr(config.scheduler_config, "async_scheduling", True)
    monkeypatch.setattr(backend, "_device_checks", lambda *needs: [])
    monkeypatch.setattr(backend.current_platform, "is_cpu", lambda: False)
    backend.check_config(config)
    monkeypatch.setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(UnsupportedError) as error:
        backend.check_config(config)
    assert_one_line(error.value, reason)


def test_a_draft_model_alone_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine_config(tiny_llama, kv_cache_dtype="auto")
    drafting = SimpleNamespace(kv_cache_dtype="turboquant3")
    monkeypatch.setattr(config, "speculative_config", drafting)
    with pytest.raises(UnsupportedError) as error:
        current_platform.check_and_update_config(config)
    assert_one_line(error.value, "a draft model alone cannot have this cache")


def test_attention_that_is_not_causal_is_refused(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama)
    layer = build_layer(config)
    spec = replace(layer.get_kv_cache_spec(config), non_causal=True, state_content_bytes=None)
    with pytest.raises(UnsupportedError) as error:
        layer.attn_backend.customize_spec(spec)
    assert_one_line(error.value, "attention that is not causal is not supported")


def test_a_layer_with_an_attention_of_its_own_is_refused(tiny_llama: Path) -> None:
    from vllm_turboquant.attention import coded_layers

    config = engine_config(tiny_llama)
    layer = build_layer(config)
    assert list(coded_layers(config).values()) == [layer]
    layer.impl = SimpleNamespace()
    with pytest.raises(UnsupportedError) as error:
        coded_layers(config)
    reason = "the attention of model.layers.0.self_attn.attn is SimpleNamespace, which the model"
    assert_one_line(error.value, reason)


def test_only_our_cache_gets_the_worker_that_measures_keys(tiny_llama: Path) -> None:
    from vllm.v1.worker.worker_base import WorkerBase

    config = engine_config(tiny_llama)
    ours = resolve_obj_by_qualname(config.parallel_config.worker_cls)
    platform = engine_config(tiny_llama, kv_cache_dtype="auto").parallel_config.worker_cls
    assert issubclass(ours, resolve_obj_by_qualname(platform))
    assert issubclass(ours, WorkerBase)
    assert ours.load_model is not resolve_obj_by_qualname(platform).load_model
    current_platform.check_and_update_config(config)  # as where a configuration is derived
    assert resolve_obj_by_qualname(config.parallel_config.worker_cls) is ours


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"recent": 3}, "recent=3: Extra inputs are not permitted"),
        ({"exact_prefill": "yes"}, "exact_prefill='yes': Input should be a valid boolean"),
        (["exact_prefill"], '"turboquant" must be an object'),
        ({"recent_tokens": 24}, "recent_tokens=24: Input should be a multiple of 16"),
        ({"recent_tokens": 128}, "recent_tokens=128: Input should be less than or equal to 112"),
        ({"recent_tokens": -16}, "recent_tokens=-16: Input should be greater than or equal to 0"),
        ({"recent_tokens": True}, "recent_tokens=True: Input should be a valid integer"),
    ],
    ids=["unknown name", "wrong type", "not an object", "odd", "too many", "negative", "no number"],
)
def test_wrong_options_are_refused(tiny_llama: Path, given: Any, reason: str) -> None:
    with pytest.raises(OptionsError) as error:
        engine_config(tiny_llama, additional_config={"turboquant": given})
    assert reason in str(error.value)
    assert "accepted: exact_prefill (bool, default True)" in str(error.value)
    assert "; recent_tokens (int, default 32): " in str(error.value)
    assert "\n" not in str(error.value)


def test_options_of_others_are_left_alone(tiny_llama: Path) -> None:
    config = engine_config(tiny_llama, additional_config={"another_plugin": {"x": 1}})
    assert build_layer(config).attn_backend.get_name() == "TURBOQUANT3"


@pytest.mark.parametrize(
    ("version", "supported"),
    [("0.31.0", False), ("0.32.0+cpu", True), ("0.33.1", True), ("0.34.0", False)],
)
def test_supported_vllm_versions(version: str, supported: bool) -> None:
    assert is_supported_vllm(version) is supported


def test_an_unsupported_vllm_is_named_and_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("vllm.__version__", "0.40.0")
    monkeypatch.setattr(plugin, "register_cache_dtype", lambda *dtype: pytest.fail("registered"))
    monkeypatch.setattr(
        "logging.Logger.warning", lambda self, text, *values: warnings.append(text % values)
    )
    plugin.register()
    assert warnings == [
        "vllm-turboquant 0.1.0 supports vLLM >=0.32,<0.34 and this is 0.40.0: "
        "--kv-cache-dtype turboquant3 is not available"
    ]


def test_a_plain_run_imports_registration_only(tiny_llama: Path) -> None:
    """With another cache dtype, no module of ours beyond the entry point's is ever loaded."""
    program = f"""
import os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM
llm = LLM({str(tiny_llama)!r}, skip_tokenizer_init=True, load_format="dummy", enforce_eager=True,
          max_model_len=64, kv_cache_memory_bytes=1 << 24)
llm.generate([dict(prompt_token_ids=[1, 2, 3])])
print("ours:", sorted(name for name in sys.modules if name.startswith("vllm_turboquant")))
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    ours = ["vllm_turboquant", "vllm_turboquant.compat", "vllm_turboquant.plugin"]
    assert f"ours: {ours}" in result.stdout


def assert_one_line(error: Exception, reason: str) -> None:
    """A refusal names the feature and the way out, in one line."""
    text = str(error)
    assert reason in text
    assert text.startswith("--kv-cache-dtype turboquant3 cannot serve this model as configured: ")
    assert text.endswith("Change that, or use --kv-cache-dtype auto.")
    assert "\n" not in text
