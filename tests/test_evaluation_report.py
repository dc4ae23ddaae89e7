"""Resuming, child processes, tables and plots of the evaluation, from canned results."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import vllm_turboquant
from vllm_turboquant.estimate import Estimate
from vllm_turboquant.evaluation import runner
from vllm_turboquant.evaluation.plan import (
    Engine,
    Needle,
    NeedleAnswer,
    Plan,
    Result,
    Text,
    WindowScore,
    fingerprint,
    hidden_path,
)
from vllm_turboquant.evaluation.report import (
    MIN_CLUSTERS,
    common_prefix,
    footnotes,
    make_table,
    summarize,
    summarize_text,
    write_json,
)
from vllm_turboquant.evaluation.rows import Row, parse_row
from vllm_turboquant.evaluation.run_row import one_line
from vllm_turboquant.evaluation.runner import Evaluation, complete_results

DTYPES = ("auto", "fp8", "turboquant_3bit_nc")
PLAN = Plan(
    model="nowhere",
    device="CPU",
    cache_bytes=2**30,
    step_tokens=64,
    texts=[Text(name="prose", windows=[[1, 2, 3, 4, 5]] * 2)],
    needles=[Needle(length=64, depth=d, number="123", prompt=[1, 2]) for d in (0, 0, 100)],
    questions=[[1], [2]],
)


def result(
    name: str,
    kl: float = 0.0,
    found: tuple[bool, bool, bool] = (True, True, True),
    answers: tuple[list[int], list[int]] = ([7, 8, 9, 10], [5, 6]),
    capacity: int = 1000,
    coded_layers: int = 30,
    backend: str = "CPU_ATTN",
) -> Result:
    """A complete result whose perplexity is exp(2 + kl)."""
    row = parse_row(name, DTYPES)
    windows = [
        WindowScore(
            sizes=[2, 2],
            nll=[2 + kl, 2 + kl],
            reference_nll=[2.0, 2.0],
            kl=[kl / 2, kl * 3 / 2],
            agreement=[1.0, 1 - kl],
        )
    ] * 2
    return Result(
        row=row,
        fingerprint=fingerprint(PLAN, row),
        date="2026-11-27",
        status="complete",
        engine=Engine(
            backends=[backend],
            num_layers=30,
            num_coded_layers=coded_layers,
            capacity_tokens=capacity,
            start_s=1.0,
        ),
        scores={"prose": windows},
        needles=[NeedleAnswer(text="", found=f) for f in found],
        answers=list(answers),
    )


def unavailable(name: str) -> Result:
    row = parse_row(name, DTYPES)
    return Result(
        row=row, fingerprint="", status="not available", reason="ValueError: no such cache"
    )


def evaluation(folder: Path, plan: Plan = PLAN) -> Evaluation:
    return Evaluation(plan, folder)


def keep(folder: Path, kept: Result) -> None:
    (folder / f"{kept.row.stem}.json").write_text(kept.model_dump_json())


def test_a_complete_row_is_kept(tmp_path: Path) -> None:
    keep(tmp_path, result("fp8", kl=0.25))
    assert evaluation(tmp_path).kept(parse_row("fp8", DTYPES)) == result("fp8", kl=0.25)


def test_rows_that_are_not_there_broken_or_incomplete_run(tmp_path: Path) -> None:
    fp8 = parse_row("fp8", DTYPES)
    assert evaluation(tmp_path).kept(fp8) is None
    keep(tmp_path, unavailable("fp8"))
    assert evaluation(tmp_path).kept(fp8) is None
    (tmp_path / "fp8.json").write_text("{")
    assert evaluation(tmp_path).kept(fp8) is None


@pytest.mark.parametrize(
    "change",
    [{"cache_bytes": 2**20}, {"one_token_steps": True}, {"questions": [[1], [3]]}],
    ids=str,
)
def test_rows_made_with_other_settings_run_again(tmp_path: Path, change: dict[str, object]) -> None:
    keep(tmp_path, result("fp8"))
    changed = PLAN.model_copy(update=change)
    assert evaluation(tmp_path, changed).kept(parse_row("fp8", DTYPES)) is None


def test_another_model_in_the_same_folder_makes_rows_run_again(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    plan, row = PLAN.model_copy(update={"model": str(model)}), parse_row("fp8", DTYPES)
    digests = [fingerprint(plan, row)]
    (model / "config.json").write_text('{"a": 1}')
    digests.append(fingerprint(plan, row))
    (model / "config.json").write_text('{"a": 2}')
    digests.append(fingerprint(plan, row))
    os.utime(model / "config.json", ns=(0, 1))  # as other weights of the same size
    digests.append(fingerprint(plan, row))
    assert len(set(digests)) == 4


def test_edited_code_makes_rows_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_turboquant, "__file__", str(tmp_path / "__init__.py"))
    row = parse_row("fp8", DTYPES)
    digests = [fingerprint(PLAN, row)]
    for name in ("layout.py", "evaluation/naive.py", "cli/eval.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
        digests.append(fingerprint(PLAN, row))
    assert len(set(digests)) == 3
    assert digests[2] == digests[3]  # a command line computes nothing


def test_complete_results_are_found_with_those_that_do_not_fit(tmp_path: Path) -> None:
    keep(tmp_path, result("fp8"))
    keep(tmp_path, result("naive_int4").model_copy(update={"fingerprint": "of another plan"}))
    keep(tmp_path, unavailable("turboquant_3bit_nc"))
    (tmp_path / "of another version.json").write_text('{"status": "complete", "fingerprint": 1}')
    for content in ("{", "[]", '{"rows": []}', '{"status": "complete"}'):
        (tmp_path / f"{len(content)}.json").write_text(content)
    found = {file.stem: fits for file, fits in complete_results(PLAN, tmp_path)}
    assert found == {"fp8": result("fp8"), "naive_int4": None, "of another version": None}


def test_other_rows_of_the_folder_are_those_that_fit_and_were_not_asked_for(tmp_path: Path) -> None:
    for name in ("auto", "fp8", "naive_int8"):
        keep(tmp_path, result(name))
    keep(tmp_path, result("naive_int4").model_copy(update={"fingerprint": "of another plan"}))
    asked = [parse_row(name, DTYPES) for name in ("auto", "fp8")]
    assert evaluation(tmp_path).others(asked) == [result("naive_int8")]


def test_the_reference_runs_again_without_its_hidden_states(tmp_path: Path) -> None:
    auto = parse_row("auto", DTYPES)
    keep(tmp_path, result("auto"))
    assert evaluation(tmp_path).kept(auto) is None
    for window in range(2):
        hidden_path(tmp_path, "prose", window).touch()
    assert evaluation(tmp_path).kept(auto) is not None


def run_child(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Result, list[str]]:
    """Run a row whose process executes ``code``, with OUT as its first argument."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{code}' $5\n")
    script.chmod(0o755)
    monkeypatch.setattr(runner.sys, "executable", str(script))
    seen: list[str] = []
    row = parse_row("fp8", DTYPES)
    ended = evaluation(folder).run(row, seen.append, lambda n: seen.append(str(n)))
    return ended, seen


