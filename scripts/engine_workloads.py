"""What bench_engine.py asks of engines: sets of workloads."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path

from decode_client import Prompts, random_prompts


@dataclass(frozen=True)
class Workload:
    """Requests of one shape.

    Attributes:
        name: What its rows are called.
        input_tokens: Length of each prompt.
        output_tokens: New tokens of each request, whatever the model says.
        concurrency: Requests at a time; None for as many as the cache holds.
        prompts: Requests in all; of decoding, the most at a time.
        decode: Whether decoding alone is measured.
        first_token: Whether times to the first token alone are measured, of one request at a time,
            and of other engines in turn where these run, too.
    """

    name: str
    input_tokens: int
    output_tokens: int
    concurrency: int | None
    prompts: int
    decode: bool = False
    first_token: bool = False

    @classmethod
    def parse(cls, text: str, known: str = "requests") -> Workload:
        """Read ``NAME=input,output,concurrency,prompts``, or the name of one of a set.

        Args:
            text: What to read.
            known: Key of ``SETS``.

        Raises:
            argparse.ArgumentTypeError: It is neither; the message says what is accepted.
        """
        if text in SETS[known]:
            return SETS[known][text]
        match = re.fullmatch(r"([^=]+)=([1-9]\d*),([1-9]\d*),(fit|[1-9]\d*),([1-9]\d*)", text)
        if match is None:
            raise argparse.ArgumentTypeError(
                f"{text!r} is no workload; give NAME=input,output,concurrency,prompts (positive "
                f"numbers, or fit for the concurrency) or one of {', '.join(SETS[known])}"
            )
        concurrency = None if match[4] == "fit" else int(match[4])
        sizes = int(match[2]), int(match[3]), concurrency, int(match[5])
        return cls(match[1], *sizes, decode=known == "decode")

    @property
    def request_tokens(self) -> int:
        """Slots that one request needs at its end."""
        return self.input_tokens + self.output_tokens

    def clients(self, fit: int) -> int:
        """Requests at a time against an engine whose cache holds ``fit`` of them."""
        fit = max(1, fit)
        wanted = self.concurrency or fit
        # What does not fit would be prefilled again and again, which is not decoding.
        return min(min(wanted, fit) if self.decode else wanted, self.prompts)


def prompts_for(model: Path, workload: Workload, count: int) -> Prompts:
    """Random prompts of one workload."""
    config = json.loads((model / "config.json").read_text())
    vocab_size = config.get("text_config", config)["vocab_size"]
    return random_prompts(workload.name, count, workload.input_tokens, vocab_size)


def by_name(*workloads: Workload) -> dict[str, Workload]:
    """A set, in this order."""
    return {workload.name: workload for workload in workloads}


SETS = {
    "requests": by_name(
        Workload("chat", 128, 128, 64, 256),
        Workload("4k-x16", 4096, 128, 16, 48),
        Workload("16k-x1", 16384, 64, 1, 3),
        Workload("16k-x8", 16384, 64, 8, 16),
        Workload("fit", 2048, 256, None, 400),
        Workload("ttft-512", 512, 1, 1, 40, first_token=True),
        Workload("ttft-2k", 2048, 1, 1, 40, first_token=True),
        Workload("ttft-8k", 8192, 1, 1, 30, first_token=True),
        Workload("ttft-16k", 16384, 1, 1, 20, first_token=True),
    ),
    "decode": by_name(
        *(
            Workload(f"{context}-{requests}", input_tokens, 512, concurrency, prompts, decode=True)
            for context, input_tokens in {"4k": 4096, "16k": 16384, "32k": 32768 - 512}.items()
            for requests, concurrency, prompts in (
                ("x1", 1, 1),
                ("x16", 16, 16),
                ("fit", None, 1024),
            )
        )
    ),
}
QUICK = {
    "requests": ("chat", "16k-x1", "ttft-2k", "ttft-16k"),
    "decode": ("4k-x1", "16k-x16", "16k-fit"),
}
