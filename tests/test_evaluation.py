"""`vllm-turboquant eval` end to end: real engines, a tiny amount of everything."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from click.testing import Result
from typer.testing import CliRunner

from vllm_turboquant.cli.eval import evaluate
from vllm_turboquant.evaluation.plan import Plan, Text
from vllm_turboquant.evaluation.prepare import default_texts
from vllm_turboquant.evaluation.rows import Row
from vllm_turboquant.options import MAX_COPIES_SHARE

MODEL = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m-instruct"
TINY = (
    *("--context", "96", "--windows", "2", "--cache-gib", "0.25", "--answer-tokens", "4"),
    *("--needle-lengths", "96", "--needle-depths", "50"),
)
EXACT = "turboquant3:exact_prefill=true"
CODES = "turboquant3:recent_tokens=0"
ROWS = ("turboquant_3bit_nc", "turboquant3", CODES, EXACT, "naive_int8")

app = typer.Typer(rich_markup_mode=None)
app.command()(evaluate)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def row_options(*rows: str) -> list[str]:
    return [argument for row in rows for argument in ("--row", row)]


def report(folder: Path) -> dict[str, Any]:
    """The rows of a report, by name."""
    rows = json.loads((folder / "report.json").read_text())["rows"]
    return {row["name"]: row for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a small evaluation."""
    pytest.importorskip("vllm")
    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing; `make test` fetches it", pytrace=False)
    out = tmp_path_factory.mktemp("evaluation")
    result = run(str(MODEL), *TINY, *row_options(*ROWS), "--out", str(out))
    complete = all(row["status"] == "complete" for row in report(out).values())
    assert result.exit_code == (0 if complete else 1), result.output
    return out


@pytest.mark.slow
@pytest.mark.vllm
def test_scores_are_ordered_as_the_caches_are(folder: Path) -> None:
    rows = report(folder)
    assert list(rows) == ["auto", *ROWS]
    for text in ("prose", "code"):
        kl = {name: row["texts"][text]["kl"]["mean"] for name, row in rows.items() if row["texts"]}
        assert kl["auto"] == 0  # two passes of one engine over the same tokens
        assert kl[CODES] > 10 * kl["naive_int8"] > 0
        assert kl[CODES] > kl["turboquant3"] > kl["naive_int8"]
        assert rows["auto"]["texts"][text]["agreement"]["mean"] == 1
        assert 5 < rows["auto"]["texts"][text]["perplexity"]["mean"] < 100


@pytest.mark.slow
@pytest.mark.vllm
def test_needles_answers_and_capacity(folder: Path) -> None:
    rows = report(folder)
    for name in ("auto", "turboquant3", "naive_int8"):
        (cell,) = rows[name]["recall"]
        assert (cell["length"], cell["depth"], cell["total"]) == (96, 50, 1)
        assert cell["found"] == 1
    assert rows["auto"]["num_answers"] == 12
    agree = {name: rows[name]["answers_agree"]["mean"] for name in ("naive_int8", CODES)}
    assert agree["naive_int8"] > agree[CODES]
    assert 5.7 < rows[CODES]["capacity_ratio"] < 5.9
    ratio = rows["turboquant3"]["capacity_ratio"]
    # Copies take their share of the memory, and the last of 4,000 blocks may not fit.
    assert 0.999 / (1 + MAX_COPIES_SHARE) < ratio / rows[CODES]["capacity_ratio"] < 1
    assert rows["naive_int8"]["capacity_ratio"] is None


@pytest.mark.slow
@pytest.mark.vllm
def test_a_cache_that_the_engine_would_misread_is_not_available(folder: Path) -> None:
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        pytest.skip("vLLM has a backend for this cache on GPUs: nothing is misread there")
    row = report(folder)["turboquant_3bit_nc"]
    assert row["status"] == "not available"
    assert "CPU_ATTN does not support KV cache dtype turboquant_3bit_nc" in row["reason"]


