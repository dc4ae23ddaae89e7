"""scripts/decode_client.py against a real engine."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm")
from decode_client import random_prompts, run_decode
from vllm_server import Server

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

NUM_REQUESTS, INPUT_TOKENS, OUTPUT_TOKENS = 3, 384, 64
CPU_BLOCK_TOKENS = 128


def test_requests_decode_together_from_the_cache(turboquant_server: Server) -> None:
    url, name = turboquant_server.url, turboquant_server.name
    prompts = random_prompts("test", NUM_REQUESTS, INPUT_TOKENS, vocab_size=1000)
    figures = run_decode(url, name, prompts, OUTPUT_TOKENS, timeout_s=300)
    assert "error" not in figures, figures
    # The last block of a prompt is always computed again.
    assert figures["prefix_hits"] == pytest.approx(1 - CPU_BLOCK_TOKENS / INPUT_TOKENS, abs=1e-3)
    # Seen from here, the pass took at least as long as the engine says it decoded.
    tokens_per_s = NUM_REQUESTS * OUTPUT_TOKENS / figures["duration_s"]
    assert 0.2 * figures["tokens_per_s"] < tokens_per_s < 1.1 * figures["tokens_per_s"]
