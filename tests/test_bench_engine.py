"""What scripts/bench_engine.py does around the engines: workloads, record, failures, tables."""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_engine
import pytest
import requests
from bench_engine import Record, last_error, run_by_turns, run_engine, started
from engine_workloads import QUICK, SETS, Workload
from rich.console import Console
from vllm_server import Capacity, Server, ServerError, vllm_command

SETUP = {"device": "A GPU", "vllm": "0.32.0"}
SHORT = Workload("short", 32, 8, 4, 8)
LONG = Workload("long", 64, 1, 1, 5)
DECODE = Workload("decode", 32, 8, 16, 16, decode=True)
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

    url, port, name, model = "http://localhost:1", 1, "m", Path("m")

    def __init__(self, log: str = "", failure: str = "", exit_code: int | None = None) -> None:
        self.log, self.failure = log, failure
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
        if function is bench_engine.run_client:
            self.asked.append(arguments[0])
            future.set_result(self.results.pop(0))
        elif function is bench_engine.run_decode:
            self.asked.append(arguments)
            future.set_result(self.results.pop(0))
        return future


@pytest.fixture(autouse=True)
def model_of_100_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_engine, "served_model", lambda url: ("m", 100))


@pytest.fixture
def record(tmp_path: Path) -> Record:
    return Record(tmp_path / "engine.json", SETUP, resume=False)


def on_disk(record: Record) -> dict[str, Any]:
    return json.loads(record.path.read_text())


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


def test_engines_are_measured_by_turns_back_and_forth(record: Record) -> None:
    by_turns = Workload("ttft", 32, 1, 1, 5, turns=4)
    client = FakeClient(*({**FIGURES, "ttft_ms": ms, "itl_ms": None} for ms in range(8)))
    first, failed, last = FakeServer(), FakeServer(failure="did not start"), FakeServer()
    engines = [
        (server, dtype, [SHORT, by_turns])
        for server, dtype in ((first, "auto"), (failed, "fp8"), (last, "turboquant3"))
    ]
    run_by_turns(engines, record, client)
    rows = {row["kv_cache_dtype"]: row for row in on_disk(record)["rows"]}
    assert rows.keys() == {"auto", "turboquant3"}
    assert rows["auto"]["ttft_ms_by_turn"] == [0, 3, 4, 7]
    assert rows["turboquant3"]["ttft_ms_by_turn"] == [1, 2, 5, 6]
    assert (rows["auto"]["ttft_ms"], rows["auto"]["itl_ms"], rows["auto"]["clients"]) == (
        3.5,
        None,
        1,
    )
    assert [workloads for *_, workloads in engines] == [[SHORT], [SHORT, by_turns], [SHORT]]


def test_an_engine_that_ends_does_not_end_the_turns_of_others(record: Record) -> None:
    by_turns = Workload("ttft", 32, 1, 1, 5, turns=2)
    engines = [
        (FakeServer(exit_code=1), "auto", [by_turns]),
        (FakeServer(), "turboquant3", [by_turns]),
    ]
    run_by_turns(engines, record, FakeClient(FIGURES, FIGURES))
    rows = {row["kv_cache_dtype"]: row for row in on_disk(record)["rows"]}
    assert rows["auto"]["error"] == "vllm serve has ended"
    assert rows["turboquant3"]["ttft_ms_by_turn"] == [10.0, 10.0]


def test_prefill_time_is_that_of_all_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "vllm:request_prefill_time_seconds"
    lines = [f"# TYPE {name} histogram"]
    for engine, (seconds, count) in enumerate(((1.5, 2), (2.0, 3))):
        labels = f'{{engine="{engine}",model_name="m"}}'
        lines += [f"{name}_count{labels} {count}.0", f"{name}_sum{labels} {seconds}"]
    server = Server(Path("m"), "auto", [])
    answer = SimpleNamespace(text="\n".join(lines) + "\n")
    monkeypatch.setattr(server._http, "get", lambda *_, **__: answer)
    assert server.prefill_time() == (3.5, 5)

    def refuse(*_: object, **__: object) -> None:
        raise requests.ConnectionError("gone")

    monkeypatch.setattr(server._http, "get", refuse)
    with pytest.raises(ServerError, match="/metrics does not answer"):
        server.prefill_time()


def test_an_engine_alone_is_measured_as_often(record: Record) -> None:
    by_turns = Workload("ttft", 32, 1, 1, 5, turns=2)
    run_engine(FakeServer(), "auto", [by_turns], record, FakeClient(FIGURES, FIGURES))
    assert on_disk(record)["rows"][0]["ttft_ms_by_turn"] == [10.0, 10.0]
    run_engine(FakeServer(), "auto", [by_turns], record, FakeClient({"error": "gone"}, FIGURES))
    assert on_disk(record)["rows"][0]["error"] == "gone"


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
    console = Console(width=140, record=True)
    console.print(bench_engine.capacity_table(record.data["engines"]))
    console.print(bench_engine.speed_table(record.data["rows"]))
    lines = console.export_text().splitlines()
    engines = [line for line in lines if "turboquant3" in line or "fp8" in line]
    assert "800 (2.00x)" in engines[0] and "failed" in engines[1]
    assert "short: 32/8" in engines[2] and "4, 3 fit" in engines[2]
    for figure in ("200 (2.00x)", "20.0 (2.00x)", "4.00 (2.00x)", "6.00 (2.00x)"):
        assert figure in engines[2]


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
    with started(servers):
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
    monkeypatch.setattr(bench_engine, "run_by_turns", measure)
    monkeypatch.setattr(bench_engine, "has_plugin", lambda: True)
    arguments = ["m", "--json", str(tmp_path / "e.json"), "--dtypes", "auto", "turboquant3"]
    monkeypatch.setattr(sys, "argv", ["bench_engine.py", *arguments, *["--together"] * together])
    bench_engine.main()
    assert seen == (3 * [[2, 2]] if together else 2 * [[0, 0]])
