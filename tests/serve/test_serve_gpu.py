"""`vllm serve --kv-cache-dtype turboquant3` on a GPU, as a user starts it: compiled, with graphs.

    TURBOQUANT_TEST_MODELS=models/a:models/b pytest tests/serve/test_serve_gpu.py

One server per model; without the variable, for every folder in models/. The package need not be
installed: a server also finds the plugin of this working tree.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
from transformers import AutoTokenizer
from vllm_server import Server, served_model

from tests.serve.conftest import ENVIRONMENT, client, complete, complete_together, metric
from vllm_turboquant import plugin
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.options import MAX_COPIES_SHARE

pytestmark = pytest.mark.vllm
ON_GPU = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

ROOT = Path(__file__).resolve().parents[2]
MEMORY_BYTES = 2**30
CHUNK_TOKENS = 2048
NEEDLE_PROMPT_TOKENS = 16384
WEIGHT_BYTES_OF_1B = 2 * 10**9  # smaller models lose the needle without any compression
NUM_REQUESTS = 64
NUM_TOKENS = 64
NUM_COMPARED_TOKENS = 16  # later, an answer can hang on how a single key was coded
NUM_TOP = 20
BLOCK_TOKENS = 16  # vLLM's default on GPUs
NUM_FIRM_PROMPTS = 2
#: How far the rounding of another batch can move one token's lead over another: logits from 16 to
#: 32 are 1 / 8 apart in bfloat16.
CLOSE_NATS = 0.5
#: The same where codes are read: keys that differ in their last bits have other codes, whose errors
#: are as large as ever, but not the same. Small models feel it most.
CLOSE_NATS_AFTER_CODES = 4.0

EASY = {
    "The capital of France is": "Paris",
    "The opposite of hot is": "cold",
    "1, 2, 3, 4, 5, 6,": "7, 8, 9",
    "2 + 2 = 4\n3 + 3 = 6\n4 + 4 =": "8",
}
CODE = "Write a Python function that adds two numbers."
FILLER = "The river runs past the mill. A cart stands by the gate. Rain falls on the roof. "
NEEDLE = "Remember this: the secret number is 73925. "
QUESTION = "\n\nQuestion: What is the secret number?\nAnswer: The secret number is"


def model_folders() -> list[Path]:
    """Folders named in TURBOQUANT_TEST_MODELS, else all in models/."""
    named = os.environ.get("TURBOQUANT_TEST_MODELS")
    if named:
        return [Path(folder).absolute() for folder in named.split(os.pathsep)]
    return sorted(config.parent for config in ROOT.glob("models/*/config.json"))


def plugin_environment(folder: Path) -> dict[str, str]:
    """Variables with which vLLM finds the plugin of this tree, if it is not installed.

    vLLM asks importlib.metadata for entry points, which finds them in a ``.dist-info`` folder that
    lies in any folder of the module search path.

    Args:
        folder: Where to write one.
    """
    if importlib.metadata.entry_points(group="vllm.general_plugins", name="turboquant"):
        return {}
    write_plugin_metadata(folder)
    path = [str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path)}


def write_plugin_metadata(folder: Path) -> None:
    """Write the least that makes importlib.metadata find the plugin."""
    metadata = folder / "vllm_turboquant-0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-turboquant\nVersion: 0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nturboquant = vllm_turboquant.plugin:register\n"
    )


@dataclass(frozen=True)
class Answer:
    """A greedy continuation.

    Attributes:
        text: As it reads.
        tokens: [num_tokens], as they read.
        top: [num_tokens], log-probabilities of the NUM_TOP most likely tokens there.
        prompt_tokens: Length of the prompt; whole blocks before its last token can be a prefix hit.
    """

    text: str
    tokens: Sequence[str]
    top: Sequence[Mapping[str, float]]
    prompt_tokens: int

    def lead(self, position: int, token: str | None = None) -> float:
        """Nats by which the token at ``position`` leads ``token``, or else the next best."""
        mine, top = self.tokens[position], self.top[position]
        others = {other: nats for other, nats in top.items() if other != mine}
        return top[mine] - (others[token] if token else max(others.values()))

    def close(self, position: int) -> float:
        """Leads of fewer nats than this can be lost to the rounding of another batch."""
        reads_codes = position > 0 or self.prompt_tokens > BLOCK_TOKENS
        return CLOSE_NATS_AFTER_CODES if reads_codes else CLOSE_NATS

    def is_firm(self, right: str) -> bool:
        """Whether it starts with ``right``, and would if rounded differently."""
        for position in range(len(self.tokens)):
            if self.lead(position) < self.close(position):
                return False
            if "".join(self.tokens[: position + 1]).lstrip().startswith(right):
                return True
        return False

    def parts_where_close(self, tokens: Sequence[str]) -> bool:
        """Whether the first of the compared tokens that ``tokens`` has otherwise is close."""
        pairs = zip(self.tokens[:NUM_COMPARED_TOKENS], tokens, strict=False)
        for position, (mine, its) in enumerate(pairs):
            if mine != its:
                candidates = self.top[position]
                return its in candidates and self.lead(position, its) < self.close(position)
        return True


def ask(server: Server, prompt: str) -> Answer:
    response = client(server).completions.create(
        model=server.name,
        prompt=prompt,
        max_tokens=NUM_TOKENS,
        temperature=0,
        logprobs=NUM_TOP,
    )
    (choice,), usage = response.choices, response.usage
    assert usage and choice.logprobs
    tokens, top = choice.logprobs.tokens, choice.logprobs.top_logprobs
    assert tokens and top
    return Answer(choice.text, tokens, top, usage.prompt_tokens)


@pytest.fixture(
    scope="module",
    params=[pytest.param(folder, id=folder.name, marks=ON_GPU) for folder in model_folders()],
)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """A server with default settings, but for a small cache and small chunks."""
    folder = tmp_path_factory.mktemp("server")
    arguments = [
        f"--kv-cache-memory-bytes={MEMORY_BYTES}",
        f"--max-num-batched-tokens={CHUNK_TOKENS}",
        "--gpu-memory-utilization=0.3",  # this much of the GPU has to be free
    ]
    environment = {**ENVIRONMENT, **plugin_environment(folder)}
    with Server(
        request.param,
        "turboquant3",
        arguments,
        log=folder / "turboquant3.log",
        environment=environment,
    ) as server:
        server.wait_until_ready()
        yield server


def slot_bytes_of_auto(model: Path) -> tuple[int, int]:
    """head_dim of a model, and bytes that a token takes in a 16-bit cache of all its layers."""
    config = json.loads((model / "config.json").read_text())
    heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    kv_heads = config.get("num_key_value_heads") or heads
    return head_dim, config["num_hidden_layers"] * 2 * kv_heads * head_dim * 2


def needle_prompt(model: Path, tokens: int) -> str:
    """A prompt of at most ``tokens`` tokens, by less than a repetition, with a number in it."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def count(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    repeats = (tokens - count(NEEDLE + QUESTION) - 8) // count(FILLER)
    before = repeats // 3
    return FILLER * before + NEEDLE + FILLER * (repeats - before) + QUESTION


