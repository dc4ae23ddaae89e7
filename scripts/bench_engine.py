#!/usr/bin/env python3
"""Time whole engines that differ in --kv-cache-dtype alone, with equal KV-cache memory.

    bench_engine.py models/qwen2.5-coder-1.5b-instruct --json engine.json [arguments of vllm serve]

One `vllm serve` after the other on the same device, or, with --together, side by side and measured
one after the other, times to the first token in turn. The record is written after every workload,
so that a run that is cut keeps what it has; --resume measures the rest.

--set requests  what a user sees, measured by the client of `vllm bench serve`. Prefix caching is
                off, because the client warms up with a prompt that it measures afterwards, and
                because its prompts for one seed begin alike. Workloads ttft-* are measured by
                first_token_client.py, which says how; with --together two engines of one cache,
                --dtypes auto bfloat16, show how much equal engines differ.
--set decode    the time between tokens alone, at contexts of 4K to 32K, with 1, 16 and as many
                requests as fit; measured by decode_client.py, which says how.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import gc
import importlib.metadata
import json
import multiprocessing
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from decode_client import run_decode
from engine_workloads import QUICK, SETS, Workload, prompts_for
from first_token_client import WARM_UPS, mean_ms, run_first_token
from rich.console import Console
from rich.table import Table
from vllm_server import Server, ServerError, last_error, started

from vllm_turboquant import CACHE_DTYPE, __version__

BASELINE = "auto"
DTYPES = (BASELINE, "fp8", "turboquant_3bit_nc", "int4_per_token_head", CACHE_DTYPE)
METRICS = {  # key of the record: key of the client's result
    "tokens_per_s": "output_throughput",
    "ttft_ms": "median_ttft_ms",
    "ttft_p99_ms": "p99_ttft_ms",
    "itl_ms": "median_itl_ms",
    "itl_p99_ms": "p99_itl_ms",
    "duration_s": "duration",
}
MAX_WARMUPS = 64
START_TIMEOUT_S = 900.0
WORKLOAD_TIMEOUT_S = 300.0
# Seconds that an idle connection stays open: that to an engine, while others are measured.
ENVIRONMENT = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "900"}
LOG_LINES = 500  # in which the last error is looked for


class Record:
    """The JSON file: the setup, an entry per engine, a row per engine and workload.

    Args:
        path: File to write.
        setup: What rows must have in common to be compared.
        resume: Whether to keep the rows that ``path`` has.

    Raises:
        SystemExit: ``path`` exists and is not to be resumed, or has another setup.
    """

    def __init__(self, path: Path, setup: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.data: dict[str, Any] = {"setup": setup, "engines": {}, "rows": []}
        if path.exists():
            if not resume:
                sys.exit(f"{path} exists; continue it with --resume, or name another file")
            self.data = json.loads(path.read_text())
            then = self.data["setup"]
            changes = [
                f"{key} was {then.get(key)!r} and is {setup.get(key)!r}"
                for key in sorted(setup.keys() | then.keys())
                if setup.get(key) != then.get(key)
            ]
            if changes:
                sys.exit(f"{path} has another setup ({'; '.join(changes)}); name another file")
        self.data |= {"date": date.today().isoformat(), "command": shlex.join(sys.argv)}

    def missing(self, dtype: str, workloads: Sequence[Workload]) -> list[Workload]:
        """Workloads of which there is no row of exactly this shape, or one that failed."""
        done = [row for row in self.data["rows"] if "error" not in row]
        keys = {w: {"kv_cache_dtype": dtype, **asdict(w)}.items() for w in workloads}
        return [w for w in workloads if not any(keys[w] <= row.items() for row in done)]

    def put_engine(self, dtype: str, facts: dict[str, Any]) -> None:
        """Say what became of an engine, and write the file."""
        self.data["engines"][dtype] = facts
        self._write()

    def put_row(self, dtype: str, workload: Workload, figures: dict[str, Any]) -> None:
        """Add a row, in the place of one of the same name, and write the file."""
        names = (dtype, workload.name)
        rows = [row for row in self.data["rows"] if (row["kv_cache_dtype"], row["name"]) != names]
        self.data["rows"] = [*rows, {"kv_cache_dtype": dtype, **asdict(workload), **figures}]
        self._write()

    def _write(self) -> None:
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_text(json.dumps(self.data, indent=1) + "\n")
        part.replace(self.path)  # never half a record


@functools.cache
def client_parser() -> argparse.ArgumentParser:
    """Parser of `vllm bench serve`."""
    from vllm.benchmarks.serve import add_cli_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    return parser


def decode_arguments(server: Server, workload: Workload, clients: int) -> tuple[Any, ...]:
    """Arguments of ``run_decode`` for one workload."""
    prompts = prompts_for(server.model, workload, clients)
    url = f"http://127.0.0.1:{server.port}"
    return url, server.name, prompts, workload.output_tokens, WORKLOAD_TIMEOUT_S


def import_client() -> None:
    """Import vLLM, which takes many seconds, before ``run_client`` does."""
    client_parser()


def client_arguments(server: Server, workload: Workload, clients: int) -> list[str]:
    """Arguments of `vllm bench serve` for one workload."""
    return [
        "--backend=openai",
        f"--base-url=http://127.0.0.1:{server.port}",
        f"--model={server.name}",
        f"--tokenizer={server.model}",
        "--dataset-name=random",
        f"--random-input-len={workload.input_tokens}",
        f"--random-output-len={workload.output_tokens}",
        f"--num-prompts={workload.prompts}",
        f"--max-concurrency={clients}",
        f"--num-warmups={min(max(clients, 2), MAX_WARMUPS)}",
        "--ignore-eos",
        "--temperature=0",
        "--disable-tqdm",
        "--save-detailed",  # keeps the errors of single requests in the result
    ]


def run_client(arguments: list[str], log: Path, timeout_s: float) -> dict[str, Any]:
    """Run `vllm bench serve` in this process; as a command it would start for longer than it runs.

    Args:
        arguments: Its arguments.
        log: File to which its output is appended.
        timeout_s: How long it may take.

    Returns:
        The figures of ``METRICS``, or why there are none, as ``error``.
    """
    from vllm.benchmarks.serve import main_async

    options = client_parser().parse_args(arguments)
    try:
        with log.open("a") as output, contextlib.redirect_stdout(output):
            result = asyncio.run(asyncio.wait_for(main_async(options), timeout_s))
    except asyncio.TimeoutError:
        return {"error": f"not finished after {timeout_s:.0f} s"}
    except Exception as error:  # whatever the client raises is the outcome of this workload alone
        return {"error": last_error(f"{type(error).__name__}: {error}")}
    finally:
        gc.unfreeze()  # the client froze all there was, which would be reported as leaks at exit
    if result["failed"]:
        reason = last_error("\n".join(result["errors"]))
        return {"error": f"{result['failed']} requests failed: {reason}"}
    figures = {key: round(float(result[name]), 3) for key, name in METRICS.items()}
    if options.random_output_len == 1:  # one token has no successor to wait for
        figures |= dict.fromkeys(("itl_ms", "itl_p99_ms"))
    return figures


def refusal(server: Server, workload: Workload) -> str | None:
    """Why an engine cannot be asked this, if so."""
    if server.process.poll() is not None:
        return "vllm serve has ended"
    try:
        max_tokens = server.max_tokens()
    except ServerError as error:
        return str(error)
    if workload.request_tokens > max_tokens:
        return f"the model takes at most {max_tokens} tokens a request"
    return None


def measure(
    server: Server, workload: Workload, fit: int, log: Path, client: Executor
) -> dict[str, Any]:
    """Figures of one workload, or why there are none, as ``error``.

    Args:
        server: Ready.
        workload: What to ask of it.
        fit: Requests that its cache holds.
        log: File to which the client's output is appended.
        client: Runs the client.
    """
    if error := refusal(server, workload):
        return {"error": error}
    clients = workload.clients(fit)
    if workload.decode:
        return client.submit(run_decode, *decode_arguments(server, workload, clients)).result()
    options = client_arguments(server, workload, clients)
    before = server.prefill_time()
    figures = client.submit(run_client, options, log, WORKLOAD_TIMEOUT_S).result()
    if "error" in figures:
        return figures
    return figures | {"prefill_ms": mean_ms(before, server.prefill_time())}


def put_figures(
    record: Record, dtype: str, workload: Workload, tokens: int, figures: dict[str, Any]
) -> None:
    """Put one workload on record, of an engine whose cache holds ``tokens``."""
    fit = tokens // workload.request_tokens
    row = {"clients": workload.clients(fit), "requests_that_fit": fit, **figures}
    record.put_row(dtype, workload, row)
    say(f"{dtype}: {workload.name}: {json.dumps(figures)}")


def measure_first_tokens(
    engines: Sequence[tuple[Server, str, int]], workload: Workload, record: Record
) -> None:
    """Measure times to the first token of engines in turn, and put them on record.

    Args:
        engines: Ready, with --kv-cache-dtype and the number of tokens that fit.
        workload: What to ask of them.
        record: Gets a row of each.
    """
    errors = {dtype: refusal(server, workload) for server, dtype, _ in engines}
    asked = {dtype: server for server, dtype, _ in engines if errors[dtype] is None}
    figures = {dtype: {"error": error} for dtype, error in errors.items() if error}
    if asked:
        model = next(iter(asked.values())).model
        prompts = prompts_for(model, workload, WARM_UPS + workload.prompts)
        figures |= run_first_token(asked, prompts, WORKLOAD_TIMEOUT_S)
    for _, dtype, tokens in engines:
        put_figures(record, dtype, workload, tokens, figures[dtype])


def run_together(engines: Sequence[tuple[Server, str, list[Workload]]], record: Record) -> None:
    """Measure times to the first token of engines that all run, and forget these workloads.

    An engine that did not get ready keeps its workloads.
    """
    ready = []
    for server, dtype, workloads in engines:
        with contextlib.suppress(ServerError):
            server.wait_until_ready(START_TIMEOUT_S)
            ready.append((server, dtype, workloads, server.capacity().num_tokens))
    wanted = dict.fromkeys(w for *_, workloads, _ in ready for w in workloads if w.first_token)
    for workload in wanted:
        asked = [engine for engine in ready if workload in engine[2]]
        measure_first_tokens([(server, d, n) for server, d, _, n in asked], workload, record)
        for *_, workloads, _ in asked:
            workloads.remove(workload)


def run_engine(
    server: Server, dtype: str, workloads: Sequence[Workload], record: Record, client: Executor
) -> None:
    """Start one engine, measure ``workloads`` and put them on record, with what went wrong."""
    engine: dict[str, Any] = {}
    try:
        with server:
            imported = client.submit(import_client)  # while the engine starts
            server.wait_until_ready(START_TIMEOUT_S)
            imported.result()  # or it would run beside what is measured
            capacity = server.capacity()
            engine["capacity_tokens"] = capacity.num_tokens
            engine["memory_bytes"] = capacity.memory_bytes
            engine["start_s"] = round(server.start_s, 1)
            record.put_engine(dtype, engine)
            say(f"{dtype}: {json.dumps(engine)}")
            log = record.path.with_suffix(".client.log")
            for workload in workloads:
                tokens = capacity.num_tokens
                if workload.first_token:
                    measure_first_tokens([(server, dtype, tokens)], workload, record)
                else:
                    fit = tokens // workload.request_tokens
                    figures = measure(server, workload, fit, log, client)
                    put_figures(record, dtype, workload, tokens, figures)
                if server.process.poll() is not None:
                    raise ServerError("vllm serve ended while it was measured")
    except ServerError as error:
        reason = str(error).split(";")[0]
        if log_text := server.log_tail(LOG_LINES):
            reason += f": {last_error(log_text)}"
        record.put_engine(dtype, {**engine, "error": reason})
        say(f"{dtype}: {reason}")


def device() -> dict[str, Any]:
    """Name and driver of the GPU that an engine takes here, or that there is only a CPU."""
    cores = {"cpu_cores": os.cpu_count()}
    if shutil.which("nvidia-smi") is None:
        return {"device": f"CPU, {platform.machine()}", "driver": None, **cores}
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = ["nvidia-smi", f"--id={first}", "--format=csv,noheader"]
    query += ["--query-gpu=name,driver_version"]
    line = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    name, driver = line.strip().split(", ")
    return {"device": name, "driver": driver, **cores}


def cell(row: dict[str, Any], baseline: dict[str, Any], key: str, digits: int = 0) -> str:
    """A figure of a row, and how many times the baseline's it is."""
    value = row.get(key)
    if value is None:
        return "failed" if "error" in row else "-"
    times = f" ({value / baseline[key]:.2f}x)" if baseline.get(key) else ""
    return f"{value:,.{digits}f}{times}"


