"""Start, watch and stop one `vllm serve` process; shared by serve.py and the tests.

    with Server(model, "turboquant3") as server:
        server.wait_until_ready()
        server.capacity()

vLLM is a tree of processes (API server, engine core, workers, resource trackers). The server gets
a session of its own, so that stopping it ends the whole tree even where vLLM left part of it, and
so that Ctrl-C in a terminal reaches only the caller, which decides what to forward.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import requests
from prometheus_client.parser import text_string_to_metric_families

LOG_TAIL_LINES = 40
PROGRESS_EVERY_S = 10.0
ERROR_LINE = re.compile(r"(?:\b\w*(?:Error|Exception)|\berror): \S.*")


class ServerError(RuntimeError):
    """The server did not start, or did not answer as vLLM does."""


@dataclass(frozen=True)
class Capacity:
    """What the running engine says about its KV cache.

    Attributes:
        dtype: Value of --kv-cache-dtype.
        num_tokens: Tokens that fit, as vLLM computes it for this model's layers.
        memory_bytes: Memory of the cache; 0 where vLLM chose it by itself.
    """

    dtype: str
    num_tokens: int
    memory_bytes: int


def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_port_used(port: int) -> bool:
    """Whether something answers on a local TCP port."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def served_model(url: str) -> tuple[str, int]:
    """Name and max_model_len of the model that the server at ``url`` serves."""
    session = requests.Session()
    session.trust_env = False  # a proxy named in the environment does not serve localhost
    try:
        response = session.get(f"{url}/v1/models", timeout=30)
        response.raise_for_status()
    except requests.RequestException as error:
        sys.exit(f"no server answers at {url} ({type(error).__name__}); start one with: make serve")
    model = response.json()["data"][0]
    return model["id"], model["max_model_len"]


def vllm_command() -> str:
    """The `vllm` of this Python environment, or else the one on PATH."""
    beside_python = Path(sys.executable).with_name("vllm")
    return str(beside_python) if beside_python.exists() else shutil.which("vllm") or "vllm"


