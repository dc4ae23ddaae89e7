"""What scripts/bench_engine.py does around the engines: workloads, record, failures, tables."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import bench_engine
import pytest
from bench_engine import Record, run_engine, run_together
from decode_client import Prompts
from engine_workloads import QUICK, SETS, Workload
from first_token_client import WARM_UPS
from rich.console import Console
from vllm_server import Capacity, Server, ServerError, last_error, started, vllm_command

SETUP = {"device": "A GPU", "vllm": "0.32.0"}
SHORT = Workload("short", 32, 8, 4, 8)
LONG = Workload("long", 64, 1, 1, 5)
DECODE = Workload("decode", 32, 8, 16, 16, decode=True)
FIRST = Workload("ttft", 32, 1, 1, 5, first_token=True)
FIGURES = {"tokens_per_s": 100.0, "ttft_ms": 10.0, "itl_ms": 2.0, "itl_p99_ms": 3.0}

# The ends of real logs, shortened.
REFUSED_ARGUMENT = """usage: vllm serve [model_tag] [options]
vllm serve: error: argument --kv-cache-dtype: invalid choice: 'fp9' (choose from 'auto', 'fp8')
"""
FAILED_CORE = """(EngineCore pid=8948) ERROR 11-24 20:30:28 [core.py:1510]     raise ValueError(
(EngineCore pid=8948) ERROR 11-24 20:30:28 [core.py:1510] ValueError: No available memory.
(APIServer pid=8855)     raise RuntimeError(
(APIServer pid=8855) RuntimeError: Engine core initialization failed. See root cause above. {}
resource_tracker.py:254: UserWarning: There appear to be 1 leaked shared_memory objects
  warnings.warn('resource_tracker: There appear to be %d '
"""


class FakeServer:
    """A server that gets ready, or says why not, without an engine."""

    port, name, model = 1, "m", Path("m")

    def __init__(
        self,
        log: str = "",
        failure: str = "",
        exit_code: int | None = None,
        max_tokens: int | None = 100,
    ) -> None:
        self.log, self.failure, self.most = log, failure, max_tokens
        self.process = SimpleNamespace(poll=lambda: exit_code)
        self.start_s, self.events = 1.0, list[str]()
        self.stopped = False
        self.prefills = 0

    def __enter__(self) -> FakeServer:
        self.events.append("start")
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped = True

    def wait_until_ready(self, timeout_s: float) -> None:
        self.events.append("wait")
        if self.failure:
            raise ServerError(self.failure)

    def capacity(self) -> Capacity:
        assert not self.failure, "nobody answers"
        return Capacity("auto", 400, 1 << 20)

    def max_tokens(self) -> int:
        if self.most is None:
            raise ServerError("/v1/models does not answer")
        return self.most

    def prefill_time(self) -> tuple[float, int]:
        self.prefills += 1  # four requests, two seconds, at every look
        return 2.0 * self.prefills, 4 * self.prefills

    def log_tail(self, lines: int) -> str:
        return self.log


class FakeClient:
    """Answers ``submit(run_client or run_decode, ...)`` with the next of ``results``."""

    def __init__(self, *results: dict[str, Any]) -> None:
        self.results: list[dict[str, Any]] = list(results)
        self.asked: list[Any] = []  # arguments of run_client, and all of run_decode

    def submit(self, function: Any, *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        if function is bench_engine.import_client:
            future.set_result(None)
            return future
        self.asked.append(arguments[0] if function is bench_engine.run_client else arguments)
        future.set_result(self.results.pop(0))
        return future


class FakeFirstTokens:
    """Answers in the place of ``run_first_token``: 10 ms, and one more for every further engine."""

    def __init__(self) -> None:
        self.asked: list[tuple[Mapping[str, Any], Prompts, float]] = []
        self.errors: dict[str, str] = {}
        self.then: Callable[[], None] = lambda: None

    def __call__(
        self, servers: Mapping[str, Any], prompts: Prompts, timeout_s: float
    ) -> dict[str, dict[str, Any]]:
        self.asked.append((servers, prompts, timeout_s))
        self.then()
        rows: dict[str, dict[str, Any]] = {}
        for ms, name in enumerate(servers, 10):
            ttft = {"ttft_ms": float(ms), "ttft_p25_ms": ms - 1.0, "ttft_p75_ms": ms + 1.0}
            rows[name] = {**ttft, "prefill_ms": 9.0}
        return rows | {name: {"error": error} for name, error in self.errors.items()}


@pytest.fixture
def ask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFirstTokens:
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 100}}')
    monkeypatch.setattr(FakeServer, "model", tmp_path)
    fake = FakeFirstTokens()
    monkeypatch.setattr(bench_engine, "run_first_token", fake)
    return fake


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "engine.json", SETUP, resume=False)


def on_disk(record: Record) -> dict[str, Any]:
    return json.loads(record.path.read_text())


def printed(*tables: Any) -> str:
    console = Console(width=140, record=True)
    for table in tables:
        console.print(table)
    return console.export_text()


def test_workloads_are_read() -> None:
    assert Workload.parse("mine=4096,128,16,48") == Workload("mine", 4096, 128, 16, 48)
    assert Workload.parse("mine=4096,128,fit,48").concurrency is None
    assert Workload.parse("chat") == SETS["requests"]["chat"]
    assert Workload.parse("4k-x1", "decode") == Workload("4k-x1", 4096, 512, 1, 1, decode=True)
    assert Workload.parse("mine=32,8,fit,16", "decode").decode


@pytest.mark.parametrize("text", ["chatter", "=1,1,1,1", "a=1,1,1", "a=1,1,1,0", "a=fit,1,1,1"])
def test_other_workloads_are_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"is no workload; give NAME=.*chat, 4k"):
        Workload.parse(text)


def test_decoding_is_measured_at_three_contexts_and_three_numbers_of_requests() -> None:
    names = [f"{context}-{n}" for context in ("4k", "16k", "32k") for n in ("x1", "x16", "fit")]
    assert list(SETS["decode"]) == names
    # vLLM's blocks have 16 tokens on GPUs and 128 on CPUs: then what fits fits to the last token.
    assert all(workload.request_tokens % 128 == 0 for workload in SETS["decode"].values())
    assert max(workload.request_tokens for workload in SETS["decode"].values()) == 32768
    assert all(set(names) <= set(SETS[name]) for name, names in QUICK.items())


def test_first_tokens_are_those_of_one_request_at_a_time() -> None:
    ours = {name: w for name, w in SETS["requests"].items() if w.first_token}
    assert list(ours) == [name for name in SETS["requests"] if name.startswith("ttft-")]
    assert all((w.output_tokens, w.clients(9)) == (1, 1) for w in ours.values())
    assert all(w.prompts >= 20 for w in ours.values())  # fewer have no quartiles to speak of
    assert not any(w.first_token for w in SETS["decode"].values())


@pytest.mark.parametrize(("fit", "clients"), [(0, 1), (5, 5), (9, 8)])
def test_fit_takes_as_many_requests_as_fit_and_there_are(fit: int, clients: int) -> None:
    assert Workload("fit", 32, 8, None, 8).clients(fit) == clients
    assert SHORT.clients(fit) == 4


@pytest.mark.parametrize(("fit", "clients"), [(0, 1), (5, 5), (90, 16)])
def test_no_more_requests_decode_than_fit(fit: int, clients: int) -> None:
    assert DECODE.clients(fit) == clients


@pytest.mark.parametrize(
    ("log", "error"),
    [
        (REFUSED_ARGUMENT, "error: argument --kv-cache-dtype: invalid choice: 'fp9' (choose from "
        "'auto', 'fp8')"),
        (FAILED_CORE, "ValueError: No available memory."),
        ("INFO started\nKilled\n", "Killed"),
        ("", "no output"),
    ],
    ids=["argument", "engine core", "no error", "empty"],
)  # fmt: skip
def test_the_last_error_of_a_log(log: str, error: str) -> None:
    assert last_error(log) == error


def test_an_engine_is_measured_and_the_record_written_after_every_workload(record: Record) -> None:
    client = FakeClient(FIGURES)
    with pytest.raises(IndexError):  # cut off before the second result
        run_engine(FakeServer(), "auto", [SHORT, LONG], record, client)
    written = on_disk(record)
    assert written["setup"] == SETUP
    assert written["engines"]["auto"]["capacity_tokens"] == 400
    assert [row["name"] for row in written["rows"]] == ["short"]
    assert written["rows"][0].items() >= {"clients": 4, "requests_that_fit": 10, **FIGURES}.items()
    assert written["rows"][0]["prefill_ms"] == 500.0
    assert "--random-input-len=32" in client.asked[0]
    assert "--max-concurrency=4" in client.asked[0]


def test_decoding_is_measured_by_its_own_client(record: Record, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 100}')
    server, client = FakeServer(), FakeClient(FIGURES)
    server.model = tmp_path
    run_engine(server, "auto", [DECODE], record, client)
    ((url, model, prompts, output_tokens, _),) = client.asked
    assert (url, model, output_tokens) == ("http://127.0.0.1:1", "m", 8)
    assert [len(prompt) for prompt in prompts] == 10 * [32]  # 400 tokens fit
    (row,) = on_disk(record)["rows"]
    assert row.items() >= {"name": "decode", "decode": True, "clients": 10, **FIGURES}.items()


def test_engines_that_run_together_are_asked_for_first_tokens_together(
    record: Record, ask: FakeFirstTokens
) -> None:
    first, failed, last = FakeServer(), FakeServer(failure="did not start"), FakeServer()
    engines = [
        (server, dtype, [SHORT, FIRST])
        for server, dtype in ((first, "auto"), (failed, "fp8"), (last, "turboquant3"))
    ]
    run_together(engines, record)
    ((servers, prompts, timeout_s),) = ask.asked
    assert servers == {"auto": first, "turboquant3": last}
    assert [len(prompt) for prompt in prompts] == (WARM_UPS + 5) * [32]
    assert all(0 <= token < 100 for prompt in prompts for token in prompt)
    assert timeout_s == bench_engine.WORKLOAD_TIMEOUT_S
    rows = {row["kv_cache_dtype"]: row for row in on_disk(record)["rows"]}
    assert rows.keys() == {"auto", "turboquant3"}
    shape = {"name": "ttft", "first_token": True, "clients": 1, "requests_that_fit": 400 // 33}
    for index, row in enumerate(rows.values()):
        assert row.items() >= {**shape, "ttft_ms": 10.0 + index, "prefill_ms": 9.0}.items()
    assert [workloads for *_, workloads in engines] == [[SHORT], [SHORT, FIRST], [SHORT]]


def test_an_engine_that_fails_does_not_end_the_measurement_of_others(
    record: Record, ask: FakeFirstTokens
) -> None:
    ask.errors = {"int4": "HTTP 500: out of memory"}
    servers = {
        "auto": FakeServer(exit_code=1),
        "mute": FakeServer(max_tokens=None),
        "small": FakeServer(max_tokens=32),
        "int4": FakeServer(),
        "turboquant3": FakeServer(),
    }
    run_together([(server, dtype, [FIRST]) for dtype, server in servers.items()], record)
    assert [list(asked) for asked, *_ in ask.asked] == [["int4", "turboquant3"]]
    rows = {row["kv_cache_dtype"]: row for row in on_disk(record)["rows"]}
    assert {dtype: row.get("error") for dtype, row in rows.items()} == {
        "auto": "vllm serve has ended",
        "mute": "/v1/models does not answer",
        "small": "the model takes at most 32 tokens a request",
        "int4": "HTTP 500: out of memory",
        "turboquant3": None,
    }
    assert "failed" in printed(bench_engine.speed_table(list(rows.values())))


def test_an_engine_without_a_capacity_is_left_to_its_own_measurement(
    record: Record, ask: FakeFirstTokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    mute = FakeServer()
    monkeypatch.setattr(mute, "capacity", Mock(side_effect=ServerError("does not answer")))
    engines = [(mute, "auto", [FIRST]), (FakeServer(), "turboquant3", [FIRST])]
    run_together(engines, record)
    assert [list(asked) for asked, *_ in ask.asked] == [["turboquant3"]]
    assert [workloads for *_, workloads in engines] == [[FIRST], []]


def test_an_engine_alone_is_asked_for_first_tokens_the_same_way(
    record: Record, ask: FakeFirstTokens
) -> None:
    server, client = FakeServer(), FakeClient(FIGURES)
    run_engine(server, "auto", [FIRST, SHORT], record, client)
    ((servers, prompts, _),) = ask.asked
    assert (servers, len(prompts)) == ({"auto": server}, WARM_UPS + 5)
    first, short = on_disk(record)["rows"]
    assert (first["ttft_ms"], first["ttft_p75_ms"]) == (10.0, 11.0)
    assert short["ttft_ms"] == FIGURES["ttft_ms"] and len(client.asked) == 1
    table = printed(bench_engine.speed_table([first, short]))
    (line,) = (line for line in table.splitlines() if "ttft: 32/1" in line)
    cells = [cell.strip() for cell in line.strip("│").split("│")]
    assert cells[2:] == ["auto", "-", "10.0 (1.00x)", "9.0 (1.00x)", "-", "-"]


def test_an_engine_that_ends_while_first_tokens_are_measured_is_recorded(
    record: Record, ask: FakeFirstTokens
) -> None:
    ask.errors = {"auto": "ConnectionError: gone"}
    server = FakeServer(FAILED_CORE)
    ask.then = lambda: setattr(server, "process", SimpleNamespace(poll=lambda: 1))
    run_engine(server, "auto", [FIRST, SHORT], record, FakeClient())
    written = on_disk(record)
    assert [row["error"] for row in written["rows"]] == ["ConnectionError: gone"]
    assert written["engines"]["auto"]["error"].startswith("vllm serve ended while it was measured")


def test_an_engine_that_does_not_start_is_recorded_with_the_reason(record: Record) -> None:
    failure = "vllm serve ended with exit code 1 before it was ready; end of auto.log:\n..."
    server = FakeServer(FAILED_CORE, failure)
    run_engine(server, "fp8", [SHORT], record, FakeClient())
    assert server.stopped
    assert on_disk(record)["engines"]["fp8"]["error"] == (
        "vllm serve ended with exit code 1 before it was ready: ValueError: No available memory."
    )


def test_a_failed_workload_is_recorded_and_the_next_one_measured(record: Record) -> None:
    too_long = Workload("too long", 100, 1, 1, 1)
    client = FakeClient({"error": "3 requests failed"}, FIGURES)
    run_engine(FakeServer(), "auto", [SHORT, too_long, LONG], record, client)
    errors = {row["name"]: row.get("error") for row in on_disk(record)["rows"]}
    assert errors == {
        "short": "3 requests failed",
        "too long": "the model takes at most 100 tokens a request",
        "long": None,
    }


def test_an_engine_that_ends_is_measured_no_further(record: Record) -> None:
    server = FakeServer(FAILED_CORE, exit_code=1)
    run_engine(server, "auto", [SHORT, LONG], record, FakeClient({"error": "gone"}))
    written = on_disk(record)
    assert written["engines"]["auto"]["capacity_tokens"] == 400
    assert written["engines"]["auto"]["error"].startswith(
        "vllm serve ended while it was measured: ValueError"
    )
    assert [row["name"] for row in written["rows"]] == ["short"]


def test_resuming_measures_what_is_missing_failed_or_of_another_shape(record: Record) -> None:
    record.put_row("auto", SHORT, FIGURES)
    record.put_row("auto", LONG, {"error": "gone"})
    again = Record(record.path, dict(SETUP), resume=True)
    assert again.missing("auto", [SHORT, LONG]) == [LONG]
    assert again.missing("fp8", [SHORT]) == [SHORT]
    more = Workload("short", 32, 8, 4, 80)
    assert again.missing("auto", [more]) == [more]
    again.put_row("auto", more, FIGURES)  # takes the place of the row of that name
    assert [row["prompts"] for row in on_disk(again)["rows"] if row["name"] == "short"] == [80]


def test_a_record_is_not_overwritten(record: Record) -> None:
    record.put_row("auto", SHORT, FIGURES)
    with pytest.raises(SystemExit, match="exists; continue it with --resume, or name another file"):
        Record(record.path, SETUP, resume=False)


def test_a_record_of_another_setup_is_not_resumed(record: Record) -> None:
    record.put_row("auto", SHORT, FIGURES)
    with pytest.raises(SystemExit, match=r"\(device was 'A GPU' and is 'Another'\); name another"):
        Record(record.path, {**SETUP, "device": "Another"}, resume=True)


def test_tables_compare_with_auto(record: Record) -> None:
    for dtype, factor in {"auto": 1, "turboquant3": 2}.items():
        record.put_engine(dtype, {"capacity_tokens": 400 * factor, "start_s": 60.0})
        figures = {key: factor * value for key, value in FIGURES.items()}
        record.put_row(dtype, SHORT, {"clients": 4, "requests_that_fit": 3, **figures})
    record.put_engine("fp8", {"error": "no"})
    engines, rows = record.data["engines"], record.data["rows"]
    tables = printed(bench_engine.capacity_table(engines), bench_engine.speed_table(rows))
    lines = [line for line in tables.splitlines() if "turboquant3" in line or "fp8" in line]
    assert "800 (2.00x)" in lines[0] and "failed" in lines[1]
    assert "short: 32/8" in lines[2] and "4, 3 fit" in lines[2]
    for figure in ("200 (2.00x)", "20.0 (2.00x)", "4.00 (2.00x)", "6.00 (2.00x)"):
        assert figure in lines[2]


def test_a_missing_plugin_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_engine, "has_plugin", lambda: False)
    monkeypatch.setattr(sys, "argv", ["bench_engine.py", "m", "--json", str(tmp_path / "e.json")])
    with pytest.raises(SystemExit, match="vLLM finds no such plugin here; install this package"):
        bench_engine.main()


def command_line(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["bench_engine.py", "m", "--json", "e.json", *arguments])
    return bench_engine.parse_arguments()[0]


def test_sets_and_workloads_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, names in (
        ((), SETS["requests"]),
        (("--quick",), QUICK["requests"]),
        (("--set", "decode"), SETS["decode"]),
        (("--set", "decode", "--quick"), QUICK["decode"]),
        (("--set", "decode", "--workload", "4k-fit", "--workload", "a=1,1,1,1"), ("4k-fit", "a")),
    ):
        workloads = command_line(monkeypatch, *arguments).workloads
        assert [workload.name for workload in workloads] == list(names)
        assert all(workload.decode == ("decode" in arguments) for workload in workloads)


def test_a_workload_of_another_set_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        command_line(monkeypatch, "--set", "decode", "--workload", "chat")
    assert "argument --workload: 'chat' is no workload; give NAME=" in capsys.readouterr().err


@pytest.mark.vllm
@pytest.mark.slow
def test_the_client_understands_its_arguments_and_says_what_failed(tmp_path: Path) -> None:
    """vLLM's own parser and client, against a port where nothing listens."""
    pytest.importorskip("vllm")
    model = Path(__file__).resolve().parent.parent / "models" / "smollm2-135m-instruct"
    if not model.exists():
        pytest.fail(f"{model} is missing; `make test` fetches it", pytrace=False)
    server = SimpleNamespace(port=1, name="m", model=model)
    arguments = bench_engine.client_arguments(server, LONG, 1)
    options = bench_engine.client_parser().parse_args(arguments)
    assert (options.random_input_len, options.random_output_len, options.num_prompts) == (64, 1, 5)
    result = bench_engine.run_client(arguments, tmp_path / "client.log", 60.0)
    assert result["error"].startswith("5 requests failed: ")
    assert "Connect" in result["error"]
    assert "Namespace" in (tmp_path / "client.log").read_text()


def test_the_vllm_command_is_that_of_this_python_or_the_one_on_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, on_path = tmp_path / "env", tmp_path / "bin"
    for folder in (beside, on_path):
        folder.mkdir()
    monkeypatch.setattr(sys, "executable", str(beside / "python"))
    monkeypatch.setenv("PATH", str(on_path))
    assert vllm_command() == "vllm"  # which Server refuses to start, and says what to do
    for folder in (on_path, beside):
        (folder / "vllm").touch(mode=0o755)
        assert vllm_command() == str(folder / "vllm")


def test_a_log_that_cannot_be_written_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "vllm").touch()
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    log = tmp_path / "missing" / "server.log"
    server = Server(tmp_path, "auto", log=log)
    with pytest.raises(ServerError, match=f"^cannot write the log {log}: No such file or"):
        server.start()


def test_engines_that_start_together_are_all_ready_first() -> None:
    """One that does not get ready is left to its own measurement, which says so."""
    servers = [FakeServer(), FakeServer(failure="ended with exit code 1"), FakeServer()]
    with started(servers, 1.0):
        assert all(server.events == ["start", "wait"] for server in servers)
        assert not any(server.stopped for server in servers)
    assert all(server.stopped for server in servers)


@pytest.mark.parametrize("together", [False, True])
def test_together_starts_all_engines_before_any_is_measured(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    servers = [FakeServer(), FakeServer()]
    unused = iter(servers)
    seen: list[list[int]] = []

    def measure(*_: object) -> None:
        seen.append([len(server.events) for server in servers])

    monkeypatch.setattr(bench_engine, "Server", lambda *_, **__: next(unused))
    monkeypatch.setattr(bench_engine, "run_engine", measure)
    monkeypatch.setattr(bench_engine, "run_together", measure)
    monkeypatch.setattr(bench_engine, "has_plugin", lambda: True)
    arguments = ["m", "--json", str(tmp_path / "e.json"), "--dtypes", "auto", "turboquant3"]
    monkeypatch.setattr(sys, "argv", ["bench_engine.py", *arguments, *["--together"] * together])
    bench_engine.main()
    assert seen == (3 * [[2, 2]] if together else 2 * [[0, 0]])