def test_a_row_whose_process_dies_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep(tmp_path, result("fp8"))  # of an earlier run, and not to be taken for this one's
    code = 'import os; print("{\\"phase\\": \\"a\\"}", flush=True); os.kill(os.getpid(), 9)'
    ended, seen = run_child(tmp_path, code, monkeypatch)
    assert ended.status == "failed"
    assert "exit code -9; see" in ended.reason and str(tmp_path / "fp8.log") in ended.reason
    assert seen == ["a", "0"]


def test_a_result_is_read_and_the_reason_found_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vague = unavailable("fp8").model_copy(
        update={"reason": "RuntimeError: Engine core initialization failed. See root cause above."}
    )
    (tmp_path / "canned.json").write_text(vague.model_dump_json())
    code = (
        "import sys, shutil, time;"
        'print("(Worker) ValueError: page size 7 is odd", file=sys.stderr);'
        'print("RuntimeError: failed, see root cause", file=sys.stderr);'
        'shutil.copy(sys.argv[1] + "/canned.json", sys.argv[1] + "/fp8.json");'
        'print("{\\"tokens\\": 5}", flush=True); print("{\\"phase\\": \\"ended\\"}")'
    )
    ended, seen = run_child(tmp_path, code, monkeypatch)
    assert ended.status == "not available"
    assert ended.reason == "ValueError: page size 7 is odd"
    assert seen == ["5"]


