"""Tensor parallelism: what two GPUs serve is what one serves, with twice the room for tokens.

    TURBOQUANT_TEST_MODELS=models/a:models/b pytest tests/serve/test_serve_tp.py

Two servers per model, at the same time: one on the first GPU, one on both. Models whose heads two
GPUs cannot share are left out; tests/test_tensor_parallel.py has their refusal. What a machine
needs besides, such as -cc.pass_config.fuse_allreduce_rms=false where GPUs must not multicast, goes
into TURBOQUANT_TEST_ARGUMENTS.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import torch

pytest.importorskip("vllm")
from vllm_server import Server

from tests.serve.conftest import ENVIRONMENT, client
from tests.serve.key_frames import Frames, join_heads, relative_errors
from tests.serve.test_serve_gpu import model_folders, plugin_environment
from vllm_turboquant.frame import BALANCE, CENTER, SINK

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"),
]

MEMORY_BYTES = 2**30
ARGUMENTS = (
    f"--kv-cache-memory-bytes={MEMORY_BYTES}",
    "--gpu-memory-utilization=0.3",  # both servers have to find this much of the first GPU free
    "--worker-extension-cls=key_frames.KeyFrames",
)
#: Ranks round their partial sums to bfloat16, whose steps are 1 / 256 of a number, in every layer.
#: A sink is the key of one token, the rest of a frame an average over many: there, the cosine of
#: the angle between two vectors is above 0.9999.
FRAME_TOLERANCE = {CENTER: 0.014, SINK: 0.1, BALANCE: 0.014}
NUM_TOKENS = 16
NUM_SAME_TOKENS = 8
NUM_SAME_PROMPTS = 9
#: Of the first token, before which nothing is read from the cache.
FIRST_TOKEN_NATS = 0.25
#: Of later ones: keys and frames that differ in their last bits have other codes, whose errors are
#: as large as ever, but not the same.
MARGIN_NATS = 2.0

EASY = {
    "The capital of France is": "Paris",
    "The opposite of hot is": "cold",
    "1, 2, 3, 4, 5, 6,": "7, 8, 9",
    "2 + 2 = 4\n3 + 3 = 6\n4 + 4 =": "8",
    "days = ['Monday', 'Tuesday',": "'Wednesday', 'Thursday', 'Friday'",
    "The first president of the United States was George": "Washington",
    "The largest planet in our solar system is": "Jupiter",
    "red, orange, yellow, green,": "blue",
    "Mercury, Venus, Earth, Mars,": "Jupiter, Saturn, Uranus, Neptune",
}
PROMPTS = (
    *EASY,
    "def fibonacci(n):\n",
    "import numpy as np\n\ndef mean(values):\n",
    "Water boils when",
)


@dataclass(frozen=True)
class Pair:
    """Servers of one model: on one GPU, and on two."""

    one: Server
    two: Server


@dataclass(frozen=True)
class Answer:
    """A greedy continuation.

    Attributes:
        text: As it reads.
        tokens: [NUM_TOKENS], written "token_id:5", or fewer where the model stopped.
        top: Per token, the log-probabilities of the most likely ones there.
    """

    text: str
    tokens: Sequence[str]
    top: Sequence[Mapping[str, float]]


def shared_by_two(model: Path) -> bool:
    """Whether two GPUs can take half of a model's query and KV heads each."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    return heads % 2 == 0 and (config.get("num_key_value_heads") or heads) % 2 == 0


@contextmanager
def started(model: Path, folder: Path) -> Iterator[Pair]:
    """Both servers of a model, started together and ready.

    Args:
        model: Folder of the model.
        folder: Where logs go.
    """
    arguments = [*ARGUMENTS, *shlex.split(os.environ.get("TURBOQUANT_TEST_ARGUMENTS", ""))]
    plugin = plugin_environment(folder)
    path = [str(Path(__file__).parent), plugin.get("PYTHONPATH") or os.environ.get("PYTHONPATH")]
    variables = {
        **ENVIRONMENT,
        **plugin,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "VLLM_SERVER_DEV_MODE": "1",  # opens /collective_rpc
    }
    with ExitStack() as stack:
        one, two = (
            stack.enter_context(
                Server(
                    model,
                    "turboquant3",
                    [f"--tensor-parallel-size={ranks}", *arguments],
                    log=folder / f"{ranks}.log",
                    environment=variables,
                )
            )
            for ranks in (1, 2)
        )
        one.wait_until_ready()
        two.wait_until_ready()
        yield Pair(one, two)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(folder, id=folder.name) for folder in model_folders() if shared_by_two(folder)
    ],
)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    """Servers with default settings, but for a small cache."""
    with started(request.param, tmp_path_factory.mktemp("servers")) as pair:
        yield pair


