"""scripts/decode_client.py against a stand-in for an engine, and the arithmetic of its counters."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import decode_client
import pytest
from decode_client import random_prompts, read_counters, run_decode, time_between_tokens

METRICS = """# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="m"} 2.0
vllm:num_requests_running{engine="1",model_name="m"} 1.0
vllm:num_requests_running_at_most{engine="0"} 9.0
vllm:inter_token_latency_seconds_bucket{engine="0",le="0.01"} 40.0
vllm:inter_token_latency_seconds_sum{engine="0"} 0.5
vllm:inter_token_latency_seconds_count{engine="0"} 50.0
vllm:prefix_cache_hits_total{engine="0"} 96.0
vllm:prefix_cache_queries_total{engine="0"} 1e+02
"""


class Engine(ThreadingHTTPServer):
    """Answers completions after a while, with an hour between tokens, and remembers what it saw."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.lock = threading.Lock()
        self.running = 0
        self.has_prefix_cache = True
        self.requests: list[dict[str, Any]] = []
        self.seen: set[tuple[int, ...]] = set()
        self.tokens = self.hits = self.queries = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Engine

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        engine = self.server
        if engine.running:
            engine.tokens += 1
        self.answer(
            f"vllm:num_requests_running {engine.running}\n"
            f"vllm:inter_token_latency_seconds_sum {3600 * engine.tokens}\n"
            f"vllm:inter_token_latency_seconds_count {engine.tokens}\n"
            f"vllm:prefix_cache_hits_total {engine.hits}\n"
            f"vllm:prefix_cache_queries_total {engine.queries}\n"
        )

    def do_POST(self) -> None:
        engine = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = tuple(request["prompt"])
        with engine.lock:
            engine.running += 1
            engine.requests.append(request)
            engine.queries += len(prompt) * engine.has_prefix_cache
            engine.hits += len(prompt) * (prompt in engine.seen)
            engine.seen.add(prompt)
        time.sleep(0.01 * request["max_tokens"])
        with engine.lock:
            engine.running -= 1
        self.answer("{}" if engine.status == 200 else "out of memory", engine.status)

    def answer(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr(decode_client, "POLL_S", 0.02)
    with Engine(getattr(request, "param", 200)) as engine:
        threading.Thread(target=engine.serve_forever, daemon=True).start()
        yield engine
        engine.shutdown()


def test_contexts_are_in_the_cache_before_the_time_is_taken(engine: Engine) -> None:
    prompts = random_prompts("4k", 3, 40, vocab_size=1000)
    figures = run_decode(engine.url, "m", prompts, output_tokens=50, timeout_s=10)
    passes = [engine.requests[first : first + 3] for first in (0, 3, 6)]
    assert [{r["max_tokens"] for r in requests} for requests in passes] == [{8}, {1}, {50}]
    sent = [sorted(r["prompt"] for r in requests) for requests in passes]
    assert sent[0] == sorted(prompt[-16:] for prompt in prompts)
    assert sent[1] == sent[2] == sorted(prompts)
    assert all(r["ignore_eos"] and r["model"] == "m" for r in engine.requests)
    assert figures["prefix_hits"] == 1
    assert figures["itl_ms"] == 3.6e6
    assert figures["tokens_per_s"] == pytest.approx(3 / 3600, abs=1e-3)
    assert figures["prefill_tokens_per_s"] > 0
    assert 0.5 <= figures["duration_s"] < 5


@pytest.mark.parametrize("engine", [500], indirect=True)
def test_a_failed_request_is_the_outcome(engine: Engine) -> None:
    figures = run_decode(engine.url, "m", [[1, 2]], output_tokens=2, timeout_s=10)
    assert figures == {"error": "HTTPError: HTTP 500: out of memory"}


def test_an_engine_that_takes_too_long_is_the_outcome(engine: Engine) -> None:
    figures = run_decode(engine.url, "m", [[1, 2]], output_tokens=100, timeout_s=0.5)
    assert figures["error"].startswith("ReadTimeout: ")


def test_requests_that_never_all_run_are_the_outcome(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_client, "POLL_S", 60.0)
    figures = run_decode(engine.url, "m", [[1], [2]], output_tokens=2, timeout_s=10)
    assert figures == {"error": "at most 0 of 2 requests were seen to run"}


def test_an_engine_without_a_prefix_cache_is_the_outcome(engine: Engine) -> None:
    engine.has_prefix_cache = False
    figures = run_decode(engine.url, "m", [[1], [2]], output_tokens=50, timeout_s=10)
    assert figures == {"error": "the engine has no prefix cache; start it with prefix caching"}


def test_counters_are_added_up_over_engines() -> None:
    assert read_counters(METRICS) == {
        "running": 3,
        "between_s": 0.5,
        "between": 50,
        "hits": 96,
        "queries": 100,
    }


def test_only_what_happens_while_all_run_counts() -> None:
    rows = [(0, 0, 0), (3, 2, 20), (4, 3, 30), (4, 5, 50), (4, 6, 70), (2, 60, 90)]
    samples = [dict(zip(("running", "between_s", "between"), row, strict=True)) for row in rows]
    assert time_between_tokens(samples, 4) == (6 - 3) / (70 - 30)
    assert time_between_tokens(samples, 3) is None  # seen once
    assert time_between_tokens(samples, 5) is None


def test_prompts_share_nothing_and_can_be_made_again() -> None:
    first, second = (random_prompts(name, 8, 64, vocab_size=500) for name in ("4k-x1", "4k-x16"))
    assert random_prompts("4k-x1", 8, 64, vocab_size=500) == first
    assert len({tuple(prompt[:16]) for prompt in [*first, *second]}) == 16
    assert {len(prompt) for prompt in first} == {64}
    assert all(0 <= token < 500 for prompt in first for token in prompt)
