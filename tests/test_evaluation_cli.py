"""What `vllm-turboquant eval` keeps, refuses and returns; canned results in place of engines."""

from __future__ import annotations

import json
from pathlib import Path

import click.testing
import pytest
import typer
from typer.testing import CliRunner

from tests.test_evaluation_report import DTYPES, PLAN, result, unavailable
from vllm_turboquant.cli import eval as eval_module
from vllm_turboquant.evaluation.plan import Plan, Result, fingerprint, hidden_path
from vllm_turboquant.evaluation.rows import Row, parse_rows
from vllm_turboquant.evaluation.runner import Evaluation

app = typer.Typer(rich_markup_mode=None)
app.command()(eval_module.evaluate)


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the rows that were measured, in a folder without other files."""
    names: list[str] = []

    def run(self: Evaluation, row: Row, *on_event: object) -> Result:
        names.append(row.name)
        if row.cache_dtype == "turboquant_3bit_nc":
            return unavailable(row.name)
        made = result(row.name).model_copy(update={"fingerprint": fingerprint(self.plan, row)})
        (self.folder / f"{row.stem}.json").write_text(made.model_dump_json())
        for window in range(len(PLAN.texts[0].windows)):
            hidden_path(self.folder, "prose", window).touch()
        return made

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Evaluation, "run", run)
    return names


def evaluate(
    monkeypatch: pytest.MonkeyPatch, *arguments: str, plan: Plan = PLAN
) -> click.testing.Result:
    """Run the command in the current folder with a plan that is there already."""
    monkeypatch.setattr(
        eval_module, "_prepare", lambda settings, specs: (parse_rows(specs, DTYPES), plan)
    )
    return CliRunner().invoke(app, ["some/model", *arguments])


def reported() -> list[str]:
    rows = json.loads(Path("eval-model/report.json").read_text())["rows"]
    return [row["name"] for row in rows]


def test_rows_of_earlier_runs_stay_in_the_report(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert evaluate(monkeypatch, "--row", "naive_int8").exit_code == 0
    second = evaluate(monkeypatch, "--row", "fp8")
    assert second.exit_code == 0
    assert measured == ["auto", "naive_int8", "fp8"]
    assert reported() == ["auto", "fp8", "naive_int8"]
    assert "naive_int8: kept from an earlier run" in second.output


def test_results_of_another_plan_are_refused_or_discarded(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(monkeypatch, "--row", "fp8", "--row", "naive_int8")
    before = {file: file.read_bytes() for file in Path("eval-model").iterdir()}
    other = PLAN.model_copy(update={"cache_bytes": 1})
    refused = evaluate(monkeypatch, "--row", "fp8", plan=other)
    assert refused.exit_code == 2
    assert (
        "eval-model holds results of another model, of other settings or versions (auto.json, "
        "fp8.json, naive_int8.json); give another folder with --out, or discard them with --again"
    ) in " ".join(refused.output.split())
    assert {file: file.read_bytes() for file in Path("eval-model").iterdir()} == before

    del measured[:]
    assert evaluate(monkeypatch, "--row", "fp8", "--again", plan=other).exit_code == 0
    assert measured == reported() == ["auto", "fp8"]
    assert evaluate(monkeypatch, "--row", "fp8", plan=other).exit_code == 0
    assert measured == ["auto", "fp8"]


def test_again_keeps_other_rows_of_the_same_plan(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate(monkeypatch, "--row", "naive_int8")
    evaluate(monkeypatch, "--row", "fp8", "--again")
    assert measured == ["auto", "naive_int8", "auto", "fp8"]
    assert reported() == ["auto", "fp8", "naive_int8"]


def test_a_row_that_was_named_and_is_not_available_is_an_error(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = evaluate(monkeypatch, "--row", "turboquant_3bit_nc", "--row", "fp8")
    assert ended.exit_code == 1
    assert "turboquant_3bit_nc is not available: ValueError: no such cache" in ended.output
    assert reported() == ["auto", "turboquant_3bit_nc", "fp8"]
    assert evaluate(monkeypatch).exit_code == 0  # by default it is only tried


def test_the_folder_of_a_local_model_is_called_after_it(
    measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        eval_module, "_prepare", lambda settings, specs: (parse_rows(specs, DTYPES), PLAN)
    )
    Path("my-model").mkdir()
    monkeypatch.chdir("my-model")
    assert CliRunner().invoke(app, [".", "--row", "fp8"]).exit_code == 0
    assert Path("eval-my-model", "report.json").exists()
