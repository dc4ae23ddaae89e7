"""Copies of recent tokens under vLLM: their memory, who may have one, and what the log says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from vllm_turboquant import plugin, recent, worker
from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.options import MAX_COPIES_SHARE, Options
from vllm_turboquant.recent import RecentPool, allocate_copies, count_places, group_pool

pytestmark = pytest.mark.vllm

HEAD_DIM, NUM_KV_HEADS, NUM_LAYERS = 128, 2, 3
PLACE_BYTES = NUM_LAYERS * NUM_KV_HEADS * SlotLayout(HEAD_DIM).unit_bytes
MAX_NUM_SEQS = 8


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    logged: list[str] = []
    monkeypatch.setattr(
        recent,
        "logger",
        SimpleNamespace(
            info=lambda text, *v: logged.append(text % v),
            info_once=lambda text, *v: logged.append(text % v),
        ),
    )
    return logged


def make_config(model: Path, **options: int | bool) -> VllmConfig:
    plugin.register()
    return EngineArgs(
        model=str(model),
        skip_tokenizer_init=True,
        kv_cache_dtype="turboquant3",
        max_num_seqs=MAX_NUM_SEQS,
        additional_config={"turboquant": options},
    ).create_engine_config()


def make_layers(num_blocks: int = 5, block_size: int = 32) -> list[Any]:
    """What this package reads of vLLM's attention layers."""
    shape = (num_blocks, NUM_KV_HEADS, block_size, SlotLayout(HEAD_DIM).slot_bytes)
    return [
        SimpleNamespace(
            impl=SimpleNamespace(
                num_kv_heads=NUM_KV_HEADS,
                head_size=HEAD_DIM,
                key_frame=torch.zeros(NUM_KV_HEADS, 3, HEAD_DIM),
                recent=None,
                pool=None,
            ),
            kv_cache=torch.zeros(shape, dtype=torch.uint8),
        )
        for _ in range(NUM_LAYERS)
    ]


