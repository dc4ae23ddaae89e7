"""Key frames are moments of a forward pass, measured again by an independent implementation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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

from vllm_turboquant import measure, plugin
from vllm_turboquant.errors import UnsupportedError
from vllm_turboquant.frame import (
    BALANCE,
    CENTER,
    FIRST_SPAN,
    SINK,
    make_frame,
    plain_frame,
    relative_frame,
)
from vllm_turboquant.layout import SPAN_TOKENS
from vllm_turboquant.measure import (
    BALANCE_EXPONENT,
    MAX_BALANCE,
    NUM_SKIPPED,
    NUM_SPANS,
    NUM_TOKENS,
    SEED,
    KeyMoments,
    balance,
    measure_keys,
    measured_positions,
    positions_to_measure,
)
from vllm_turboquant.span_centers import SAMPLED, Rotations
from vllm_turboquant.worker import MeasuringWorker, PlatformWorker

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(torch.cuda.is_available(), reason="measures in float32, on a CPU"),
]


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
        max_position_embeddings=16 * NUM_TOKENS,
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
    patch.setattr(torch.accelerator, "empty_cache", lambda: None)
    store = tmp_path_factory.mktemp("store") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")
        ensure_model_parallel_initialized(1, 1)
    yield
    cleanup_dist_env_and_memory()
    patch.undo()


def load(
    folder: Path, engine_args: dict[str, Any] | None = None, **options: bool
) -> tuple[nn.Module, VllmConfig]:
    config = EngineArgs(
        model=str(folder),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        kv_cache_dtype="turboquant3",
        additional_config={"turboquant": options},
        **engine_args or {},
    ).create_engine_config()
    with set_current_vllm_config(config):
        return get_model(vllm_config=config), config


def key_frames(model: nn.Module, config: VllmConfig) -> list[Tensor]:
    measure_keys(model, config)
    layers = get_layers_from_vllm_config(config, Attention)
    buffers = dict(model.named_buffers())
    layers = {name: x for name, x in layers.items() if x.kv_cache_dtype == "turboquant3"}
    for name, layer in layers.items():
        impl = layer.impl
        for buffer in ("key_frame", "relative_frame"):  # kernels read what sleep mode restores
            assert buffers[f"{name}.turboquant3_{buffer}"] is getattr(impl, buffer)
        assert torch.equal(impl.relative_frame, relative_frame(impl.key_frame))
    return [layers[name].impl.key_frame for name in sorted(layers)]


def test_key_frames_are_moments_of_a_forward_pass(qwen: Path) -> None:
    got = key_frames(*load(qwen))
    twin = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    queries: list[Tensor] = []  # before RoPE, which keeps the power of a pair of coordinates
    unturned: list[Tensor] = []  # keys before RoPE
    for layer in twin.model.layers:
        for projection, seen_by in (("q_proj", queries), ("k_proj", unturned)):
            getattr(layer.self_attn, projection).register_forward_hook(
                lambda module, inputs, output, seen_by=seen_by: seen_by.append(output[0])
            )
    generator = torch.Generator().manual_seed(SEED)
    ids = torch.randint(twin.config.vocab_size, (1, NUM_TOKENS), generator=generator)
    context = 16 * NUM_TOKENS
    positions = measured_positions(context)[None]
    everywhere = torch.arange(context)[None]
    cos, sin = twin.model.rotary_emb(torch.zeros(1), everywhere)
    cache = twin(
        ids, position_ids=positions, attention_mask=torch.ones_like(ids), use_cache=True
    ).past_key_values
    for layer, key_frame in enumerate(got):
        keys = cache.layers[layer].keys[0]  # [num_kv_heads, num_tokens, head_dim], after RoPE
        center, seen = keys[:, NUM_SKIPPED:].mean(dim=1), keys[:, NUM_SKIPPED:]
        torch.testing.assert_close(key_frame[:, CENTER], center, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(key_frame[:, SINK], keys[:, 0], rtol=1e-3, atol=1e-4)
        mean = unturned[layer][NUM_SKIPPED:].mean(dim=0)
        turned = (mean * cos + torch.cat([-mean[32:], mean[:32]]) * sin)[0]
        by_span = turned.unflatten(0, (-1, SPAN_TOKENS))
        span_centers = key_frame[0, FIRST_SPAN:]
        torch.testing.assert_close(
            span_centers, by_span[:, SAMPLED].mean(dim=1), rtol=1e-3, atol=1e-3
        )
        error = (span_centers - by_span.mean(dim=1)).norm(dim=1)
        assert error.max() < 0.05 * mean.norm()
        # Of a balance, what is left when the keys' part is taken away belongs to the queries.
        near = span_centers[positions[0, NUM_SKIPPED:] // SPAN_TOKENS]
        of_keys = (seen - near).square().mean(dim=1).log()
        of_queries = key_frame[:, BALANCE].log() / BALANCE_EXPONENT + of_keys
        of_queries = (of_queries - of_queries.mean()).exp()
        power = queries[layer][NUM_SKIPPED:].square().mean(dim=0).view(2, 2, 32).mean(dim=0)
        pairs = of_queries.view(2, 32).mean(dim=0), power.mean(dim=0)
        assert torch.corrcoef(torch.stack(pairs))[0, 1] > 0.99


@pytest.mark.parametrize("known", [True, False], ids=["does more", "is unknown"])
def test_one_center_where_rope_does_not_tell(
    qwen: Path, monkeypatch: pytest.MonkeyPatch, known: bool
) -> None:
    """Where the model does more to its keys than its module says, or that is not known at all."""
    want = key_frames(*load(qwen))
    model, config = load(qwen)
    of = Rotations.of

    def other(*args: Any) -> Rotations | None:
        rotations = of(*args)
        return replace(rotations, measured=rotations.measured.flip(0))

    monkeypatch.setattr(Rotations, "of", other if known else lambda *args: None)
    for key_frame, of_spans in zip(key_frames(model, config), want, strict=True):
        assert of_spans.shape[1] == FIRST_SPAN + 16 * NUM_TOKENS // SPAN_TOKENS
        assert not torch.equal(of_spans[:, FIRST_SPAN], of_spans[:, CENTER])
        torch.testing.assert_close(key_frame[:, CENTER], of_spans[:, CENTER])
        assert key_frame.shape[1] == (of_spans.shape[1] if known else FIRST_SPAN)
        assert (key_frame[:, FIRST_SPAN:] == key_frame[:, CENTER, None]).all()


def test_weights_do_not_change_the_shape_of_a_frame(
    qwen: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs read the frames where they are, also when those of reloaded weights are not turned."""
    model, config = load(qwen)
    before = key_frames(model, config)
    of = Rotations.of

    def other(*args: Any) -> Rotations:
        rotations = of(*args)
        assert rotations is not None
        return replace(rotations, measured=rotations.measured.flip(0))

    monkeypatch.setattr(Rotations, "of", other)
    assert all(a is b for a, b in zip(key_frames(model, config), before, strict=True))
    assert all((frame[:, FIRST_SPAN:] == frame[:, CENTER, None]).all() for frame in before)