@pytest.mark.slow
@pytest.mark.vllm
def test_complete_rows_are_kept(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    result = run(str(MODEL), *TINY, *row_options("naive_int8"), "--out", str(copy))
    assert result.exit_code == 0, result.output
    for name in ("auto", "naive_int8"):
        assert f"{name}: kept from an earlier run" in result.output
    assert "Written:" in result.output


@pytest.mark.slow
@pytest.mark.vllm
def test_what_is_measured_is_decoding(folder: Path, tmp_path: Path) -> None:
    """One token a step, nothing can be prefilled exactly; in chunks, codes lose as much."""
    (tmp_path / "prose.txt").write_text(default_texts()["prose"])
    text = ("--text", str(tmp_path / "prose.txt"))
    rows = row_options("turboquant3", CODES, EXACT)
    result = run(str(MODEL), *TINY, *text, *rows, "--one-token-steps", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    in_chunks, one_by_one = report(folder), report(tmp_path)
    assert one_by_one[EXACT]["texts"] == one_by_one["turboquant3"]["texts"]
    assert one_by_one[EXACT]["recall"] == one_by_one["turboquant3"]["recall"]
    assert one_by_one[EXACT]["notes"] == one_by_one["turboquant3"]["notes"]
    assert "flatters" in in_chunks[EXACT]["notes"][0]
    kl = {
        name: row["texts"]["prose"]["kl"]["mean"] for name, row in in_chunks.items() if row["texts"]
    }
    decoding = one_by_one[CODES]["texts"]["prose"]["kl"]["mean"]
    # Equal in the mean only: bfloat16 rounds another way in each batch, and codes amplify that.
    assert kl[CODES] == pytest.approx(decoding, rel=0.3)
    assert kl[EXACT] < decoding / 10


@pytest.mark.vllm
def test_capacity_is_that_of_the_steps_asked_for() -> None:
    """A request of 1,024 tokens in blocks of 16: 64 of a layer that sees all, and for a window of
    40 those of 39 earlier tokens and one step, which begin anywhere in a block."""
    pytest.importorskip("vllm")
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import (
        FullAttentionSpec,
        KVCacheConfig,
        KVCacheGroupSpec,
        SlidingWindowSpec,
    )

    from vllm_turboquant.evaluation.recorder import Recorder

    recorder = Recorder()
    recorder.vllm_config = VllmConfig()
    recorder.vllm_config.model_config = SimpleNamespace(max_model_len=1024)
    recorder.vllm_config.scheduler_config.max_num_batched_tokens = 17  # of this engine
    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 64, "dtype": torch.bfloat16}
    specs = FullAttentionSpec(**shape), SlidingWindowSpec(**shape, sliding_window=40)
    groups = [KVCacheGroupSpec([str(i)], spec) for i, spec in enumerate(specs)]
    recorder.model_runner = SimpleNamespace(
        kv_cache_config=KVCacheConfig(num_blocks=690, kv_cache_tensors=[], kv_cache_groups=groups)
    )
    batches = recorder.vllm_config.max_concurrent_batches
    for step_tokens in (17, 64):
        blocks = 64 + math.ceil((39 + batches * step_tokens) / 16) + 1
        assert recorder.capacity_tokens(step_tokens) == int(690 / blocks * 1024)
    assert recorder.vllm_config.scheduler_config.max_num_batched_tokens == 17


@pytest.mark.slow
@pytest.mark.vllm
def test_needles_alone(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    alone = ("--windows", "0", "--answer-tokens", "0")
    result = run(str(MODEL), *TINY, *alone, "--row", "turboquant3", "--out", str(tmp_path))
    assert result.exit_code == 0, result.output
    assert "Compared with auto" not in result.output
    assert not (tmp_path / "quality.png").exists()
    assert (tmp_path / "needle.png").exists()
    for row in report(tmp_path).values():
        assert row["texts"] == {}
        assert [cell["total"] for cell in row["recall"]] == [1]


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("fake_quantize", "num_texts", "on_gpu", "is_eager"),
    [(None, 0, True, False), (None, 0, False, True), (None, 1, True, True), ("m:f", 0, True, True)],
)
def test_what_hooks_into_the_model_runs_without_graphs(
    fake_quantize: str | None,
    num_texts: int,
    on_gpu: bool,
    is_eager: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("vllm")
    from vllm.config import CompilationConfig, CUDAGraphMode

    from vllm_turboquant.evaluation import engine

    plan = Plan(
        model="m",
        device="d",
        cache_bytes=1,
        step_tokens=1,
        texts=[Text(name="t", windows=[[0]])] * num_texts,
        needles=[],
        questions=[],
    )
    row = Row(name="turboquant3", fake_quantize=fake_quantize)
    monkeypatch.setattr(engine.current_platform, "is_cuda", lambda: on_gpu)
    arguments = engine.execution(row, plan)
    assert arguments.get("enforce_eager", False) is is_eager
    if not is_eager:
        config = CompilationConfig(**arguments["compilation_config"])
        assert config.cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        assert not config.cudagraph_mode.requires_piecewise_compilation()


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("no/such-model",), "model 'no/such-model' is no folder, and cannot be loaded"),
        ((".",), "model '.' is a folder without a config.json"),
        ((str(MODEL), "--row", "fp7"), "row 'fp7' is unknown; a row is one of"),
        ((str(MODEL), "--context", "9999"), "the model's longest request is 8192 tokens"),
        ((str(MODEL), "--needle-lengths", "10"), "must have room for some sentences"),
        ((str(MODEL), "--needle-depths", "half"), "'half' is not a list like 512,2048"),
        ((str(MODEL), "--windows", "9999"), "give a longer text, or lower --windows or --context"),
        ((str(MODEL), "--out", str(MODEL / "config.json")), "cannot be a folder"),
        (
            (str(MODEL), "--windows", "0", "--needle-lengths", "", "--answer-tokens", "0"),
            "nothing to measure: give --windows, --needle-lengths or --answer-tokens",
        ),
        (
            (str(MODEL), "--windows", "0", "--text", str(MODEL / "config.json")),
            "--windows 0 leaves out all texts, and --text was given",
        ),
    ],
)
def test_refusals(
    arguments: tuple[str, ...], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("vllm")
    if not MODEL.exists():
        pytest.fail(f"{MODEL} is missing; `make test` fetches it", pytrace=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run(*arguments)
    assert result.exit_code == 2
    assert sentence in " ".join(result.output.split())
