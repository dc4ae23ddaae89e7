"""What the results of the rows say about each cache, as a table and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from vllm_turboquant.estimate import Estimate
from vllm_turboquant.evaluation.plan import Plan, Result, WindowScore, versions
from vllm_turboquant.options import MAX_COPIES_SHARE

#: From this many windows of a text on, its standard errors come from their spread.
MIN_CLUSTERS = 4
#: Backends whose prefill is known to read the paged cache and nothing else (``rows``).
READING_BACKENDS = {"CPU_ATTN", "FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "TURBOQUANT3"}


@dataclass(frozen=True)
class TextSummary:
    """How well a row predicts one text.

    Attributes:
        perplexity: With its standard error.
        change: Perplexity over that of the reference, minus 1. The same tokens are compared, so the
            error is much smaller than that of the two perplexities.
        kl: Mean divergence from the reference, in nats per token.
        agreement: Share of tokens whose most likely successor is the reference's.
        kl_curve: [num_parts] means of the divergence over consecutive parts of the windows.
    """

    perplexity: Estimate
    change: Estimate
    kl: Estimate
    agreement: Estimate
    kl_curve: list[float]


@dataclass(frozen=True)
class Recall:
    """Needles found at one context length and depth."""

    length: int
    depth: int
    found: int
    total: int


@dataclass(frozen=True)
class RowSummary:
    """Everything that tables and plots show of one row.

    Attributes:
        name: Of the row.
        status: As in ``plan.Result``.
        reason: Why it is not complete.
        date: When it was measured.
        in_lockstep: Whether it was computed one token a step.
        capacity_tokens: Tokens that fit; None for a simulated cache and without an engine.
        capacity_ratio: The same over the reference's.
        texts: By name.
        recall: One for each length and depth.
        answers_agree: Mean share of an answer before it first differs from the reference's; None
            for the reference itself and without answers.
        answers_equal: Number of answers that never do; None likewise.
        num_answers: Number of answers.
        notes: Sentences that belong under a table.
    """

    name: str
    status: str
    reason: str
    date: str
    in_lockstep: bool
    capacity_tokens: int | None
    capacity_ratio: float | None
    texts: dict[str, TextSummary]
    recall: list[Recall]
    answers_agree: Estimate | None
    answers_equal: int | None
    num_answers: int
    notes: list[str]

    @property
    def found(self) -> int:
        """Needles found at all lengths and depths."""
        return sum(cell.found for cell in self.recall)

    @property
    def asked(self) -> int:
        """Needles asked for."""
        return sum(cell.total for cell in self.recall)


def summarize(plan: Plan, results: Sequence[Result]) -> list[RowSummary]:
    """Compare every row with the first, which is the reference and complete."""
    return [summarize_row(plan, results[0], result) for result in results]


def summarize_row(plan: Plan, reference: Result, result: Result) -> RowSummary:
    """Compare one row with the reference."""
    capacity = ratio = None
    if result.engine and reference.engine and not result.row.fake_quantize:
        capacity = result.engine.capacity_tokens
        ratio = capacity / reference.engine.capacity_tokens
    agree = equal = None
    if result.answers and not result.row.is_reference:
        pairs = list(zip(reference.answers, result.answers, strict=True))
        agree = Estimate.of([common_prefix(*pair) / max(len(pair[0]), 1) for pair in pairs])
        equal = sum(want == got for want, got in pairs)
    return RowSummary(
        name=result.row.name,
        status=result.status,
        reason=result.reason,
        date=result.date,
        in_lockstep=plan.is_in_lockstep(result.row),
        capacity_tokens=capacity,
        capacity_ratio=ratio,
        texts={name: summarize_text(windows) for name, windows in result.scores.items()},
        recall=recall(plan, result),
        answers_agree=agree,
        answers_equal=equal,
        num_answers=len(result.answers),
        notes=list(notes(plan, result)),
    )


def summarize_text(windows: Sequence[WindowScore]) -> TextSummary:
    """Means over all windows of a text.

    The parts of a window have its text and, in every window, their place in common; windows are
    independent. Only where they are too few to show their spread, parts are taken for independent.
    """
    sizes = [window.sizes for window in windows]

    def estimate(value: Callable[[WindowScore], list[float]]) -> Estimate:
        parts = [value(window) for window in windows]
        if len(windows) < MIN_CLUSTERS:
            return Estimate.of(list(chain(*parts)), list(chain(*sizes)))
        means = [Estimate.of(*window).mean for window in zip(parts, sizes, strict=True)]
        return Estimate.of(means, list(map(sum, sizes)))

    def difference(window: WindowScore) -> list[float]:
        return [a - b for a, b in zip(window.nll, window.reference_nll, strict=True)]

    nll, change = estimate(lambda window: window.nll), estimate(difference)
    curves = zip(*(window.kl for window in windows), strict=True)
    return TextSummary(
        perplexity=Estimate(math.exp(nll.mean), math.exp(nll.mean) * nll.error),
        change=Estimate(math.expm1(change.mean), math.exp(change.mean) * change.error),
        kl=estimate(lambda window: window.kl),
        agreement=estimate(lambda window: window.agreement),
        kl_curve=[sum(part) / len(part) for part in curves],
    )


def recall(plan: Plan, result: Result) -> list[Recall]:
    """Count the needles found, by length and depth, in the order of the plan."""
    cells: dict[tuple[int, int], list[bool]] = {}
    for needle, answer in zip(plan.needles, result.needles, strict=False):
        cells.setdefault((needle.length, needle.depth), []).append(answer.found)
    return [Recall(*cell, sum(found), len(found)) for cell, found in cells.items()]


def common_prefix(want: Sequence[int], got: Sequence[int]) -> int:
    """Number of equal tokens before the first difference."""
    return next(
        (i for i, (a, b) in enumerate(zip(want, got, strict=False)) if a != b),
        min(len(want), len(got)),
    )


def notes(plan: Plan, result: Result) -> list[str]:
    """What a reader has to know about how a row was measured."""
    found: list[str] = []
    row, engine = result.row, result.engine
    if result.status != "complete":
        return [f"{row.name} is {result.status}: {result.reason}"]
    if row.fake_quantize:
        found.append(
            "simulated: keys and values went through this code on their way into an auto cache"
        )
    in_lockstep = plan.is_in_lockstep(row)
    if in_lockstep:
        found.append("computed one token a step, so that every key and value came from the cache")
    elif row.is_flattering:
        found.append(
            "exact_prefill: text and needle prompts were attended to exactly, which flatters the "
            "cache; leave the option out to measure it"
        )
    if row.has_copies:
        found.append(
            "8-bit copies of recent tokens take room in the same memory, here for few requests; "
            f"for many it can be {MAX_COPIES_SHARE:.0%} of it"
        )
    if engine and not row.fake_quantize and engine.num_coded_layers < engine.num_layers:
        found.append(
            f"only {engine.num_coded_layers} of {engine.num_layers} layers have this cache; the "
            "others have an auto one"
        )
    if engine and not in_lockstep and not READING_BACKENDS.issuperset(engine.backends):
        found.append(
            f"attention backend {', '.join(engine.backends)} may attend to raw keys and values in "
            "prefill; --one-token-steps measures the cache for certain"
        )
    return found


def make_table(summaries: Sequence[RowSummary], with_errors: bool = True) -> Table:
    """The table of an evaluation: a row for each cache, in its cells a line for each text.

    Args:
        summaries: All rows.
        with_errors: Add standard errors; without them 80 columns are enough for usual names.
    """
    padding = (0, 1, 0, 0) if with_errors else 0
    table = Table(box=box.SIMPLE_HEAD, padding=padding, show_edge=False, show_lines=True)
    for heading in ("cache,\ntokens that fit", "text"):
        table.add_column(heading, no_wrap=True)
    for heading in ("perplexity", "change", "KL, nats", "top-1", "needles", "answers"):
        table.add_column(heading, justify="right", no_wrap=True)
    numbers = note_numbers(summaries)

    def cell(estimate: Estimate, form: str) -> str:
        error = f" ±{estimate.error:{form.lstrip('+')}}" if with_errors else ""
        return f"{estimate.mean:{form}}{error}"

    def lines(row: RowSummary, value: Callable[[TextSummary], Estimate], form: str) -> str:
        return "\n".join(cell(value(text), form) for text in row.texts.values())

    for row in summaries:
        marks = "".join(f"[{numbers[note]}]" for note in row.notes)
        equal = f"{row.answers_equal}/{row.num_answers}"
        table.add_row(
            escape(f"{row.name} {marks}\n{capacity_cell(row)}"),
            "\n".join(row.texts),
            "\n".join(f"{text.perplexity.mean:.2f}" for text in row.texts.values()),
            lines(row, lambda text: text.change, "+.1%"),
            lines(row, lambda text: text.kl, ".4f"),
            "\n".join(f"{text.agreement.mean:.1%}" for text in row.texts.values()),
            f"{row.found}/{row.asked}" if row.asked else "",
            f"{equal}\n{cell(row.answers_agree, '.0%')}" if row.answers_agree else "",
        )
    return table


def capacity_cell(row: RowSummary) -> str:
    """How many tokens fit beside the reference's, or why that is not said."""
    if row.status != "complete":
        return row.status
    return "simulated" if row.capacity_ratio is None else f"{row.capacity_ratio:.2f}x"


