"""Real `vllm serve` processes for the end-to-end tests, started when first asked for.

Small on purpose: 256 tokens a step, so that prompts of ordinary length are prefilled in chunks, and
256 MiB of cache, so that the two servers fit a small machine together. The same on CPUs and GPUs.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import requests
from vllm_server import Server

if TYPE_CHECKING:
    from openai import OpenAI
    from openai.types import CompletionChoice

MODEL = Path(__file__).resolve().parents[2] / "models" / "smollm2-135m-instruct"
BLOCK_TOKENS = 128  # vLLM's default on CPUs; test_serve_gpu.py has that on GPUs
ARGUMENTS = (
    f"--block-size={BLOCK_TOKENS}",
    "--gpu-memory-utilization=0.3",  # on GPUs, each server has to find this much free
    "--enforce-eager",
    "--max-num-batched-tokens=256",
    "--max-num-seqs=16",
    "--enable-prefix-caching",
    f"--kv-cache-memory-bytes={256 * 2**20}",
)
ENVIRONMENT = {"VLLM_NO_USAGE_STATS": "1"}

RunServer = Callable[..., AbstractContextManager[Server]]


def client(server: Server) -> OpenAI:
    from openai import OpenAI  # comes with vLLM

    return OpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=300)


def complete(server: Server, prompt: str, max_tokens: int = 12, **options: object) -> str:
    response = client(server).completions.create(
        model=server.name, prompt=prompt, max_tokens=max_tokens, temperature=0, **options
    )
    return response.choices[0].text


def complete_together(
    server: Server, prompts: list[str], max_tokens: int = 12, **options: object
) -> list[CompletionChoice]:
    """Greedy continuations of ``prompts``, in their order.

    They are one request: sent one by one, the first could be done before the last is there.
    """
    response = client(server).completions.create(
        model=server.name, prompt=prompts, max_tokens=max_tokens, temperature=0, **options
    )
    return sorted(response.choices, key=lambda choice: choice.index)


def metric(server: Server, name: str) -> float:
    """Sum of a counter over its labels."""
    text = requests.get(f"{server.url}/metrics", timeout=30).text
    values = re.findall(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    assert values, f"no metric {name}"
    return sum(map(float, values))


@pytest.fixture(scope="session")
def run_server(tmp_path_factory: pytest.TempPathFactory) -> RunServer:
    """Context manager that runs a ready server: ``with run_server(dtype, *arguments, **env)``.

    Arguments come after the ones above and win over them; a server that does not get ready fails
    the test with the end of its log.
    """
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed; `make test` installs it")
    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing; `make test` fetches it", pytrace=False)

    @contextmanager
    def run(kv_cache_dtype: str, *arguments: str, **environment: str) -> Iterator[Server]:
        log = tmp_path_factory.mktemp("server") / f"{kv_cache_dtype}.log"
        server = Server(
            MODEL,
            kv_cache_dtype,
            [*ARGUMENTS, *arguments],
            log=log,
            environment={**ENVIRONMENT, **environment},
        )
        with server:
            server.wait_until_ready()
            yield server

    return run


@pytest.fixture(scope="session")
def turboquant_server(run_server: RunServer) -> Iterator[Server]:
    """A server with --kv-cache-dtype turboquant3."""
    with run_server("turboquant3") as server:
        yield server


@pytest.fixture(scope="session")
def auto_server(run_server: RunServer) -> Iterator[Server]:
    """A server with --kv-cache-dtype auto and otherwise the same options."""
    with run_server("auto") as server:
        yield server
