"""Two ranks on a CPU measure and answer as one does; for GPUs, see tests/serve/test_serve_tp.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm")
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen2Config
from vllm.engine.arg_utils import EngineArgs

from tests.serve.key_frames import Frames, KeyFrames, relative_errors
from vllm_turboquant.frame import CENTER, SINK

pytestmark = pytest.mark.vllm


def slow_on_a_cpu(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts engines of float32 models."""
    on_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="starts engines on a CPU")
    return pytest.mark.slow(on_gpu(test))


ROOT = Path(__file__).resolve().parent.parent
NUM_HEADS = 4
NUM_TOKENS = 200
PROGRAM = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams

arguments, prompt, result = sys.argv[1:]
llm = LLM(**json.loads(arguments))
parameters = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
(output,) = llm.generate({"prompt_token_ids": json.loads(prompt)}, parameters)
logprobs = [next(iter(position.values())).logprob for position in output.prompt_logprobs[1:]]
answer = {"frames": llm.collective_rpc("key_frames"), "logprobs": logprobs}
Path(result).write_text(json.dumps(answer))
"""


@dataclass(frozen=True)
class Answer:
    """What an engine said.

    Attributes:
        frames: Key frames of every rank.
        logprobs: [NUM_TOKENS - 1], of the prompt's tokens, read back from the cache.
    """

    frames: list[Frames]
    logprobs: Tensor


def ask(model: Path, ranks: int, folder: Path) -> Answer:
    """Start an engine in a process of its own and let it rate random tokens."""
    arguments = {
        "model": str(model),
        "tensor_parallel_size": ranks,
        "kv_cache_dtype": "turboquant3",
        "additional_config": {"turboquant": {"exact_prefill": False}},
        "worker_extension_cls": "key_frames.KeyFrames",
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 1 << 24,
    }
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(512, (NUM_TOKENS,), generator=generator).tolist()
    path = [str(ROOT / "tests" / "serve"), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else two ranks need two NUMA nodes
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to wait for
        "VLLM_NO_USAGE_STATS": "1",
    }
    result = folder / f"{ranks}.json"
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments), json.dumps(prompt)]
    done = subprocess.run([*command, str(result)], env=environment, capture_output=True, text=True)
    assert result.exists(), done.stderr[-4000:]
    answer = json.loads(result.read_text())
    return Answer(answer["frames"], torch.tensor(answer["logprobs"]))


def save_qwen(folder: Path, num_kv_heads: int) -> Path:
    """Two layers of random weights, large enough for attention to matter, and biases of keys."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=512,
        hidden_size=64 * NUM_HEADS,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=512,
        initializer_range=0.1,
        architectures=["Qwen2ForCausalLM"],
    )
    model = AutoModelForCausalLM.from_config(config).float()
    for layer in model.model.layers:
        nn.init.normal_(layer.self_attn.k_proj.bias, std=5.0)
    model.save_pretrained(folder)
    return folder


@slow_on_a_cpu
def test_two_ranks_with_a_head_each_measure_and_answer_what_one_does(tmp_path: Path) -> None:
    model = save_qwen(tmp_path / "model", num_kv_heads=2)
    one, two = (ask(model, ranks, tmp_path) for ranks in (1, 2))
    for name, errors in relative_errors(two.frames, one.frames).items():
        assert errors.shape[0] == 2
        assert errors.max() < 1e-4, name
    assert one.logprobs.std() > 1
    torch.testing.assert_close(two.logprobs, one.logprobs, rtol=0, atol=1e-3)


@slow_on_a_cpu
def test_two_ranks_with_the_same_head_measure_the_same_origins(tmp_path: Path) -> None:
    """Each rank balances that head's coordinates for its own queries, so codes may differ."""
    model = save_qwen(tmp_path / "model", num_kv_heads=1)
    one, two = (ask(model, ranks, tmp_path) for ranks in (1, 2))
    for name, errors in relative_errors(two.frames, one.frames).items():
        assert errors.shape[0] == 2
        assert errors[:, [CENTER, SINK]].max() < 1e-4, name


def test_heads_that_cannot_be_split_are_refused_in_the_words_of_vllm(tmp_path: Path) -> None:
    """As for SmolLM2-135M on two GPUs."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "num_hidden_layers": 2,
        "vocab_size": 512,
        "max_position_embeddings": 512,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    lines = {}
    for dtype in ("auto", "turboquant3"):
        with pytest.raises(ValueError) as error:
            EngineArgs(
                model=str(tmp_path),
                kv_cache_dtype=dtype,
                tensor_parallel_size=2,
                distributed_executor_backend="mp",
                skip_tokenizer_init=True,
            ).create_engine_config()
        _, line, _ = str(error.value).splitlines()  # what pydantic says before and after
        lines[dtype] = line.split(" [type=")[0].strip()
    assert (
        lines["turboquant3"]
        == lines["auto"]
        == (
            "Value error, Total number of attention heads (9) must be divisible by tensor parallel "
            "size (2)."
        )
    )


def test_only_frames_are_read() -> None:
    """On GPUs a layer also keeps the tickets of its kernel, which belong to no head."""
    layer = nn.Module()
    for name in ("key_frame", "relative_frame", "tickets"):
        layer.register_buffer(f"turboquant3_{name}", torch.zeros(2))
    layer.register_buffer("key_frame", torch.zeros(2))
    worker = KeyFrames()
    worker.model_runner = SimpleNamespace(get_model=lambda: nn.ModuleDict({"attn": layer}))
    assert set(worker.key_frames()) == {
        "attn.turboquant3_key_frame",
        "attn.turboquant3_relative_frame",
    }