def test_the_engine_is_the_default_one_with_full_and_piecewise_graphs(server: Server) -> None:
    assert server.log is not None
    log = server.log.read_text(errors="replace")
    assert "Using V2 Model Runner" in log
    assert re.search(r"cudagraph_mode\W+CUDAGraphMode\.FULL_AND_PIECEWISE", log)
    assert "setting cudagraph_mode=" not in log  # vLLM's words where a backend cannot do it
    for mode in ("FULL", "PIECEWISE"):
        assert f"Capturing CUDA graphs ({mode}): 100%" in log
    assert "Graph capturing finished" in log


def test_the_cache_holds_as_many_times_more_as_slots_are_smaller(server: Server) -> None:
    """Against what ``auto`` needs by arithmetic, which spares the start of a second engine."""
    head_dim, auto_bytes = slot_bytes_of_auto(server.model)
    capacity = server.capacity()
    assert (capacity.dtype, capacity.memory_bytes) == ("turboquant3", MEMORY_BYTES)
    times_auto = capacity.num_tokens / (MEMORY_BYTES / auto_bytes)
    # Copies take their share of it.
    smaller = SlotLayout(head_dim).compression() / (1 + MAX_COPIES_SHARE)
    assert times_auto == pytest.approx(smaller, rel=0.01)