def test_a_row_ends_with_whoever_started_it() -> None:
    """Even where the parent is killed and can do nothing about it."""
    code = (
        "import threading, time; from vllm_turboquant.evaluation.run_row import end_with_parent;"
        "threading.Thread(target=end_with_parent, daemon=True).start();"
        "print('started', flush=True); time.sleep(60)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin is not None and child.stdout is not None
    assert child.stdout.readline() == b"started\n"
    assert child.poll() is None
    child.stdin.close()
    assert child.wait(timeout=30) == -signal.SIGKILL
    child.stdout.close()


@pytest.mark.parametrize(
    ("message", "line"),
    {
        "": "ValueError",
        "\nNo room.\nAt all": "ValueError: No room",
        "1 validation error for X\n  Value error, bad dtype [type=value_error, in=3]\n  For more":
            "ValueError: bad dtype",
    }.items(),
)  # fmt: skip
def test_errors_are_told_in_one_line(message: str, line: str) -> None:
    assert one_line(ValueError(message)) == line


@pytest.mark.parametrize(
    ("want", "got", "length"),
    [([1, 2, 3], [1, 2, 3], 3), ([1, 2, 3], [1, 9, 3], 1), ([1, 2], [1, 2, 3], 2), ([1], [], 0)],
)
def test_common_prefix(want: list[int], got: list[int], length: int) -> None:
    assert common_prefix(want, got) == length


def test_summary() -> None:
    other = result(
        "fp8", 0.5, (True, False, False), ([7, 8, 0, 10], [5, 6]), capacity=1900, coded_layers=30
    )
    auto, fp8 = summarize(PLAN, [result("auto"), other])
    text = fp8.texts["prose"]
    assert text.perplexity.mean == pytest.approx(math.exp(2.5))
    assert text.change.mean == pytest.approx(math.exp(0.5) - 1)
    assert text.change.error == pytest.approx(0)  # equal on every token
    assert text.kl.mean == pytest.approx(0.5)
    assert text.kl.error == pytest.approx(0.5 / math.sqrt(12))  # of .25, .75, .25, .75
    assert text.agreement.mean == pytest.approx(0.75)
    assert text.kl_curve == pytest.approx([0.25, 0.75])
    assert fp8.capacity_ratio == pytest.approx(1.9)
    assert [(c.depth, c.found, c.total) for c in fp8.recall] == [(0, 1, 2), (100, 0, 1)]
    assert (fp8.answers_equal, fp8.num_answers) == (1, 2)
    assert fp8.answers_agree == Estimate(0.75, pytest.approx(0.25))  # of 0.5 and 1
    assert fp8.notes == []
    assert auto.capacity_ratio == 1
    assert auto.answers_agree is auto.answers_equal is None  # nothing to compare them with


def windows_that_differ(num_windows: int, generator: torch.Generator) -> list[WindowScore]:
    """Windows of 16 parts with a deviation of 1 in common and one of 0.5 each of their own."""
    common = torch.randn(num_windows, 1, generator=generator, dtype=torch.float64)
    own = torch.randn(num_windows, 16, generator=generator, dtype=torch.float64)
    values = (common + own / 2).tolist()
    other = [0.0] * 16
    return [
        WindowScore(sizes=[8] * 16, nll=other, reference_nll=other, kl=kl, agreement=other)
        for kl in values
    ]


@pytest.mark.parametrize("num_windows", [MIN_CLUSTERS, 8])
def test_the_error_is_that_of_windows_that_differ(num_windows: int) -> None:
    """The mean of 400 squared errors is that of the distribution within 4 %."""
    generator = torch.Generator().manual_seed(0)
    found = [summarize_text(windows_that_differ(num_windows, generator)).kl for _ in range(400)]
    claimed = sum(estimate.error**2 for estimate in found) / len(found)
    assert claimed == pytest.approx((1 + 0.5**2 / 16) / num_windows, rel=0.1)


def test_few_windows_take_parts_for_independent() -> None:
    windows = windows_that_differ(MIN_CLUSTERS - 1, torch.Generator().manual_seed(0))
    parts = [value for window in windows for value in window.kl]
    assert summarize_text(windows).kl == Estimate.of(parts, [8] * len(parts))


@pytest.mark.parametrize(
    ("row", "note"),
    [
        (result("naive_int8", 0.1), "simulated: keys and values went through this code"),
        (
            result("turboquant3:exact_prefill=true,recent_tokens=0", 0.1),
            "exact_prefill: .* flatters the cache",
        ),
        (result("turboquant_3bit_nc", 0.1), "computed one token a step"),
        (result("fp8", 0.1, coded_layers=26), "only 26 of 30 layers have this cache"),
        (result("fp8", 0.1, backend="FLEX"), "FLEX may attend to raw keys and values in prefill"),
        (unavailable("fp8"), "fp8 is not available: ValueError: no such cache"),
    ],
)
def test_notes(row: Result, note: str) -> None:
    summaries = summarize(PLAN, [result("auto"), row])
    assert summaries[0].notes == []
    (line,) = footnotes(PLAN, summaries)[1:]
    assert line.startswith("[1] ")
    assert re.search(note, line)


def test_notes_of_copies() -> None:
    summaries = summarize(PLAN, [result("auto"), result("turboquant3", 0.1)])
    in_lockstep, memory = footnotes(PLAN, summaries)[1:]
    assert "computed one token a step" in in_lockstep
    assert "room in the same memory, here for few requests; for many it can be 4% of it" in memory


@pytest.mark.parametrize(
    ("num_windows", "assumption"),
    [
        (MIN_CLUSTERS, "± is one standard error, from the spread of windows. "),
        (MIN_CLUSTERS - 1, "as if the parts of a window were independent: too small where windows"),
    ],
)
def test_the_first_line_says_what_is_compared(num_windows: int, assumption: str) -> None:
    texts = [Text(name="prose", windows=[[1, 2]] * num_windows)]
    plan = PLAN.model_copy(update={"texts": texts})
    summaries = summarize(PLAN, [result("auto"), result("fp8")])
    (line,) = footnotes(plan, summaries)
    assert assumption in line
    assert "Answers: of 2, how many are equal" in line
    (line,) = footnotes(plan.model_copy(update={"questions": []}), summaries)
    assert "Answers" not in line
    alone = plan.model_copy(update={"texts": []})
    (line,) = footnotes(alone, summaries)
    assert line.startswith("Answers: of 2")
    assert footnotes(alone.model_copy(update={"questions": []}), summaries) == []


def printed(results: list[Result], *, with_errors: bool, width: int) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(make_table(summarize(PLAN, results), with_errors=with_errors))
    return console.export_text()


ROWS = [
    result("auto"),
    result("fp8", 0.5, capacity=1900),
    unavailable("turboquant_3bit_nc"),
    result("naive_int8", 0.01),
]


def test_the_table_names_every_row_and_drops_no_digit() -> None:
    text = printed(ROWS, with_errors=True, width=120)
    assert "…" not in text
    for cell in ("1.90x", "+64.9% ±0.0%", "0.5000 ±0.1443", "75.0%", "simulated", "3/3"):
        assert cell in text, cell
    assert text.count("2/2") == text.count("100% ±0%") == 2  # the reference's answers are its own
    assert "turboquant_3bit_nc [1]" in text
    assert "not available" in text
    assert "naive_int8 [2]" in text


def test_without_errors_the_table_fits_80_columns() -> None:
    text = printed(ROWS, with_errors=False, width=80)
    assert "…" not in text and "±" not in text
    assert "0.5000" in text


def test_json_holds_every_row_and_is_strict(tmp_path: Path) -> None:
    single = result("fp8").model_copy(
        update={"answers": [], "scores": {"prose": [
            WindowScore(sizes=[4], nll=[1], reference_nll=[1], kl=[0], agreement=[1])
        ]}}
    )  # fmt: skip
    write_json(tmp_path / "report.json", PLAN, summarize(PLAN, [result("auto"), single, ROWS[2]]))
    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert [row["status"] for row in data["rows"]] == ["complete", "complete", "not available"]
    assert data["rows"][1]["texts"]["prose"]["kl"] == {"mean": 0.0, "error": None}
    assert data["rows"][1]["answers_agree"] is None
    assert data["plan"]["windows"] == {"prose": 2}
    assert data["plan"]["step_tokens"] == 64
    assert data["versions"]["vllm-turboquant"] == vllm_turboquant.__version__
    assert data["versions"]["torch"] == torch.__version__
    assert data["rows"][0]["date"] == "2026-11-27"
    assert [row["in_lockstep"] for row in data["rows"]] == [False, False, True]


def test_plots_of_complete_unavailable_and_equal_rows(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from vllm_turboquant.evaluation.plots import plot_needles, plot_quality

    for name, rows in {"all": ROWS, "equal": [result("auto"), result("fp8")]}.items():
        summaries = summarize(PLAN, rows)
        plot_quality(tmp_path / f"{name}-quality.png", summaries)
        plot_needles(tmp_path / f"{name}-needle.png", summaries)
        for file in tmp_path.glob(f"{name}-*.png"):
            assert file.read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.glob("*.png"))) == 4


def test_a_row_travels_to_its_process_unchanged() -> None:
    row = parse_row("turboquant3:exact_prefill=true", DTYPES)
    assert Row.model_validate_json(row.model_dump_json()) == row
