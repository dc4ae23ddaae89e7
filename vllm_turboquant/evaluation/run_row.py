"""Measure one row: ``python -m vllm_turboquant.evaluation.run_row PLAN ROW OUT``.

PLAN is the file of a ``plan.Plan``, ROW the JSON of a ``rows.Row``, OUT the folder of the results.
Events go to standard output as JSON lines; whatever else is printed, by vLLM and its children, goes
to standard error. The result is written to OUT, complete or not at all. When standard input ends,
so did whoever wanted the result, and everything else does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from vllm_turboquant.evaluation import plan as planning
from vllm_turboquant.evaluation.needle import is_found
from vllm_turboquant.evaluation.plan import NeedleAnswer, Plan, Result, WindowScore
from vllm_turboquant.evaluation.rows import Row

if TYPE_CHECKING:
    from vllm_turboquant.evaluation.engine import Engine


#: The phase after which nothing follows.
ENDED = "ended"


class Events:
    """Progress for the parent process.

    Args:
        stream: Where the lines go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def phase(self, name: str) -> None:
        """Say what begins."""
        self._send(phase=name)

    def done(self, tokens: int) -> None:
        """Report prompt tokens as computed."""
        self._send(tokens=tokens)

    def _send(self, **event: Any) -> None:
        print(json.dumps(event), file=self._stream, flush=True)


def claim_stdout() -> TextIO:
    """Keep standard output for events, and send what others write to it to standard error."""
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return events


def end_with_parent() -> None:
    """Wait for the end of standard input; then end this process, and its group if it leads one.

    An engine that outlived its parent would hold its memory until it has measured everything.
    """
    while os.read(0, 1024):
        pass
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def measure(row: Row, plan: Plan, folder: Path, events: Events) -> Result:
    """Start the engine with the cache of ``row`` and ask it everything in ``plan``.

    An engine that does not start, or breaks off, is a result too.
    """
    result = Result(
        row=row,
        fingerprint=planning.fingerprint(plan, row),
        date=planning.today(),
        status="not available",
    )
    begin = time.monotonic()
    try:
        from vllm_turboquant.evaluation.engine import Engine

        events.phase("starting the engine")
        engine = Engine(row, plan)
        start_s = time.monotonic() - begin
        described = planning.Engine(
            backends=engine.backends,
            num_layers=engine.num_layers,
            num_coded_layers=engine.num_coded_layers,
            capacity_tokens=engine.call("capacity_tokens", plan.step_tokens),
            start_s=start_s,
        )
        result = result.model_copy(update={"status": "failed", "engine": described})
        measured = {
            "scores": score_texts(engine, folder, events),
            "needles": find_needles(engine, events),
            "answers": answer_questions(engine, events),
            "measure_s": time.monotonic() - begin - start_s,
        }
    except Exception as error:  # whatever vLLM raises is this row's result; the log has it whole
        traceback.print_exc()
        return result.model_copy(update={"reason": one_line(error)})
    return result.model_copy(update={"status": "complete", **measured})


def score_texts(engine: Engine, folder: Path, events: Events) -> dict[str, list[WindowScore]]:
    """Score every window of every text.

    The reference computes its windows twice, and scores the second pass against the first: what it
    shows is the noise of the instrument.
    """
    scores: dict[str, list[WindowScore]] = {}
    for text in engine.plan.texts:
        if engine.row.is_reference:
            events.phase(f"{text.name}, reference")
            for num_windows in engine.save_reference(text, folder):
                events.done(num_windows * engine.plan.context)
        events.phase(text.name)
        scores[text.name] = []
        for batch in engine.score(text, folder):
            scores[text.name] += batch
            events.done(len(batch) * engine.plan.context)
    return scores


def find_needles(engine: Engine, events: Events) -> list[NeedleAnswer]:
    """Ask for every needle; prompts of similar length are neighbours, and run together."""
    needles = engine.plan.needles
    answers: list[NeedleAnswer] = []
    if needles:
        events.phase(f"needles, up to {needles[-1].length} tokens")
    prompts = [needle.prompt for needle in needles]
    for batch in engine.generate(prompts, engine.plan.needle_tokens):
        asked = needles[len(answers) : len(answers) + len(batch)]
        answers += [
            NeedleAnswer(text=text, found=is_found(text, needle.number))
            for needle, (_, text) in zip(asked, batch, strict=True)
        ]
        events.done(sum(len(needle.prompt) for needle in asked))
    return answers


def answer_questions(engine: Engine, events: Events) -> list[list[int]]:
    """Answer the questions greedily."""
    questions = engine.plan.questions
    answers: list[list[int]] = []
    if questions:
        events.phase("questions")
    for batch in engine.generate(questions, engine.plan.answer_tokens):
        asked = questions[len(answers) : len(answers) + len(batch)]
        answers += [ids for ids, _ in batch]
        events.done(sum(map(len, asked)))
    return answers


def one_line(error: Exception) -> str:
    """What a user should know about ``error``: its type and first telling line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # A pydantic error counts its errors first and names them below.
    told = next((line for line in lines if line.startswith("Value error, ")), "".join(lines[:1]))
    told = told.removeprefix("Value error, ").split(" [type=")[0].rstrip(".")
    return f"{type(error).__name__}: {told}" if told else type(error).__name__


def main() -> None:
    """Run as a program; see the module's docstring."""
    threading.Thread(target=end_with_parent, daemon=True).start()
    events = Events(claim_stdout())
    plan_file, row, out = sys.argv[1:]
    folder = Path(out)
    parsed = Row.model_validate_json(row)
    result = measure(parsed, Plan.model_validate_json(Path(plan_file).read_text()), folder, events)
    target = folder / f"{parsed.stem}.json"
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(result.model_dump_json(indent=1))
    unfinished.rename(target)
    events.phase(ENDED)


if __name__ == "__main__":
    main()
