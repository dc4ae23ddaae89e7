"""What a user can set, and what it is by default; imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Defaults:
    """What suits one kind of device.

    Attributes:
        context: Tokens of a window.
        windows: Windows of each text.
        needle_lengths: Context lengths in tokens.
        needle_samples: Prompts of each length and depth.
        cache_gib: Memory of the KV cache, in GiB.
        step_tokens: Most tokens computed in one step.
    """

    context: int
    windows: int
    needle_lengths: tuple[int, ...]
    needle_samples: int
    cache_gib: float
    step_tokens: int


CPU = Defaults(1024, 2, (512, 2048), 1, 1.0, 2048)
GPU = Defaults(2048, 8, (4096, 16384), 2, 8.0, 8192)
NEEDLE_DEPTHS = (0, 25, 50, 75, 100)
ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Settings:
    """What was asked for; None where the default is to be taken.

    Attributes:
        model: Folder or name of the model.
        texts: Files; the default texts if there are none.
        context: See ``Defaults``.
        windows: See ``Defaults``; 0 for no texts.
        needle_lengths: See ``Defaults``; lengths past the model's are cut to it. Empty for none.
        needle_depths: Depths of the needle in percent.
        needle_samples: See ``Defaults``.
        answer_tokens: Tokens of each greedy answer; 0 for no answers.
        cache_gib: See ``Defaults``.
        tensor_parallel_size: GPUs that share the model.
        trust_remote_code: As vLLM's option.
        one_token_steps: Compute one token of a request per step in every row.
    """

    model: str
    texts: Sequence[Path] = ()
    context: int | None = None
    windows: int | None = None
    needle_lengths: Sequence[int] | None = None
    needle_depths: Sequence[int] = NEEDLE_DEPTHS
    needle_samples: int | None = None
    answer_tokens: int = ANSWER_TOKENS
    cache_gib: float | None = None
    tensor_parallel_size: int = 1
    trust_remote_code: bool = False
    one_token_steps: bool = False
