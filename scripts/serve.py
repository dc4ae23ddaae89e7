#!/usr/bin/env python3
"""Serve a model with --kv-cache-dtype turboquant3 and say what that buys.

`vllm serve` runs as a child process with its log on this terminal. When it answers, this prints a
curl line and the capacity of its KV cache, beside the capacity that --kv-cache-dtype auto has with
the same memory. The latter is measured, by starting such an engine once; the result is kept in
build/, under all that it depends on.

    serve.py models/smollm2-135m-instruct [arguments of vllm serve]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from vllm_server import Capacity, Server, ServerError

BUILD = Path(__file__).resolve().parent.parent / "build"
DTYPE = "turboquant3"
DEFAULTS = ["--kv-cache-memory-bytes=1073741824"]
# On CPU an eager start takes well under half the time, and needs no compiler or Python headers.
CPU_DEFAULTS = ["--enforce-eager"]
console = Console(highlight=False)


def auto_capacity(model: Path, arguments: list[str]) -> Capacity:
    """Capacity of --kv-cache-dtype auto under the same arguments, from a real engine.

    Started eagerly: compiling takes a minute and does not change the size of the cache.
    """
    BUILD.mkdir(exist_ok=True)
    record = BUILD / "auto-capacity.json"
    key = " ".join([f"vllm {importlib.metadata.version('vllm')}", str(model), *arguments])
    known = json.loads(record.read_text()) if record.exists() else {}
    if key not in known:
        log = BUILD / "auto-capacity.log"
        print(f"measure the capacity of --kv-cache-dtype auto, once (log: {log})", flush=True)
        with Server(model, "auto", [*arguments, "--enforce-eager"], log=log) as server:
            server.wait_until_ready(progress=report_progress)
            capacity = server.capacity()
        known[key] = {"num_tokens": capacity.num_tokens, "memory_bytes": capacity.memory_bytes}
        record.write_text(json.dumps(known, indent=2) + "\n")
    return Capacity("auto", **known[key])


def report_progress(waited_s: float) -> None:
    """Print how long the server has been starting."""
    print(f"waiting for the server to answer: {waited_s:.0f} s", flush=True)


def print_ready(server: Server, auto: Capacity) -> None:
    """Print the curl line and both capacities."""
    ours = server.capacity()
    table = Table()
    table.add_column("--kv-cache-dtype")
    table.add_column("tokens", justify="right")
    table.add_column("times auto", justify="right")
    for capacity in (auto, ours):
        ratio = f"{capacity.num_tokens / auto.num_tokens:.2f}"
        table.add_row(capacity.dtype, f"{capacity.num_tokens:,}", ratio)
    request = {
        "model": server.name,
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "temperature": 0,
    }
    memory = f"{ours.memory_bytes / 2**30:.2f} GiB"
    console.print(f"\nKV cache of {server.name}, measured, in {memory} of memory:", soft_wrap=True)
    console.print(table)
    console.print("Ready. Try it from another terminal:\n")
    # print, not the console: the line is to be copied, so it must not be wrapped or coloured.
    print(
        f"curl {server.url}/v1/chat/completions -H 'Content-Type: application/json' "
        f"-d '{json.dumps(request)}'\n",
        flush=True,
    )


def serve(server: Server, auto: Capacity) -> int:
    """Run ``server`` until it ends or a signal ends it; return its exit code."""
    server.start()
    try:
        server.wait_until_ready(progress=report_progress)
        print_ready(server, auto)
        server.process.wait()
    except KeyboardInterrupt:
        print("stopping the server", flush=True)
    finally:
        code = server.stop()
    return code if code >= 0 else 128 - code  # as a shell reports an end by signal


def main() -> None:
    """Measure `auto` where that is not yet known, then serve."""
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__.split("\n")[0],
        epilog="Any other argument goes to vllm serve, and wins over what is chosen here.",
    )
    parser.add_argument("model", type=Path, help="folder of a model, as fetch_model.py writes")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    options, passed_on = parser.parse_known_args()
    model = options.model.absolute()
    if not (model / "config.json").exists():
        sys.exit(f"{model} has no config.json: give the folder of a model (make serve fetches one)")
    if any(argument.startswith("--kv-cache-dtype") for argument in passed_on):
        sys.exit(f"--kv-cache-dtype is {DTYPE} here; for another one run vllm serve itself")
    on_cpu = importlib.metadata.version("vllm").endswith("cpu")
    arguments = [*DEFAULTS, *(CPU_DEFAULTS if on_cpu else []), *passed_on]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # all end it in order
        signal.signal(number, signal.default_int_handler)
    try:
        server = Server(model, DTYPE, arguments, port=options.port)
        code = serve(server, auto_capacity(model, arguments))
    except ServerError as error:
        sys.exit(f"serve.py: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(code)


if __name__ == "__main__":
    main()
