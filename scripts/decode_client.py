"""Decoding alone, for bench_engine.py: contexts are in the cache before the time is taken.

A first pass sends every prompt for one token, which leaves its blocks in the engine's prefix cache.
A second pass sends the same prompts and finds them there, so that all requests decode at once and
next to nothing else happens meanwhile. Every prompt is its own: blocks that requests share would
be read from the GPU's L2 cache.

The time between tokens is the engine's, not that of a client: the mean of its own histogram while
all requests run. Prompts are token ids and answers are not streamed, because tokenizing and
streaming a thousand requests can take one process longer than the engine takes to decode them.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
import requests

POLL_S = 0.1
WARM_UP_INPUT, WARM_UP_OUTPUT = 16, 8  # tokens
METRICS = {
    "running": "vllm:num_requests_running",
    "between_s": "vllm:inter_token_latency_seconds_sum",
    "between": "vllm:inter_token_latency_seconds_count",
    "hits": "vllm:prefix_cache_hits_total",
    "queries": "vllm:prefix_cache_queries_total",
}

Prompts = Sequence[list[int]]
Counters = Mapping[str, float]


def random_prompts(name: str, count: int, num_tokens: int, vocab_size: int) -> Prompts:
    """Token ids that no other name has, and no two prompts share.

    Args:
        name: Chooses them.
        count: Number of prompts.
        num_tokens: Length of each.
        vocab_size: Ids are smaller than this.
    """
    generator = np.random.default_rng(list(name.encode()))
    return generator.integers(vocab_size, size=(count, num_tokens)).tolist()


def run_decode(
    url: str, model: str, prompts: Prompts, output_tokens: int, timeout_s: float
) -> dict[str, Any]:
    """Measure requests that decode at once.

    Args:
        url: Of a server with prefix caching, whose cache holds all requests at their end.
        model: Name that it serves.
        prompts: Token ids of each request.
        output_tokens: New tokens of each request.
        timeout_s: How long a pass may take.

    Returns:
        Figures of one row of bench_engine.py, or why there are none, as ``error``.
    """
    client = DecodeClient(url, model, timeout_s)
    try:
        return client.measure(prompts, output_tokens)
    except requests.RequestException as error:
        return {"error": f"{type(error).__name__}: {error}"}


class DecodeClient:
    """Sends completion requests and reads counters.

    Args:
        url: Of the server.
        model: Name that it serves.
        timeout_s: How long an answer may take.
    """

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        self.url, self.model, self.timeout_s = url, model, timeout_s

    def measure(self, prompts: Prompts, output_tokens: int) -> dict[str, Any]:
        """Both passes, after a short one that warms up; see ``run_decode``."""
        self.send([prompt[-WARM_UP_INPUT:] for prompt in prompts], WARM_UP_OUTPUT)
        prefill_s, _ = self.send(prompts, 1)
        decode_s, samples = self.send(prompts, output_tokens)
        first, last = samples[0], samples[-1]
        between_s = time_between_tokens(samples, len(prompts))
        if between_s is None:
            most = max(sample["running"] for sample in samples)
            return {"error": f"at most {most:.0f} of {len(prompts)} requests were seen to run"}
        queries = last["queries"] - first["queries"]
        if not queries:
            return {"error": "the engine has no prefix cache; start it with prefix caching"}
        return {
            "tokens_per_s": round(len(prompts) / between_s, 3),
            "itl_ms": round(1e3 * between_s, 3),
            "duration_s": round(decode_s, 3),
            "prefill_tokens_per_s": round(sum(map(len, prompts)) / prefill_s, 3),
            "prefix_hits": round((last["hits"] - first["hits"]) / queries, 4),
        }

    def send(self, prompts: Prompts, output_tokens: int) -> tuple[float, list[Counters]]:
        """Send all prompts at once.

        Returns:
            Seconds until the last is answered, and the counters before, meanwhile and after.
        """
        bodies = [self._body(prompt, output_tokens) for prompt in prompts]
        samples = [self.counters()]
        begin = time.perf_counter()
        with ThreadPoolExecutor(len(bodies)) as pool:
            answers = [pool.submit(self._post, body) for body in bodies]
            while wait(answers, POLL_S).not_done:
                samples.append(self.counters())
        seconds = time.perf_counter() - begin
        for answer in answers:
            answer.result()
        return seconds, [*samples, self.counters()]

    def counters(self) -> Counters:
        """Read /metrics."""
        with self._session() as session:
            return read_counters(session.get(f"{self.url}/metrics", timeout=self.timeout_s).text)

    def _body(self, prompt: list[int], output_tokens: int) -> bytes:
        request = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": output_tokens,
            "ignore_eos": True,
            "temperature": 0,
        }
        return json.dumps(request).encode()

    def _post(self, body: bytes) -> None:
        headers = {"Content-Type": "application/json"}
        url = f"{self.url}/v1/completions"
        with self._session() as session:
            response = session.post(url, data=body, headers=headers, timeout=self.timeout_s)
        if response.status_code != 200:
            raise requests.HTTPError(f"HTTP {response.status_code}: {response.text}")

    @contextmanager
    def _session(self) -> Iterator[requests.Session]:
        with requests.Session() as session:
            session.trust_env = False  # a proxy named in the environment does not serve localhost
            yield session


def read_counters(text: str) -> Counters:
    """The counters of ``METRICS`` in the text of /metrics, added up over their labels."""
    return {
        key: sum(map(float, re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)))
        for key, name in METRICS.items()
    }


def time_between_tokens(samples: Sequence[Counters], num_requests: int) -> float | None:
    """Mean seconds between two tokens of a request while all requests ran.

    Args:
        samples: Counters in the course of a pass.
        num_requests: Number of all requests.

    Returns:
        None where fewer than two samples saw them all, or no token came between.
    """
    full = [sample for sample in samples if sample["running"] == num_requests]
    if not full:
        return None
    number = full[-1]["between"] - full[0]["between"]
    return (full[-1]["between_s"] - full[0]["between_s"]) / number if number else None
