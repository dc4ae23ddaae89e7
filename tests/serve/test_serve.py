"""`vllm serve --kv-cache-dtype turboquant3` end to end, through the OpenAI client."""

from __future__ import annotations

import re

import pytest
import requests

pytest.importorskip("vllm")
from openai import BadRequestError
from vllm_server import Server

from tests.serve.conftest import (
    BLOCK_TOKENS,
    RunServer,
    client,
    complete,
    complete_together,
    metric,
)

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EASY = {
    "The capital of France is": "Paris",
    "1, 2, 3, 4, 5, 6,": "7, 8, 9",
    "The opposite of hot is": "cold",
    "The first president of the United States was George": "Washington",
    "The largest planet in our solar system is": "Jupiter",
}
LONG_PROMPT = "The sky is blue. " * 120 + "The capital of France is"  # about 600 tokens, 3 chunks


@pytest.mark.parametrize("prompt", EASY)
def test_greedy_continuations_are_right(turboquant_server: Server, prompt: str) -> None:
    assert EASY[prompt] in complete(turboquant_server, prompt)


def test_chat(turboquant_server: Server) -> None:
    response = client(turboquant_server).chat.completions.create(
        model=turboquant_server.name,
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        max_tokens=24,
        temperature=0,
    )
    assert "Paris" in (response.choices[0].message.content or "")


def test_a_stream_adds_up_to_the_whole_answer(turboquant_server: Server) -> None:
    prompt = "The capital of France is"
    stream = client(turboquant_server).completions.create(
        model=turboquant_server.name, prompt=prompt, max_tokens=12, temperature=0, stream=True
    )
    pieces = [chunk.choices[0].text for chunk in stream]
    assert len(pieces) > 1
    assert "".join(pieces) == complete(turboquant_server, prompt)


def test_logprobs_name_the_greedy_token_first(turboquant_server: Server) -> None:
    response = client(turboquant_server).completions.create(
        model=turboquant_server.name,
        prompt="The capital of France is",
        max_tokens=4,
        temperature=0,
        logprobs=3,
    )
    logprobs = response.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens and len(logprobs.tokens) == 4
    for token, value, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert value <= 0
        assert max(top, key=top.get) == token


def test_concurrent_requests_are_each_answered_rightly(turboquant_server: Server) -> None:
    prompts = list(EASY) * 8
    answers = [choice.text for choice in complete_together(turboquant_server, prompts)]
    wrong = [(p, a) for p, a in zip(prompts, answers, strict=True) if EASY[p] not in a]
    assert not wrong


def test_a_prompt_longer_than_a_chunk_and_its_prefix_hit(turboquant_server: Server) -> None:
    first = complete(turboquant_server, LONG_PROMPT)
    assert "Paris" in first
    hits = metric(turboquant_server, "vllm:prefix_cache_hits_total")
    assert "Paris" in complete(turboquant_server, LONG_PROMPT)
    assert metric(turboquant_server, "vllm:prefix_cache_hits_total") >= hits + 512


def test_a_request_past_max_model_len_is_refused(turboquant_server: Server) -> None:
    with pytest.raises(BadRequestError, match="maximum context length is 8192 tokens"):
        complete(turboquant_server, "word " * 9000)


def test_capacity_is_5_5_times_that_of_auto(turboquant_server: Server, auto_server: Server) -> None:
    """5.82x by the size of a slot, of which copies take at most 4 %."""
    ours, auto = turboquant_server.capacity(), auto_server.capacity()
    assert (ours.dtype, auto.dtype) == ("turboquant3", "auto")
    assert ours.memory_bytes == auto.memory_bytes > 0
    assert ours.num_tokens >= 5.5 * auto.num_tokens


def test_the_log_states_the_format_once(turboquant_server: Server) -> None:
    assert turboquant_server.log is not None
    lines = [
        line
        for line in turboquant_server.log.read_text().splitlines()
        if "turboquant3 KV cache:" in line
    ]
    assert len(lines) == 1
    assert (
        "44 bytes per token and KV head instead of 256, 5.82x smaller, "
        "in every one of the model's 30 attention layers" in lines[0]
    )


def test_the_log_states_what_copies_take_once(turboquant_server: Server) -> None:
    assert turboquant_server.log is not None
    found = re.findall(
        r"newest 32 or more tokens of 16 requests at a time \(of at most 16\), (\d+) tokens in "
        r"all; [\d.]+ MiB, ([\d.]+) % of the memory",
        turboquant_server.log.read_text(),
    )
    assert len(found) == 1
    assert 16 * 3 * 16 <= int(found[0][0]) <= 16 * 4 * 16  # a window each, and at most a unit more
    assert 3 < float(found[0][1]) <= 4


def test_the_engine_centers_keys_when_it_starts(turboquant_server: Server) -> None:
    """At all positions, keys have much in common with this model; the log says how much, once.

    All layers turn their keys as their rotary embedding says.
    """
    assert turboquant_server.log is not None
    found = re.findall(
        r"keys are centered by the mean over \d+ random tokens, turned to every 512 positions in "
        r"(\d+) of (\d+) layers: up to ([\d.]+) %",
        turboquant_server.log.read_text(),
    )
    assert len(found) == 1
    turned, layers, share = found[0]
    assert turned == layers
    assert float(share) > 70


def test_auto_is_byte_identical_with_and_without_the_plugin(
    auto_server: Server, run_server: RunServer
) -> None:
    def answers(server: Server) -> list[object]:
        return [
            requests.post(
                f"{server.url}/v1/completions",
                json={
                    "model": server.name,
                    "prompt": prompt,
                    "max_tokens": 24,
                    "temperature": 0,
                    "logprobs": 5,
                },
                timeout=300,
            ).json()["choices"]
            for prompt in [*EASY, LONG_PROMPT]
        ]

    with run_server("auto", VLLM_PLUGINS="none") as plain:
        assert answers(plain) == answers(auto_server)


def test_reading_prefill_through_the_cache(run_server: RunServer) -> None:
    """Through codes alone, a prefix hit changes nothing; preempted requests still finish."""
    with run_server(
        "turboquant3",
        '--additional-config={"turboquant": {"exact_prefill": false, "recent_tokens": 0}}',
        "--num-gpu-blocks-override=12",
        f"--max-model-len={8 * BLOCK_TOKENS}",
    ) as server:
        first = complete(server, LONG_PROMPT, max_tokens=32)
        hits = metric(server, "vllm:prefix_cache_hits_total")
        assert complete(server, LONG_PROMPT, max_tokens=32) == first != ""
        assert metric(server, "vllm:prefix_cache_hits_total") >= hits + 512
        # Preemption recomputes in other batches, which rounds differently: ask what is not close.
        sure = [prompt for prompt in EASY if EASY[prompt] in complete(server, prompt)]
        assert sure
        prompts = (sure * 9)[:9]  # of 2 blocks each, where 12 exist
        choices = complete_together(server, prompts, 150, extra_body={"ignore_eos": True})
        assert metric(server, "vllm:num_preemptions_total") > 0
        for prompt, choice in zip(prompts, choices, strict=True):
            assert EASY[prompt] in choice.text[:60]


def test_a_compiled_server_answers(run_server: RunServer) -> None:
    with run_server("turboquant3", "--no-enforce-eager") as server:
        for prompt, answer in EASY.items():
            assert answer in complete(server, prompt)