def note_numbers(summaries: Sequence[RowSummary]) -> dict[str, int]:
    """Number the notes in the order of the rows; rows share a note."""
    distinct = dict.fromkeys(chain.from_iterable(row.notes for row in summaries))
    return {note: number for number, note in enumerate(distinct, 1)}


def footnotes(plan: Plan, summaries: Sequence[RowSummary]) -> list[str]:
    """The lines under the table."""
    error = (
        "from the spread of windows"
        if min((len(text.windows) for text in plan.texts), default=0) >= MIN_CLUSTERS
        else "as if the parts of a window were independent: too small where windows differ "
        f"(--windows {MIN_CLUSTERS} or more shows how much they do)"
    )
    answers = (
        f" Answers: of {len(plan.questions)}, how many are equal, and the mean share of tokens "
        "before the first difference."
    )
    texts = (
        f"Compared with {summaries[0].name} token by token; ± is one standard error, {error}. "
        "top-1: same most likely token."
    )
    explained = (texts if plan.texts else "") + (answers if plan.questions else "")
    return [
        *([explained.strip()] if explained else []),
        *(f"[{number}] {note}" for note, number in note_numbers(summaries).items()),
    ]


def write_json(path: Path, plan: Plan, summaries: Sequence[RowSummary]) -> None:
    """Write the summaries and how they were made; NaN becomes null."""
    how: dict[str, Any] = {
        "model": plan.model,
        "device": plan.device,
        "context": plan.context,
        "windows": {text.name: len(text.windows) for text in plan.texts},
        "cache_bytes": plan.cache_bytes,
        "step_tokens": plan.step_tokens,
        "one_token_steps": plan.one_token_steps,
    }
    # All rows were made with these versions: a result of others does not fit the plan.
    data = {"versions": versions(), "plan": how, "rows": [asdict(row) for row in summaries]}
    path.write_text(json.dumps(_without_nan(data), indent=1) + "\n")


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