@pytest.mark.parametrize(("recent_tokens", "window_units"), [(16, 2), (32, 3), (112, 8)])
def test_a_window_has_the_newest_tokens_wherever_it_ends(
    recent_tokens: int, window_units: int
) -> None:
    assert Options(recent_tokens=recent_tokens).window_units == window_units
    for seq_len in range(200, 232):
        first = (-(-seq_len // 16) - window_units) * 16
        assert recent_tokens < seq_len - first <= recent_tokens + 16


PLACES = {  # requests, bytes of the cache, places of 1000 bytes for windows of 3 units
    "all windows fit, and a unit each": (10, 10**9, 40),
    "a share of the cache": (10, 25 * 20 * 1000, 20),
    "a byte less": (10, 25 * 20 * 1000 - 1, 19),
    "what an entry of the map can name": (10**5, 10**12, 32766),
    "one window": (10, 25 * 3 * 1000, 3),
    "less than a window": (10, 25 * 3 * 1000 - 1, 0),
    "no memory": (10, 0, 0),
    "less than no memory": (10, -(10**9), 0),
}


@pytest.mark.parametrize("case", PLACES)
def test_places(case: str) -> None:
    max_num_seqs, cache_bytes, places = PLACES[case]
    assert count_places(max_num_seqs, 3, 1000, cache_bytes) == places


def test_copies_of_all_windows(tiny_llama: Path, lines: list[str]) -> None:
    layers = make_layers()
    allocate_copies(make_config(tiny_llama), layers, cache_bytes=2**30)
    num_places = MAX_NUM_SEQS * 4
    for layer in layers:
        assert layer.impl.recent.shape == (num_places, NUM_KV_HEADS, 16 * (2 * HEAD_DIM + 4))
        assert layer.impl.recent.dtype == torch.uint8
        assert not layer.impl.recent.any()
    assert lines == [
        "turboquant3 recent tokens: 8-bit copies of the newest 32 or more tokens of 8 requests at "
        "a time (of at most 8), 512 tokens in all; 0.8 MiB, 0.07 % of the memory of the KV cache: "
        "6.10x smaller, 6.09x with copies"
    ]


def test_copies_take_their_share_and_no_more(tiny_llama: Path, lines: list[str]) -> None:
    """Of the windows of 8 requests, 3 fit."""
    layers, cache_bytes = make_layers(), int(11.5 * PLACE_BYTES / MAX_COPIES_SHARE)
    allocate_copies(make_config(tiny_llama), layers, cache_bytes)
    taken = sum(layer.impl.recent.numel() for layer in layers)
    assert taken == 11 * PLACE_BYTES <= MAX_COPIES_SHARE * cache_bytes
    (line,) = lines
    assert "of 3 requests at a time (of at most 8), 176 tokens in all" in line
    assert "3.83 % of the memory of the KV cache: 6.10x smaller, 5.87x with copies" in line


@pytest.mark.parametrize(
    ("options", "cache_bytes", "use_ubatching", "line"),
    [
        ({"recent_tokens": 0}, 2**30, False, None),
        ({}, 2**30, True, "the microbatches of a step would take each other's places"),
        ({}, 2**20, False, "those of one request take 74880 bytes, more than 4 % of the 1048576"),
        ({}, -5, False, "more than 4 % of the 0 bytes of the KV cache"),
    ],
    ids=["option off", "microbatches", "no room", "no memory"],
)
def test_no_copies(
    tiny_llama: Path,
    lines: list[str],
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, int],
    cache_bytes: int,
    use_ubatching: bool,
    line: str | None,
) -> None:
    config, layers = make_config(tiny_llama, **options), make_layers()
    monkeypatch.setattr(
        type(config.parallel_config), "use_ubatching", property(lambda _: use_ubatching)
    )
    allocate_copies(config, layers, cache_bytes)
    assert all(layer.impl.recent is None for layer in layers)
    assert group_pool(layers, 3) is None
    if line is None:
        assert lines == []
    else:
        (logged,) = lines
        assert logged.startswith("turboquant3 recent tokens: no 8-bit copies, because ")
        assert line in logged


def test_a_model_without_this_cache_logs_nothing(tiny_llama: Path, lines: list[str]) -> None:
    allocate_copies(make_config(tiny_llama), [], 2**30)
    assert group_pool([], 3) is None
    assert lines == []


def test_layers_of_a_group_share_a_pool_that_fits_their_cache(tiny_llama: Path) -> None:
    layers = make_layers(num_blocks=5, block_size=32)
    allocate_copies(make_config(tiny_llama), layers, cache_bytes=2**30)
    pool = group_pool(layers, 3)
    assert pool is not None and pool.window_units == 3
    assert pool.unit_map.shape == (10,)
    assert all(layer.impl.pool is pool for layer in layers)
    assert group_pool(layers, 3) is pool  # another builder's call
    # The cache in which vLLM measures graphs is followed by the real one.
    for layer, larger in zip(layers, make_layers(num_blocks=50), strict=True):
        layer.kv_cache = larger.kv_cache
    replaced = group_pool(layers, 3)
    assert replaced is not None and replaced is not pool
    assert replaced.unit_map.shape == (100,)
    assert all(layer.impl.pool is replaced for layer in layers)


def test_a_pool_assigns_in_every_step_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Step numbers differ until they wrap around, and are never 0, the mark of no step."""
    pool = RecentPool(8, 4, 32, 2, torch.device("cpu"))
    table = torch.tensor([[3, 1]], dtype=torch.int32)

    def step(seq_len: int, query_len: int) -> list[int]:
        start = torch.tensor([0, query_len], dtype=torch.int32)
        pool.assign(table, torch.tensor([seq_len], dtype=torch.int32), start)
        return [index for index, mapped in enumerate(pool.unit_map.tolist()) if mapped]

    assert step(20, 20) == [6, 7]
    monkeypatch.setattr(pool, "_step", recent.MAX_STEP)
    assert step(33, 13) == [2, 6, 7]
    assert pool._step == 1
    assert pool.unit_map[2] & 0xFFFF == 1
    assert step(0, 0) == [2, 6, 7]  # padding


@pytest.mark.parametrize("busy_steps", [1, 2])
def test_a_pool_that_is_too_small_says_so_when_it_is_busy(
    busy_steps: int, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    """The windows of two requests are four units each; five have a place. Every step reports."""
    monkeypatch.setattr(recent, "REPORT_INTERVAL_S", 0)
    monkeypatch.setattr(recent, "BUSY_STEPS", busy_steps)
    pool = RecentPool(16, 5, 64, 4, torch.device("cpu"))

    def step(lengths: list[int]) -> None:
        lens = torch.tensor(lengths, dtype=torch.int32)
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).int()
        pool.assign(torch.tensor([[2], [1]], dtype=torch.int32), lens, starts)

    step([64, 0])
    step([64, 64])
    assert lines == []  # of the first step, whose four units had places
    step([64, 0])
    said = (
        "turboquant3 recent tokens: 8-bit copies of 62 % of the newest tokens of the running "
        "requests; the others are read from codes"
    )
    assert lines == ([said] if busy_steps == 1 else [])


def fake_worker(given: int | None, **attributes: Any) -> Any:
    made = worker.MeasuringWorker.__new__(worker.MeasuringWorker)
    made.cache_config = SimpleNamespace(kv_cache_memory_bytes=given)
    vars(made).update(attributes)
    return made


def test_the_memory_of_the_cache_where_it_is_given() -> None:
    assert fake_worker(10400)._cache_bytes() == 10000  # and 4 % of that for copies


def test_the_memory_of_the_cache_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CPUWorker.determine_available_memory: what is asked for less what the process takes."""
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=400))
    monkeypatch.setattr(worker.psutil, "Process", lambda: process)
    monkeypatch.setattr(worker.current_platform, "is_cpu", lambda: True)
    left = fake_worker(None, requested_cpu_memory=10800)._cache_bytes()
    assert left == 10000  # and 4 % of that for copies