def test_microbatches_have_one_center(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM does not say where their tokens are."""
    model, config = load(qwen)
    monkeypatch.setattr(type(config.parallel_config), "use_ubatching", True)
    assert all(frame.shape[1] == FIRST_SPAN for frame in key_frames(model, config))


def test_equal_weights_give_equal_frames(qwen: Path) -> None:
    first, second = key_frames(*load(qwen)), key_frames(*load(qwen))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(a[:, CENTER].norm() > 1 for a in first)


def test_layers_of_other_caches_take_part(qwen: Path) -> None:
    """Whose implementations give nothing, or anything, in a run without a cache."""
    model, config = load(qwen, {"kv_cache_dtype_skip_layers": ["0"]})
    (second,) = key_frames(model, config)
    _, want = key_frames(*load(qwen))
    torch.testing.assert_close(second, want, rtol=1e-4, atol=1e-4)
    skipped = get_layers_from_vllm_config(config, Attention)["model.layers.0.self_attn.attn"]
    assert skipped.kv_cache_dtype == "auto"
    assert "forward" not in vars(skipped.impl)


def test_keys_that_are_not_finite_end_the_start(qwen: Path) -> None:
    model, config = load(qwen)
    model.model.layers[1].self_attn.qkv_proj.bias.data.fill_(torch.nan)
    with pytest.raises(
        UnsupportedError, match=r"keys of model\.layers\.1\.self_attn\.attn are not"
    ):
        measure_keys(model, config)


def test_layers_of_a_draft_model_stay_plain(qwen: Path) -> None:
    """They are in the same forward context, but not in the model that runs."""
    model, config = load(qwen)
    want = key_frames(model, config)
    with set_current_vllm_config(config):
        draft = Attention(
            2, 64, 0.125, num_kv_heads=1, cache_config=config.cache_config, prefix="draft.attn"
        )
    assert "draft.attn" in get_layers_from_vllm_config(config, Attention)
    measure_keys(model, config)
    assert torch.equal(draft.impl.key_frame, plain_frame(torch.zeros(1, 64)))
    assert all(frame[:, CENTER].norm() > 1 for frame in want)


def worker_of(model: nn.Module, config: VllmConfig, runner: Any) -> Any:
    """A worker that has loaded a model."""
    made = MeasuringWorker.__new__(MeasuringWorker)
    made.vllm_config, made.model_runner = config, runner
    runner.get_model = lambda: model
    return made


def test_reloaded_weights_are_measured(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = load(qwen)
    before = [frame.clone() for frame in key_frames(model, config)]
    buffers = key_frames(model, config)

    def reload_weights(worker: Any, factor: float) -> None:
        for layer in model.model.layers:
            layer.self_attn.qkv_proj.bias.data.mul_(factor)

    monkeypatch.setattr(PlatformWorker, "reload_weights", reload_weights)
    worker_of(model, config, SimpleNamespace()).reload_weights(2.0)
    for old, new in zip(before, buffers, strict=True):
        assert new[:, CENTER].norm() > 1.9 * old[:, CENTER].norm()


def test_with_adapters_the_model_itself_is_measured(qwen: Path) -> None:
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    want = key_frames(*load(qwen))
    model, config = load(qwen, {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8})
    runner = LoRAModelRunnerMixin()
    with set_current_vllm_config(config):
        adapted = runner.load_lora_model(model, config, torch.device("cpu"))
    worker_of(adapted, config, runner)._measure_keys()
    layers = get_layers_from_vllm_config(config, Attention)
    for name, frame in zip(sorted(layers), want, strict=True):
        torch.testing.assert_close(layers[name].impl.key_frame, frame, rtol=1e-4, atol=1e-4)


def test_frames_depend_on_the_length_of_steps_only_with_adapters(qwen: Path) -> None:
    """Whose layers have room for the tokens of a step."""
    _, config = load(qwen, {"max_num_batched_tokens": 100})
    assert torch.equal(positions_to_measure(config), measured_positions(16 * NUM_TOKENS))
    _, config = load(qwen, {"max_num_batched_tokens": 100, "enable_lora": True})
    positions = positions_to_measure(config)
    assert 80 <= len(positions) <= 100
    assert positions.max() == 16 * NUM_TOKENS - 1


def test_option_leaves_keys_as_they_come(qwen: Path) -> None:
    for key_frame in key_frames(*load(qwen, measure_keys=False)):
        assert torch.equal(key_frame, plain_frame(torch.zeros_like(key_frame[:, CENTER])))


def test_pipeline_stages_use_the_rotated_bias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keys that are nothing but their bias have a center that needs no forward pass."""
    folder = save_qwen(tmp_path, key_weights=0.0)
    measured = key_frames(*load(folder))
    model, config = load(folder)
    monkeypatch.setattr(config.parallel_config, "pipeline_parallel_size", 2)
    monkeypatch.setattr(measure, "_measured_moments", None)
    for key_frame, want in zip(key_frames(model, config), measured, strict=True):
        center = want[:, CENTER]
        frame = make_frame(center, center, torch.ones_like(center), want[:, FIRST_SPAN:])
        torch.testing.assert_close(key_frame, frame, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("max_model_len", [1, 100, NUM_TOKENS, NUM_TOKENS + 1, 2048, 131072])
def test_positions_reach_from_the_first_to_the_last(max_model_len: int) -> None:
    positions = measured_positions(max_model_len)
    assert len(positions) == min(NUM_TOKENS, max_model_len)
    assert positions[:NUM_SKIPPED].tolist() == list(range(min(NUM_SKIPPED, max_model_len)))
    assert positions.min() == 0
    assert positions.max() == max_model_len - 1
    starts = positions[:: NUM_TOKENS // NUM_SPANS]
    assert (starts.diff() >= 0).all()
    if max_model_len > 2048:
        ratios = starts[2:] / starts[1:-1]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=0.02, atol=0)


def test_moments() -> None:
    """The first four tokens are left out, but for the first key, which is the sink."""
    query = torch.tensor([[1.0, 2.0]]).expand(6, 2, 2)
    key = torch.tensor([[8.0, 6.0], [9, 9], [9, 9], [9, 9], [3, 4], [3, -4]])[:, None]
    moments = KeyMoments.of(query, key)
    assert torch.equal(moments.frame[:, CENTER], torch.tensor([[3.0, 0.0]]))
    assert torch.equal(moments.frame[:, SINK], torch.tensor([[8.0, 6.0]]))
    torch.testing.assert_close(moments.share, torch.tensor([0.6]))
    want = balance(torch.tensor([[1.0, 4.0]]), torch.tensor([[0.0, 16.0]]))
    assert torch.equal(moments.frame[:, BALANCE], want)
    nothing = KeyMoments.of(torch.zeros(2, 1, 2), torch.zeros(2, 1, 2))
    assert nothing.share.item() == 0
    assert torch.equal(nothing.frame, plain_frame(torch.zeros(1, 2)))


def test_balance() -> None:
    """Where queries weigh more, keys are stretched; nothing is stretched without end."""
    power = torch.tensor([[1.0, 4.0, 16.0]])
    stretch = balance(power, power.flip(-1))
    torch.testing.assert_close(stretch, (power / power.flip(-1)) ** BALANCE_EXPONENT)
    assert torch.equal(balance(power, power), torch.ones(1, 3))
    extreme = balance(torch.tensor([[1e30, 1e-30, 0.0]]), torch.tensor([[1e-30, 1e30, 0.0]]))
    assert extreme.tolist() == [[MAX_BALANCE, 1 / MAX_BALANCE, 1.0]]