def key_frames(server: Server) -> list[Frames]:
    """What every rank measured."""
    response = requests.post(
        f"{server.url}/collective_rpc", json={"method": "key_frames"}, timeout=60
    )
    response.raise_for_status()
    return response.json()["results"]


def ask(server: Server, prompt: str) -> Answer:
    response = client(server).completions.create(
        model=server.name,
        prompt=prompt,
        max_tokens=NUM_TOKENS,
        temperature=0,
        logprobs=5,
        extra_body={"return_tokens_as_token_ids": True},  # different tokens can read the same
    )
    choice = response.choices[0]
    assert choice.logprobs and choice.logprobs.tokens and choice.logprobs.top_logprobs
    return Answer(choice.text, choice.logprobs.tokens, choice.logprobs.top_logprobs)


def first_difference(one: Sequence[str], two: Sequence[str]) -> int:
    """Number of tokens before two answers part."""
    same = [a == b for a, b in zip(one, two, strict=False)]
    return [*same, False].index(False)


def test_both_gpus_capture_full_and_piecewise_graphs(pair: Pair) -> None:
    assert pair.two.log is not None
    log = pair.two.log.read_text(errors="replace")
    assert "world_size=2 rank=1" in log
    assert "setting cudagraph_mode=" not in log  # vLLM's words where a backend cannot do it
    for mode in ("FULL", "PIECEWISE"):
        assert f"Capturing CUDA graphs ({mode}): 100%" in log
    assert "Graph capturing finished" in log


def test_twice_as_many_tokens_fit_into_as_many_bytes_of_each_gpu(pair: Pair) -> None:
    one, two = pair.one.capacity(), pair.two.capacity()
    assert one.memory_bytes == two.memory_bytes == MEMORY_BYTES
    assert two.num_tokens == pytest.approx(2 * one.num_tokens, rel=0.01)


def test_each_gpu_measures_its_heads_as_one_gpu_does(pair: Pair) -> None:
    one, two = key_frames(pair.one), key_frames(pair.two)
    assert (len(one), len(two)) == (1, 2)
    lengths = join_heads(one)
    for name, errors in relative_errors(two, one).items():
        # Keys are rounded, and where they have little in common, their center is much shorter than
        # they are. How long they are is seen from the sink, which is one of them.
        length = lengths[name].norm(dim=-1)
        errors[:, CENTER] *= (length[:, CENTER] / length[:, SINK]).clamp(max=1)
        for row, tolerance in FRAME_TOLERANCE.items():
            assert errors[:, row].max() < tolerance, (name, row)


@pytest.fixture(scope="module")
def answers(pair: Pair) -> list[tuple[Answer, Answer]]:
    """What one GPU says to every prompt, and what two say."""
    return [(ask(pair.one, prompt), ask(pair.two, prompt)) for prompt in PROMPTS]


def test_first_tokens_are_as_likely(answers: list[tuple[Answer, Answer]]) -> None:
    for one, two in answers:
        first = one.tokens[0]
        assert abs(one.top[0][first] - two.top[0][first]) < FIRST_TOKEN_NATS, one


def test_greedy_answers_part_only_where_tokens_are_close(
    answers: list[tuple[Answer, Answer]],
) -> None:
    num_same = 0
    for one, two in answers:
        at = first_difference(one.tokens, two.tokens)
        num_same += at >= min(NUM_SAME_TOKENS, len(one.tokens))
        if one.tokens == two.tokens:
            continue
        first, second = one.tokens[at], two.tokens[at]
        for answer in (one, two):
            top = answer.top[at]
            assert abs(top[first] - top[second]) < MARGIN_NATS, (one.text, two.text, top)
    assert num_same >= NUM_SAME_PROMPTS


@pytest.mark.parametrize("prompt", EASY)
def test_both_are_right(answers: list[tuple[Answer, Answer]], prompt: str) -> None:
    for answer in answers[PROMPTS.index(prompt)]:
        assert answer.text.lstrip().startswith(EASY[prompt])