def last_error(text: str) -> str:
    """The last line that names an error, without vLLM's prefixes; where there is none, the last.

    vLLM's own last words only point to a "root cause above", which is what this looks for.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    matches = filter(None, map(ERROR_LINE.search, lines))
    errors = [match[0] for match in matches if "root cause above" not in match[0]]
    return (errors or lines or ["no output"])[-1]


class Server:
    """One `vllm serve` child process of this Python environment.

    Args:
        model: Folder of the model; its name becomes the served model name.
        kv_cache_dtype: Value of --kv-cache-dtype.
        arguments: Further arguments of `vllm serve`, as on the command line.
        port: Port to listen on; a free one by default.
        log: File that receives the output; by default it goes where the caller's goes.
        environment: Variables set for the server only.

    Raises:
        ServerError: The port is in use. Checked here, or another server's /health would pass for
            that of this one.
    """

    def __init__(
        self,
        model: Path,
        kv_cache_dtype: str,
        arguments: Sequence[str] = (),
        port: int | None = None,
        log: Path | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.model = model
        self.name = model.name
        self.port = free_port() if port is None else port
        if is_port_used(self.port):
            raise ServerError(f"port {self.port} is in use; choose another one, e.g. --port 8001")
        self.url = f"http://localhost:{self.port}"
        self.log = log
        self.command = [
            vllm_command(),
            "serve",
            str(model),
            f"--served-model-name={self.name}",
            f"--kv-cache-dtype={kv_cache_dtype}",
            f"--port={self.port}",
            *arguments,
        ]
        self.environment = {"HF_HUB_OFFLINE": "1", **os.environ, **(environment or {})}
        # NOTE: vLLM lets this variable override --kv-cache-memory-bytes without a word.
        if any(a.startswith("--kv-cache-memory-bytes") for a in arguments):
            self.environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
        self._http = requests.Session()
        self._http.trust_env = False  # a proxy named in the environment does not serve localhost
        self._process: subprocess.Popen[bytes] | None = None
        self._started_at = 0.0
        self.start_s = 0.0  # from start to the first answer, once it was waited for

    def start(self) -> None:
        """Start the process; returns at once.

        Raises:
            ServerError: This environment has no `vllm` command, or the log cannot be written.
        """
        if not Path(self.command[0]).exists():
            raise ServerError(f"{self.command[0]} does not exist; set up vLLM with: make serve")
        self._started_at = time.monotonic()
        if self.log is None:
            self._process = subprocess.Popen(
                self.command, env=self.environment, start_new_session=True
            )
        else:
            try:
                output = self.log.open("wb")
            except OSError as error:
                raise ServerError(f"cannot write the log {self.log}: {error.strerror}") from error
            with output:
                self._process = subprocess.Popen(
                    self.command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The child process of a started server."""
        if self._process is None:
            raise ServerError("the server was not started")
        return self._process

    def wait_until_ready(
        self,
        timeout_s: float = 600.0,
        progress: Callable[[float], None] = lambda waited_s: None,
    ) -> None:
        """Wait until /health answers.

        Args:
            timeout_s: How long to wait before giving up.
            progress: Called every ten seconds with the seconds waited.

        Raises:
            ServerError: The process ended, or did not answer in time; with the end of its log.
        """
        begin = time.monotonic()
        next_report_s = PROGRESS_EVERY_S
        while not self._is_healthy():
            waited_s = time.monotonic() - begin
            code = self.process.poll()
            if code is not None:
                raise ServerError(self._failure(f"ended with exit code {code} before it was ready"))
            if waited_s > timeout_s:
                raise ServerError(self._failure(f"did not answer /health for {timeout_s:.0f} s"))
            if waited_s >= next_report_s:
                progress(waited_s)
                next_report_s += PROGRESS_EVERY_S
            time.sleep(1.0)
        self.start_s = self.start_s or time.monotonic() - self._started_at

    def capacity(self) -> Capacity:
        """Read the size of the KV cache from the running server's /metrics."""
        text = self._get("/metrics").text
        line = re.search(r"^vllm:cache_config_info\{(.*)\}", text, re.MULTILINE)
        labels = dict(re.findall(r'(\w+)="([^"]*)"', line[1])) if line else {}
        try:
            memory = labels["kv_cache_memory_bytes"]
            return Capacity(
                dtype=labels["cache_dtype"],
                num_tokens=int(labels["kv_cache_size_tokens"]),
                memory_bytes=0 if memory == "None" else int(memory),
            )
        except (KeyError, ValueError) as error:
            raise ServerError(
                f"{self.url}/metrics has no usable vllm:cache_config_info ({error!r}); "
                "this reads vLLM 0.32 and 0.33"
            ) from error

    def prefill_time(self) -> tuple[float, int]:
        """Seconds from being scheduled to the first token, summed over requests, and their number.

        As the engine says itself: without tokenizing, HTTP and waiting for other requests.

        Raises:
            ServerError: The server does not answer.
        """
        text = self._get("/metrics").text
        name = "vllm:request_prefill_time_seconds"
        samples = [s for family in text_string_to_metric_families(text) for s in family.samples]
        seconds, count = (
            sum(sample.value for sample in samples if sample.name == f"{name}_{part}")
            for part in ("sum", "count")
        )
        return seconds, int(count)

    def max_tokens(self) -> int:
        """Most tokens of a request, its answer included.

        Raises:
            ServerError: The server does not answer.
        """
        return int(self._get("/v1/models").json()["data"][0]["max_model_len"])

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """Last lines of the log file; empty where the log goes to the terminal."""
        if self.log is None or not self.log.exists():
            return ""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self, timeout_s: float = 30.0) -> int:
        """End the server and every process it started.

        Returns:
            The exit code of the server process.
        """
        process = self.process
        try:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(timeout_s)
        finally:
            with suppress(ProcessLookupError):  # nothing is left of its process group
                os.killpg(process.pid, signal.SIGKILL)
        return process.wait()

    def __enter__(self) -> Server:
        if self._process is None:
            self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _get(self, path: str) -> requests.Response:
        try:
            response = self._http.get(f"{self.url}{path}", timeout=30)
            response.raise_for_status()
        except requests.RequestException as error:
            raise ServerError(f"{self.url}{path} does not answer ({error!r})") from error
        return response

    def _is_healthy(self) -> bool:
        try:
            return self._http.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.RequestException:
            return False

    def _failure(self, what: str) -> str:
        tail = self.log_tail()
        return f"vllm serve {what}" + (f"; end of {self.log}:\n{tail}" if tail else "")


@contextmanager
def started(servers: Sequence[Server], timeout_s: float) -> Iterator[None]:
    """All servers at once, each ready, so that none starts while another is measured.

    One that does not get ready says so again to whoever enters it or waits for it.
    """
    with ExitStack() as running:
        for server in servers:
            with suppress(ServerError):
                running.enter_context(server)

        def wait(server: Server) -> None:
            with suppress(ServerError):
                server.wait_until_ready(timeout_s)

        with ThreadPoolExecutor() as pool:
            list(pool.map(wait, servers))
        yield