def test_the_memory_of_the_cache_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Worker.determine_available_memory, before a forward pass: init_snapshot counts."""
    monkeypatch.setattr(worker.current_platform, "is_cpu", lambda: False)
    monkeypatch.setattr(worker.torch.accelerator, "empty_cache", lambda: None)
    monkeypatch.setattr(worker, "MemorySnapshot", lambda device: SimpleNamespace(free_memory=5000))
    left = fake_worker(
        None,
        device=torch.device("cuda", 0),
        requested_memory=13400,
        init_snapshot=SimpleNamespace(free_memory=8000),
    )._cache_bytes()
    assert left == 10000


PROGRAM = """
import json, os, sys
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
from vllm import LLM, SamplingParams

llm = LLM(sys.argv[1], skip_tokenizer_init=True, load_format="dummy", enforce_eager=True,
          kv_cache_dtype="turboquant3", max_model_len=256, max_num_seqs=4,
          kv_cache_memory_bytes=1 << 24, additional_config=json.loads(sys.argv[2]))
parameters = SamplingParams(max_tokens=20, ignore_eos=True, detokenize=False)
llm.generate({"prompt_token_ids": list(range(50))}, parameters)
layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
impls = [layer.impl for layer in layers if hasattr(layer, "impl")]
pools = {id(impl.pool): impl.pool for impl in impls}.values()
print("answer:", json.dumps({
    "layers": len(impls),
    "valid": [[(m & 0xffff).bit_count() for m in p.unit_map.tolist() if m] for p in pools if p],
    "written": [impl.recent.flatten(1).any(dim=1).sum().item() for impl in impls if impl.pool],
    "left": (1 << 24) - sum(x.nbytes for layer in layers if hasattr(layer, "impl")
                            for x in (layer.kv_cache, layer.impl.recent) if x is not None),
    "block": sum(layer.kv_cache[0].nbytes for layer in layers if hasattr(layer, "impl")),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="starts an engine on a CPU")
@pytest.mark.parametrize("recent_tokens", [0, 32])
def test_an_engine_copies_the_tokens_of_windows(tiny_llama: Path, recent_tokens: int) -> None:
    """Of 69 tokens that are stored, the first unit was never in a window."""
    options = json.dumps({"turboquant": {"recent_tokens": recent_tokens}})
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tiny_llama), options],
        env={**os.environ, "VLLM_NO_USAGE_STATS": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout.split("answer: ")[1].splitlines()[0])
    assert answer["layers"] == 2
    valid = [sorted(units) for units in answer["valid"]]
    assert valid == ([[5, 16, 16, 16]] if recent_tokens else [])
    assert answer["written"] == ([4, 4] if recent_tokens else [])
    assert 0 <= answer["left"] < answer["block"]  # the cache and its copies take what was given
