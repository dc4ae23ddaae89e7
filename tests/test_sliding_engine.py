"""Engines of a small Gemma 3 on a CPU: most of its layers have a sliding window."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("vllm")
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="starts engines on a CPU"),
]
NUM_TOKENS, NUM_ANSWERED = 400, 24
PROGRAM = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams

arguments, prompt, num_answered, result = sys.argv[1:]
llm = LLM(**json.loads(arguments))
rated = SamplingParams(max_tokens=int(num_answered), temperature=0, logprobs=0, prompt_logprobs=0,
                       ignore_eos=True, detokenize=False)
# Without logprobs of the prompt, its blocks are found in the prefix cache.
hit = SamplingParams(max_tokens=int(num_answered), temperature=0, logprobs=0, ignore_eos=True,
                     detokenize=False)
tokens = {"prompt_token_ids": json.loads(prompt)}
first, second = (llm.generate(tokens, parameters)[0] for parameters in (rated, hit))

def logprobs(positions):
    return [next(iter(position.values())).logprob for position in positions]

cache = llm.llm_engine.vllm_config.cache_config
answer = {
    "prompt": logprobs(first.prompt_logprobs[1:]),
    "first": logprobs(first.outputs[0].logprobs),
    "second": logprobs(second.outputs[0].logprobs),
    "num_cached": second.num_cached_tokens,
    "capacity": cache.num_gpu_blocks * cache.block_size,
}
Path(result).write_text(json.dumps(answer))
"""


@dataclass(frozen=True)
class Answer:
    """What an engine said of random tokens and of those it answered with.

    Attributes:
        prompt: [NUM_TOKENS - 1] log-probabilities.
        first: [NUM_ANSWERED] likewise.
        second: As ``first``, of the same prompt when it was in the prefix cache.
        num_cached: Tokens that were found there.
        capacity: Tokens of all blocks.
    """

    prompt: Tensor
    first: Tensor
    second: Tensor
    num_cached: int
    capacity: int


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with six layers of random weights, large enough for attention to matter."""
    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=40,
        max_position_embeddings=1024,
        initializer_range=0.1,
        dtype="float32",
        architectures=["Gemma3ForCausalLM"],
    )
    AutoModelForCausalLM.from_config(config).float().save_pretrained(folder)
    return folder


@cache
def ask(
    model: Path, cache_dtype: str, hybrid: bool, step_tokens: int, exact_prefill: bool = False
) -> Answer:
    """Start an engine in a process of its own and let it rate random tokens."""
    arguments = {
        "model": str(model),
        "kv_cache_dtype": cache_dtype,
        "additional_config": {"turboquant": {"exact_prefill": exact_prefill}},
        "disable_hybrid_kv_cache_manager": not hybrid,
        "max_num_batched_tokens": step_tokens,
        "max_num_seqs": 8,
        "dtype": "float32",
        "block_size": 32,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "kv_cache_memory_bytes": 1 << 26,
    }
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(512, (NUM_TOKENS,), generator=generator).tolist()
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process less to wait for
        "VLLM_NO_USAGE_STATS": "1",
    }
    result = model / f"{cache_dtype}-{hybrid}-{step_tokens}-{exact_prefill}.json"
    command = [sys.executable, "-c", PROGRAM, json.dumps(arguments), json.dumps(prompt)]
    done = subprocess.run(
        [*command, str(NUM_ANSWERED), str(result)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.exists(), done.stderr[-4000:]
    answer = json.loads(result.read_text())
    lists = {name: torch.tensor(answer.pop(name)) for name in ("prompt", "first", "second")}
    return Answer(**lists, **answer)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().mean())


HYBRID_OR_NOT = pytest.mark.parametrize("hybrid", [True, False], ids=["hybrid", "one group"])


@HYBRID_OR_NOT
def test_steps_of_any_length_give_the_same(gemma: Path, hybrid: bool) -> None:
    """Read back from codes, a prompt in chunks, a whole one and a cached one are alike."""
    whole = ask(gemma, "turboquant3", True, 512)
    chunks = ask(gemma, "turboquant3", hybrid, 64)
    for name in ("prompt", "first", "second"):
        assert distance(getattr(chunks, name), getattr(whole, name)) < 1e-3
    assert distance(chunks.first, chunks.second) < 1e-3
    assert chunks.num_cached >= NUM_TOKENS - 64


@HYBRID_OR_NOT
def test_chunks_are_near_those_of_an_uncompressed_cache(gemma: Path, hybrid: bool) -> None:
    """Only earlier tokens are compressed. Windows of 36 or 44 tokens would be 0.35 away."""
    exact = ask(gemma, "auto", True, 512)
    got = ask(gemma, "turboquant3", hybrid, 64, True)
    assert distance(got.prompt, exact.prompt) < 0.15


def test_a_whole_prompt_that_sees_itself_exactly_is_exact(gemma: Path) -> None:
    exact = ask(gemma, "auto", True, 512)
    got = ask(gemma, "turboquant3", True, 512, True)
    assert distance(got.prompt, exact.prompt) < 1e-3


@HYBRID_OR_NOT
def test_capacity(gemma: Path, hybrid: bool) -> None:
    """Pages of all layers are 12 times smaller than those of float32, copies not counted."""
    exact = ask(gemma, "auto", hybrid, 64)
    got = ask(gemma, "turboquant3", hybrid, 64)
    assert got.capacity > 11 * exact.capacity
