"""Centers are the mean keys of a forward pass, measured again by an independent implementation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("vllm")
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config
from vllm.config import VllmConfig, get_layers_from_vllm_config, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.model_loader import get_model

from vllm_turboquant import center, plugin
from vllm_turboquant.center import BUFFER, NUM_SKIPPED, NUM_TOKENS, SEED, KeyMoments, center_keys

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two layers of random weights and large biases of keys."""
    return save_qwen(tmp_path_factory.mktemp("qwen"), key_weights=0.02)


def save_qwen(folder: Path, key_weights: float) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2 * NUM_TOKENS,
        tie_word_embeddings=True,
        dtype="float32",
        architectures=["Qwen2ForCausalLM"],
    )
    model = AutoModelForCausalLM.from_config(config).float()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias, std=5.0)
        nn.init.normal_(layer.self_attn.k_proj.weight, std=key_weights)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vLLM's worker sets up on a CPU, with this process alone in all parallel groups."""
    plugin.register()
    patch = pytest.MonkeyPatch()
    if not torch.cuda.is_available():
        patch.setattr(torch.accelerator, "empty_cache", lambda: None)
    store = tmp_path_factory.mktemp("store") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()
    patch.undo()


def load(folder: Path, **options: bool) -> tuple[nn.Module, VllmConfig]:
    config = EngineArgs(
        model=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_dtype="turboquant3",
        additional_config={"turboquant": options},
    ).create_engine_config()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config), config


def centers(model: nn.Module, config: VllmConfig) -> list[Tensor]:
    center_keys(model, config)
    layers = get_layers_from_vllm_config(config, Attention)
    buffers = dict(model.named_buffers())
    for name, layer in layers.items():
        assert buffers[f"{name}.{BUFFER}"] is layer.impl.center, "kernels read what sleep restores"
    return [layers[name].impl.center for name in sorted(layers)]


def test_centers_are_mean_keys(qwen: Path) -> None:
    got = centers(*load(qwen))
    twin = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(twin.config.vocab_size, (1, NUM_TOKENS), generator=generator)
    cache = twin(ids, use_cache=True).past_key_values
    for layer, mean in enumerate(got):
        keys = cache.layers[layer].keys[0]  # [num_kv_heads, num_tokens, head_dim], after RoPE
        torch.testing.assert_close(mean, keys[:, NUM_SKIPPED:].mean(dim=1), rtol=1e-3, atol=1e-4)


def test_equal_weights_give_equal_centers(qwen: Path) -> None:
    first, second = centers(*load(qwen)), centers(*load(qwen))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(a.norm() > 1 for a in first)


def test_option_leaves_centers_zero(qwen: Path) -> None:
    assert all(not mean.any() for mean in centers(*load(qwen, center_keys=False)))


def test_pipeline_stages_use_the_rotated_bias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are nothing but their bias have a center that needs no forward pass."""
    folder = save_qwen(tmp_path, key_weights=0.0)
    measured = centers(*load(folder))
    model, config = load(folder)
    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 2)
    monkeypatch.setattr(center, "_measured_moments", None)
    for mean, want in zip(centers(model, config), measured, strict=True):
        torch.testing.assert_close(mean, want, rtol=1e-4, atol=1e-5)


def test_moments() -> None:
    key = torch.tensor([[[3.0, 4.0]], [[3.0, -4.0]]])
    moments = KeyMoments.of(key)
    assert torch.equal(moments.mean, torch.tensor([[3.0, 0.0]]))
    torch.testing.assert_close(moments.share, torch.tensor([0.6]))
    assert KeyMoments.of(torch.zeros(2, 1, 2)).share.item() == 0
