"""Run rows, each in a child process that gives all its memory back and can only break itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vllm_turboquant.evaluation.plan import Plan, Result, fingerprint, hidden_path, today
from vllm_turboquant.evaluation.rows import Row
from vllm_turboquant.evaluation.run_row import ENDED

PLAN_FILE = "plan.json"
STOP_TIMEOUT_S = 60.0

#: What vLLM says when the error is that of another of its processes.
ELSEWHERE = re.compile("root cause|background process", re.IGNORECASE)
ERROR_LINE = re.compile(r"\b(\w+(?:Error|Exception): .+)$")

OnPhase = Callable[[str], None]
OnTokens = Callable[[int], None]


def complete_results(plan: Plan, folder: Path) -> Iterator[tuple[Path, Result | None]]:
    """Find the complete results in ``folder``.

    Yields:
        The file, and the result if ``plan`` would give it again: None if it was made with other
        settings, another model or other versions.
    """
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text())
        except (OSError, ValueError):
            continue
        # Known by two names, not by the whole schema: that of another version may differ.
        if (
            isinstance(content, dict)
            and "fingerprint" in content
            and content.get("status") == "complete"
        ):
            yield file, _fitting(plan, content)


def _fitting(plan: Plan, content: dict[str, Any]) -> Result | None:
    """The result in ``content`` if it has the fingerprint that ``plan`` would give it."""
    try:
        result = Result.model_validate(content)
    except ValidationError:
        return None
    return result if result.fingerprint == fingerprint(plan, result.row) else None


class Evaluation:
    """One output folder and what is asked in it.

    Args:
        plan: What every row is asked.
        folder: Exists; receives the plan, logs, results and hidden states.
    """

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        (folder / PLAN_FILE).write_text(plan.model_dump_json())

    def log(self, row: Row) -> Path:
        """Where the output of the engine goes."""
        return self.folder / f"{row.stem}.log"

    def kept(self, row: Row) -> Result | None:
        """The complete result of an earlier run with the same settings, if there is one."""
        try:
            result = Result.model_validate_json(self._result_file(row).read_text())
        except (OSError, ValueError):
            return None
        if result.status != "complete" or result.fingerprint != fingerprint(self.plan, row):
            return None
        if row.is_reference and not all(
            hidden_path(self.folder, text.name, i).exists()
            for text in self.plan.texts
            for i in range(len(text.windows))
        ):
            return None
        return result

    def others(self, rows: Collection[Row]) -> list[Result]:
        """The complete results of earlier runs with the same settings, of rows not in ``rows``."""
        found = (result for _, result in complete_results(self.plan, self.folder))
        return [result for result in found if result and result.row not in rows]

    def run(self, row: Row, on_phase: OnPhase, on_tokens: OnTokens) -> Result:
        """Run one row.

        Args:
            row: The row.
            on_phase: Called with what begins.
            on_tokens: Called with the number of prompt tokens that were computed.

        Returns:
            Its result, whatever became of the process.
        """
        target = self._result_file(row)
        target.unlink(missing_ok=True)
        command = [sys.executable, "-m", "vllm_turboquant.evaluation.run_row"]
        arguments = [str(self.folder / PLAN_FILE), row.model_dump_json(), str(self.folder)]
        with (
            self.log(row).open("wb") as log,
            subprocess.Popen(
                [*command, *arguments],
                stdin=subprocess.PIPE,  # open as long as this process lives; see run_row
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=_environment(),
                start_new_session=True,  # so that Ctrl-C ends it once, and in this order
            ) as process,
        ):
            try:
                _follow(process, on_phase, on_tokens)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(STOP_TIMEOUT_S)
            finally:
                with suppress(ProcessLookupError):  # vLLM's workers may outlive it
                    os.killpg(process.pid, signal.SIGKILL)
                code = process.wait()
        if not target.exists():
            return Result(
                row=row,
                fingerprint=fingerprint(self.plan, row),
                date=today(),
                status="failed",
                reason=f"the process ended with exit code {code}; see {self.log(row)}",
            )
        result = Result.model_validate_json(target.read_text())
        return result.model_copy(update={"reason": self._reason(result)})

    def _result_file(self, row: Row) -> Path:
        return self.folder / f"{row.stem}.json"

    def _reason(self, result: Result) -> str:
        """The reason of the process that had it: vLLM's workers write theirs to the log only."""
        if not ELSEWHERE.search(result.reason):
            return result.reason
        lines = self.log(result.row).read_text(errors="replace").splitlines()
        errors = [match[1] for line in lines if (match := ERROR_LINE.search(line))]
        return next((e for e in reversed(errors) if not ELSEWHERE.search(e)), result.reason)


def _environment() -> dict[str, str]:
    # NOTE: vLLM lets VLLM_CPU_KVCACHE_SPACE override kv_cache_memory_bytes without a word.
    kept = {name: v for name, v in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    # With the engine in the row's own process its exceptions arrive there, and with their reasons.
    return {**kept, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


def _follow(process: subprocess.Popen[str], on_phase: OnPhase, on_tokens: OnTokens) -> None:
    """Pass events on until the last one, or until the process ends."""
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("phase") == ENDED:
            return
        if "phase" in event:
            on_phase(event["phase"])
        on_tokens(event.get("tokens", 0))