def capacity_table(engines: dict[str, Any]) -> Table:
    """What fits, and how many times what fits with ``auto``."""
    table = Table("--kv-cache-dtype")
    for column in ("tokens that fit", "start, s"):
        table.add_column(column, justify="right", no_wrap=True)
    baseline = engines.get(BASELINE, {})
    for dtype, engine in engines.items():
        tokens = cell(engine, baseline, "capacity_tokens")
        table.add_row(dtype, tokens, cell(engine, {}, "start_s"))
    return table


def speed_table(rows: list[dict[str, Any]]) -> Table:
    """What was measured, and how many times the figure of ``auto`` that is."""
    table = Table("workload", "requests", "--kv-cache-dtype")
    for column in ("tokens/s", "TTFT, ms", "prefill, ms", "ITL, ms", "ITL p99, ms"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in dict.fromkeys(row["name"] for row in rows):
        group = {row["kv_cache_dtype"]: row for row in rows if row["name"] == name}
        baseline = group.get(BASELINE, {})
        for dtype, row in group.items():
            clients, fit = row["clients"], row["requests_that_fit"]
            table.add_row(
                f"{name}: {row['input_tokens']}/{row['output_tokens']}",
                str(clients) if fit >= clients else f"{clients}, {fit} fit",
                dtype,
                cell(row, baseline, "tokens_per_s"),
                cell(row, baseline, "ttft_ms", 1),
                cell(row, baseline, "prefill_ms", 1),
                cell(row, baseline, "itl_ms", 2),
                cell(row, baseline, "itl_p99_ms", 2),
            )
        table.add_section()
    return table


def has_plugin() -> bool:
    """Whether vLLM finds this package's entry point."""
    return bool(importlib.metadata.entry_points(group="vllm.general_plugins", name="turboquant"))


def say(message: str) -> None:
    """Print one line of progress."""
    print(f"[bench] {message}", flush=True)


def parse_arguments() -> tuple[argparse.Namespace, list[str]]:
    """The command line, and what of it goes to `vllm serve`."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__.split("\n")[0],
        epilog="Any other argument goes to vllm serve.",
    )
    parser.add_argument("model", type=Path, help="folder of the model")
    parser.add_argument("--json", type=Path, required=True, help="the record; logs go beside it")
    parser.add_argument("--resume", action="store_true", help="measure what the record lacks")
    parser.add_argument(
        "--set", choices=SETS, default="requests", help="what is measured; default: %(default)s"
    )
    quick = "; ".join(f"{', '.join(names)} of {name}" for name, names in QUICK.items())
    parser.add_argument("--quick", action="store_true", help=f"only {quick}")
    parser.add_argument(
        "--together",
        action="store_true",
        help="start all engines at once, and measure when all are ready, times to the first token "
        "in turn and all else one engine after the other; "
        "give each its part of the memory with --gpu-memory-utilization",
    )
    parser.add_argument(
        "--dtypes", nargs="+", default=DTYPES, metavar="DTYPE", help=f"default: {' '.join(DTYPES)}"
    )
    parser.add_argument(
        "--workload",
        action="append",
        metavar="NAME=input,output,concurrency,prompts",
        help="tokens and requests, with fit for as many requests at a time as the cache holds; or "
        "a name alone. Default: all of the set, "
        + "; or ".join(", ".join(workloads) for workloads in SETS.values()),
    )
    parser.add_argument(
        "--kv-cache-memory-bytes", type=int, default=4 << 30, help="default: %(default)s"
    )
    options, passed_on = parser.parse_known_args()
    names = options.workload or (QUICK[options.set] if options.quick else SETS[options.set])
    try:
        options.workloads = [Workload.parse(name, options.set) for name in names]
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument --workload: {error}")
    return options, passed_on


def main() -> None:
    """Measure every engine and print the tables."""
    options, passed_on = parse_arguments()
    if CACHE_DTYPE in options.dtypes and not has_plugin():
        sys.exit(
            f"--dtypes has {CACHE_DTYPE}, but vLLM finds no such plugin here; install this package "
            "(pip install --no-build-isolation --no-deps .) or leave it out of --dtypes"
        )
    arguments = [
        f"--kv-cache-memory-bytes={options.kv_cache_memory_bytes}",
        "--enable-prefix-caching" if options.set == "decode" else "--no-enable-prefix-caching",
        *passed_on,
    ]
    setup = {
        **device(),
        **{name: importlib.metadata.version(name) for name in ("torch", "vllm")},
        "vllm-turboquant": __version__,
        "model": options.model.name,
        "arguments": arguments,
    }
    record = Record(options.json, setup, options.resume)
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["no_proxy"] = "127.0.0.1,localhost"  # the client would ask a proxy for localhost
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends the engine, as Ctrl-C does
    # The client gets a process, because importing vLLM changes environment variables, and engines
    # started afterwards would inherit them.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=spawn) as client:
        engines = []
        for dtype in options.dtypes:
            if missing := record.missing(dtype, options.workloads):
                log = options.json.with_suffix(f".{dtype}.log")
                server = Server(
                    options.model.absolute(), dtype, arguments, log=log, environment=ENVIRONMENT
                )
                engines.append((server, dtype, missing))
        servers = [server for server, *_ in engines] if options.together else []
        with started(servers, START_TIMEOUT_S):
            if options.together:
                run_together(engines, record)
            for server, dtype, missing in engines:
                run_engine(server, dtype, missing, record, client)
    console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)
    console.print("{model}, vLLM {vllm}, torch {torch}, {device}".format(**setup))
    console.print(capacity_table(record.data["engines"]))
    console.print(speed_table(record.data["rows"]))


if __name__ == "__main__":
    main()
