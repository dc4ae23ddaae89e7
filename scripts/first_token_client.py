"""Times to the first token, for bench_engine.py: engines are asked in turn, prompt by prompt.

What differs between engines can be less than what one engine differs from itself a minute later.
So every prompt goes to each engine before the next prompt does, one request at a time, and nothing
else runs meanwhile. Whom an engine follows changes from prompt to prompt, because who is asked
first, or after a certain other, can be at an advantage.

An answer is one token and not streamed, so that its time is that to the first token. The clock runs
from a request that is serialized already, on a connection that is open already, to the whole
answer: it has the HTTP of both sides, but no tokenizing, because prompts are token ids. They are
random, and no engine gets one twice. The engine's own time, of its histogram, has prefill alone.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import requests
from decode_client import Prompts
from vllm_server import Server, ServerError

WARM_UPS = 3  # prompts


def run_first_token(
    servers: Mapping[str, Server], prompts: Prompts, timeout_s: float
) -> dict[str, dict[str, Any]]:
    """Measure engines that all run and have nothing else to do.

    Args:
        servers: Ready, by any name.
        prompts: Token ids; the first ``WARM_UPS`` do not count.
        timeout_s: How long an answer may take.

    Returns:
        Of each name, figures of one row of bench_engine.py, or why there are none, as ``error``.
        An engine that fails is asked no more, and the others go on.
    """
    clients = {name: FirstTokenClient(server, timeout_s) for name, server in servers.items()}
    requests_of = {name: [c.request(prompt) for prompt in prompts] for name, c in clients.items()}
    names = list(clients)
    for turn in range(len(prompts)):
        if turn == WARM_UPS:
            for client in clients.values():
                client.begin()
        for index in order(len(names), turn):
            clients[names[index]].send(requests_of[names[index]][turn])
    return {name: client.end() for name, client in clients.items()}


def order(count: int, turn: int) -> list[int]:
    """In which order engines get a prompt.

    Rows of Williams' designs: in ``2 * count`` turns each is twice in each place, and follows each
    other one equally often within turns.

    Args:
        count: Number of engines.
        turn: Index of the prompt.
    """
    zigzag = [(step + 1) // 2 if step % 2 else -step // 2 for step in range(count)]  # 0, 1, -1, ..
    row = [(turn + offset) % count for offset in zigzag]
    return row[::-1] if turn // count % 2 else row


def mean_ms(before: tuple[float, int], after: tuple[float, int]) -> float | None:
    """Mean between two looks at ``Server.prefill_time``; None where no request came between."""
    seconds, count = (now - then for now, then in zip(after, before, strict=True))
    return round(1e3 * seconds / count, 3) if count else None


class FirstTokenClient:
    """Sends requests to one engine, until one fails.

    Args:
        server: The engine, ready.
        timeout_s: How long an answer may take.
    """

    def __init__(self, server: Server, timeout_s: float) -> None:
        self.server, self.timeout_s = server, timeout_s
        self.session = requests.Session()
        self.session.trust_env = False  # a proxy of the environment does not serve localhost
        self.times_s: list[float] = []
        self.prefill_before = 0.0, 0
        self.error: str | None = None

    def request(self, prompt: list[int]) -> requests.PreparedRequest:
        """A request for one token, as it is sent."""
        body = {
            "model": self.server.name,
            "prompt": prompt,
            "max_tokens": 1,
            "ignore_eos": True,
            "temperature": 0,
        }
        headers = {"Content-Type": "application/json"}
        url = f"{self.server.url}/v1/completions"
        request = requests.Request("POST", url, headers, data=json.dumps(body).encode())
        return self.session.prepare_request(request)

    def send(self, request: requests.PreparedRequest) -> None:
        """Take the time of one request, unless one has failed."""
        if self.error is not None:
            return
        begin = time.perf_counter()
        try:
            response = self.session.send(request, timeout=self.timeout_s)
        except requests.RequestException as error:
            self.error = f"{type(error).__name__}: {error}"
            return
        self.times_s.append(time.perf_counter() - begin)
        if response.status_code != 200:
            self.error = f"HTTP {response.status_code}: {response.text}"

    def begin(self) -> None:
        """Forget what warmed up."""
        self.times_s.clear()
        self.prefill_before = self._prefill_time()

    def end(self) -> dict[str, Any]:
        """Figures since ``begin``, or the ``error``."""
        self.session.close()
        prefill_ms = mean_ms(self.prefill_before, self._prefill_time())
        if self.error is not None:
            return {"error": self.error}
        quartiles = np.percentile(self.times_s, (25, 50, 75))
        p25_ms, median_ms, p75_ms = (round(1e3 * seconds, 3) for seconds in quartiles.tolist())
        return {
            "ttft_ms": median_ms,
            "ttft_p25_ms": p25_ms,
            "ttft_p75_ms": p75_ms,
            "prefill_ms": prefill_ms,
        }

    def _prefill_time(self) -> tuple[float, int]:
        if self.error is None:
            try:
                return self.server.prefill_time()
            except ServerError as error:
                self.error = str(error)
        return 0.0, 0
