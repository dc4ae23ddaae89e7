"""scripts/decode_client.py against a real engine."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
import decode_client
from decode_client import DecodeClient, random_prompts, run_decode
from vllm_server import Server

from tests.serve.conftest import BLOCK_TOKENS

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_REQUESTS, INPUT_TOKENS = 3, 3 * BLOCK_TOKENS


def test_requests_decode_together_from_the_cache(
    turboquant_server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many polls see all requests run, even where a token takes a few milliseconds.
    monkeypatch.setattr(decode_client, "POLL_S", 0.01)
    url, name = turboquant_server.url, turboquant_server.name
    prompts = random_prompts("test", NUM_REQUESTS, INPUT_TOKENS, vocab_size=1000)
    figures = run_decode(url, name, prompts, 128, timeout_s=300)
    assert "error" not in figures, figures
    # The last block of a prompt is always computed again.
    assert figures["prefix_hits"] == pytest.approx(1 - BLOCK_TOKENS / INPUT_TOKENS, abs=1e-3)


def test_the_engine_counts_the_time_between_all_tokens_in_seconds(
    turboquant_server: Server,
) -> None:
    client = DecodeClient(turboquant_server.url, turboquant_server.name, timeout_s=300)
    prompts = random_prompts("counters", NUM_REQUESTS, INPUT_TOKENS, vocab_size=1000)
    seconds, samples = client.send(prompts, 16)
    first, last = samples[0], samples[-1]
    assert last["between"] - first["between"] == NUM_REQUESTS * 15
    # From the first token of a request to its last is part of the time it took, seen from here.
    assert 0 < last["between_s"] - first["between_s"] < NUM_REQUESTS * seconds