@pytest.mark.parametrize("prompt", EASY)
def test_greedy_continuations_are_right(server: Server, prompt: str) -> None:
    assert complete(server, prompt).lstrip().startswith(EASY[prompt])


def test_code_is_written_when_asked_for(server: Server) -> None:
    response = client(server).chat.completions.create(
        model=server.name,
        messages=[{"role": "user", "content": CODE}],
        max_tokens=256,  # a docstring may come before the code
        temperature=0,
    )
    answer = response.choices[0].message.content or ""
    assert "def " in answer and "return" in answer


def test_concurrent_requests_are_answered_as_one_alone(server: Server) -> None:
    """Other batches round differently, so answers may part, but only where tokens are close."""
    prompts = (list(EASY) * NUM_REQUESTS)[:NUM_REQUESTS]
    for prompt in EASY:
        ask(server, prompt)  # from now on its whole blocks are a prefix hit
    alone = {prompt: ask(server, prompt) for prompt in EASY}
    choices = complete_together(server, prompts, NUM_TOKENS, logprobs=NUM_TOP)
    firm = [prompt for prompt, right in EASY.items() if alone[prompt].is_firm(right)]
    assert len(firm) >= NUM_FIRM_PROMPTS
    for prompt, choice in zip(prompts, choices, strict=True):
        assert choice.logprobs and choice.logprobs.tokens
        same = alone[prompt].parts_where_close(choice.logprobs.tokens)
        assert same, (alone[prompt].text, choice.text)
        assert prompt not in firm or choice.text.lstrip().startswith(EASY[prompt])


def test_a_long_prompt_in_chunks_and_its_prefix_hit(server: Server) -> None:
    _, max_tokens = served_model(server.url)
    prompt = needle_prompt(server.model, min(NEEDLE_PROMPT_TOKENS, max_tokens - 16))

    def ask() -> tuple[str, int, float]:
        """The answer, the prompt's tokens, and how many of them were a prefix hit."""
        hits = metric(server, "vllm:prefix_cache_hits_total")
        response = client(server).completions.create(
            model=server.name, prompt=prompt, max_tokens=12, temperature=0
        )
        hits = metric(server, "vllm:prefix_cache_hits_total") - hits
        assert response.usage is not None
        return response.choices[0].text, response.usage.prompt_tokens, hits

    first, num_tokens, hits = ask()
    assert num_tokens > 2 * CHUNK_TOKENS
    assert hits == 0
    second, _, hits = ask()
    assert hits > 0.9 * num_tokens
    # The first time, the tokens of the last chunk saw each other before compression: the hits are
    # what must repeat to the letter.
    assert ask()[0] == second != ""
    weight_bytes = sum(file.stat().st_size for file in server.model.glob("*.safetensors"))
    if weight_bytes >= WEIGHT_BYTES_OF_1B:
        assert "73925" in first
        assert "73925" in second


def test_the_metadata_of_the_plugin_is_found_and_loads(tmp_path: Path) -> None:
    write_plugin_metadata(tmp_path)
    (distribution,) = importlib.metadata.distributions(path=[str(tmp_path)])
    (entry,) = distribution.entry_points.select(group="vllm.general_plugins")
    assert (entry.name, entry.load()) == ("turboquant", plugin.register)
