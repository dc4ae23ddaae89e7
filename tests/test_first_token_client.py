"""scripts/first_token_client.py against stand-ins for engines."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests
from decode_client import random_prompts
from first_token_client import WARM_UPS, mean_ms, order, run_first_token
from vllm_server import Server, ServerError

PREFILL_S, COLD_PREFILL_S = 0.25, 1000.0  # as a stand-in says, of prompts that count or warm up
Engines = Callable[..., "list[Engine]"]


class Engine(ThreadingHTTPServer):
    """Answers completions, and remembers what it saw.

    Args:
        log: Gets every request and the engine, of all engines that share it.
        delays_s: Of its answers, the last one's forever.
        failing: Index of the request from which on it answers 500.
    """

    def __init__(
        self, log: list[tuple[Engine, dict[str, Any]]], delays_s: Sequence[float], failing: int
    ) -> None:
        self.server = Server(Path("m"), "auto")
        super().__init__(("127.0.0.1", self.server.port), Handler)
        self.log, self.delays_s, self.failing = log, delays_s, failing
        self.connections = self.prefills = 0
        self.prefill_s = 0.0

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [request for engine, request in self.log if engine is self]


class Handler(BaseHTTPRequestHandler):
    server: Engine
    protocol_version = "HTTP/1.1"  # keeps connections
    disable_nagle_algorithm = True  # or an answer waits for 40 ms between its head and its body

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = "vllm:request_prefill_time_seconds"
        self.answer(
            f"# TYPE {name} histogram\n"
            f"{name}_sum {self.server.prefill_s}\n"
            f"{name}_count {self.server.prefills}\n"
        )

    def do_POST(self) -> None:
        engine = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        engine.connections += not hasattr(self, "known")
        self.known = True  # of this connection, whose only handler this is
        index = len(engine.requests)
        engine.log.append((engine, request))
        engine.prefills += 1
        engine.prefill_s += COLD_PREFILL_S if index < WARM_UPS else PREFILL_S
        time.sleep(engine.delays_s[min(index, len(engine.delays_s) - 1)])
        if index < engine.failing:
            self.answer("{}")
        else:
            self.answer("out of memory", 500)

    def answer(self, text: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def engines() -> Iterator[Engines]:
    """Starts stand-ins, each with its delays, that share a log."""
    log: list[tuple[Engine, dict[str, Any]]] = []
    with ExitStack() as running:

        def start(*delays_s: Sequence[float], failing: Sequence[int] = ()) -> list[Engine]:
            limits = [*failing, *[1000] * (len(delays_s) - len(failing))]
            started = [
                running.enter_context(Engine(log, delays, limit))
                for delays, limit in zip(delays_s, limits, strict=True)
            ]
            for engine in started:
                engine.daemon_threads = True
                threading.Thread(target=engine.serve_forever, args=(0.02,), daemon=True).start()
                running.callback(engine.shutdown)
            return started

        yield start


def run(engines: Sequence[Engine], counted: int, timeout_s: float = 10.0) -> list[dict[str, Any]]:
    prompts = random_prompts("ttft", WARM_UPS + counted, 12, vocab_size=1000)
    servers = {str(index): engine.server for index, engine in enumerate(engines)}
    figures = run_first_token(servers, prompts, timeout_s)
    assert list(figures) == list(servers)
    return list(figures.values())


def test_every_prompt_goes_to_each_engine_once_before_the_next(engines: Engines) -> None:
    three = engines([0], [0], [0])
    run(three, 6)
    prompts = random_prompts("ttft", WARM_UPS + 6, 12, vocab_size=1000)
    log = three[0].log
    assert [request["prompt"] for _, request in log] == [p for p in prompts for _ in three]
    for engine in three:
        assert [request["prompt"] for request in engine.requests] == prompts
    asked = [three.index(engine) for engine, _ in log]
    turns = [asked[first : first + 3] for first in range(0, len(asked), 3)]
    assert turns == [order(3, turn) for turn in range(WARM_UPS + 6)]


def test_requests_are_for_one_token_on_one_connection(engines: Engines) -> None:
    pair = engines([0], [0])
    run(pair, 4)
    for engine in pair:
        assert engine.connections == 1
        for request in engine.requests:
            del request["prompt"]
            one = {"model": "m", "max_tokens": 1, "ignore_eos": True, "temperature": 0}
            assert request == one  # not streamed


def test_no_two_requests_run_at_a_time(engines: Engines) -> None:
    pair = engines([0.05], [0.05])
    begin = time.perf_counter()
    run(pair, 3)
    assert time.perf_counter() - begin >= 2 * (WARM_UPS + 3) * 0.05


def test_figures_are_those_of_known_delays(engines: Engines) -> None:
    cold = WARM_UPS * [0.4]
    slow, fast = run(engines([*cold, 0.3, 0.1, 0.15, 0.25, 0.2], [*cold, 0.02]), 5)
    assert slow.keys() == {"ttft_ms", "ttft_p25_ms", "ttft_p75_ms", "prefill_ms"}
    for key, expected_ms in {"ttft_p25_ms": 150, "ttft_ms": 200, "ttft_p75_ms": 250}.items():
        assert expected_ms <= slow[key] < expected_ms + 40, key
        assert 20 <= fast[key] < 60, key
        assert slow[key] == round(slow[key], 3)
    assert slow["prefill_ms"] == fast["prefill_ms"] == 1e3 * PREFILL_S


def test_one_prompt_has_a_median(engines: Engines) -> None:
    (figures,) = run(engines([0]), 1)
    assert figures["ttft_p25_ms"] == figures["ttft_ms"] == figures["ttft_p75_ms"] > 0


@pytest.mark.parametrize("failing", [0, WARM_UPS, WARM_UPS + 3], ids=["cold", "first", "last"])
def test_an_engine_that_fails_is_asked_no_more_and_the_other_is(
    engines: Engines, failing: int
) -> None:
    bad, good = pair = engines([0], [0], failing=[failing])
    failed, figures = run(pair, 4)
    assert failed == {"error": "HTTP 500: out of memory"}
    assert len(bad.requests) == failing + 1
    assert len(good.requests) == WARM_UPS + 4
    assert figures["prefill_ms"] == 1e3 * PREFILL_S


def test_an_engine_that_is_gone_is_the_outcome_of_that_engine(engines: Engines) -> None:
    gone, good = pair = engines([0], [0])
    gone.shutdown()
    gone.server_close()
    failed, figures = run(pair, 2)
    assert failed["error"].startswith("ConnectionError: ")
    assert figures["ttft_ms"] > 0 and len(good.requests) == WARM_UPS + 2


def test_an_engine_that_takes_too_long_is_the_outcome_of_that_engine(engines: Engines) -> None:
    pair = engines([0, 0, 0, 0, 2], [0])
    begin = time.perf_counter()
    failed, figures = run(pair, 3, timeout_s=0.5)
    assert failed["error"].startswith("ReadTimeout: ")
    assert figures["ttft_ms"] > 0
    assert time.perf_counter() - begin < 1.9


def test_an_engine_that_does_not_say_its_own_time_is_the_outcome(
    engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    (mute,) = engines([0])
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.answer("no", 503))
    (failed,) = run([mute], 2)
    assert "/metrics does not answer" in failed["error"]
    assert len(mute.requests) == WARM_UPS


@pytest.mark.parametrize("count", range(2, 7))
def test_each_engine_is_equally_often_at_each_place_and_after_each_other(count: int) -> None:
    rows = [order(count, turn) for turn in range(2 * count)]
    everyone = list(range(count))
    assert all(sorted(row) == everyone for row in rows)
    assert all(sorted(place) == sorted(2 * everyone) for place in zip(*rows, strict=True))
    follows = Counter(pair for row in rows for pair in pairwise(row))
    assert set(follows.values()) == {2} and len(follows) == count * (count - 1)


def test_an_engine_alone_is_always_asked() -> None:
    assert [order(1, turn) for turn in range(3)] == [[0], [0], [0]]


def test_the_mean_of_a_histogram_is_that_of_what_came_between() -> None:
    assert mean_ms((1000.0, 3), (1001.0, 7)) == 250.0
    assert mean_ms((0.0, 0), (1.0, 3)) == 333.333
    assert mean_ms((1000.0, 3), (1000.0, 3)) is None


def test_prefill_time_is_that_of_all_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vllm:request_prefill_time_seconds"
    lines = [f"# TYPE {name} histogram"]
    for engine, (seconds, count) in enumerate(((1.5, 2), (2.0, 3))):
        labels = f'{{engine="{engine}",model_name="m"}}'
        lines += [f"{name}_count{labels} {count}.0", f"{name}_sum{labels} {seconds}"]
    server = Server(Path("m"), "auto", [])
    answer = SimpleNamespace(text="\n".join(lines) + "\n", raise_for_status=lambda: None)
    monkeypatch.setattr(server._http, "get", lambda *_, **__: answer)
    assert server.prefill_time() == (3.5, 5)

    def refuse(*_: object, **__: object) -> None:
        raise requests.ConnectionError("gone")

    monkeypatch.setattr(server._http, "get", refuse)
    for ask in (server.prefill_time, server.capacity):
        with pytest.raises(ServerError, match="/metrics does not answer"):
            ask()
    with pytest.raises(ServerError, match="/v1/models does not answer"):
        server.max_tokens()
