"""Check what was asked for, and turn it into the token ids that every row is given."""

from __future__ import annotations

import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from vllm_turboquant.evaluation.needle import make_needle
from vllm_turboquant.evaluation.plan import Needle, Plan, Text
from vllm_turboquant.evaluation.settings import CPU, GPU, Settings

#: Of a longer file only the beginning is used.
MAX_CHARACTERS = 2**22
CODE_MODULES = ("argparse", "inspect", "subprocess", "tarfile", "typing", "uuid")

#: What a small model can answer in a sentence or two; greedy decoding makes answers comparable.
QUESTIONS = (
    "What is the capital of Italy?",
    "Write one sentence about the sea.",
    "Name three fruits that are red.",
    "How many days are there in a week?",
    "Explain in two sentences why leaves are green.",
    "What is the opposite of cold?",
    "Count from one to ten.",
    "Write a short poem about the moon.",
    "What do bees make?",
    "Give me a simple recipe for an omelette.",
    "What is 12 plus 30?",
    "Tell me how rain forms.",
)


class InputError(ValueError):
    """Something given cannot be used; one sentence with what can."""


def make_plan(settings: Settings, device: str, on_gpu: bool) -> Plan:
    """Check ``settings`` and prepare everything that rows are asked.

    Args:
        settings: What was asked for.
        device: Name of the device.
        on_gpu: Which defaults to take.

    Raises:
        InputError: Something cannot be used.
    """
    if settings.windows == 0 and settings.texts:
        raise InputError("--windows 0 leaves out all texts, and --text was given; drop one of them")
    texts = (read_texts(settings.texts) or default_texts()) if settings.windows != 0 else {}
    config = load_config(settings.model, settings.trust_remote_code)
    tokens = Tokens.load(settings.model, config.model_type, settings.trust_remote_code)
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    defaults = GPU if on_gpu else CPU
    context = settings.context or min(defaults.context, (longest or defaults.context + 1) - 1)
    if longest and context >= longest:
        raise InputError(
            f"--context {context} was given; the model's longest request is {longest} tokens, and "
            "one is generated"
        )
    windows = defaults.windows if settings.windows is None else settings.windows
    plan = Plan(
        model=settings.model,
        device=device,
        tensor_parallel_size=settings.tensor_parallel_size,
        trust_remote_code=settings.trust_remote_code,
        one_token_steps=settings.one_token_steps,
        cache_bytes=int((settings.cache_gib or defaults.cache_gib) * 2**30),
        step_tokens=defaults.step_tokens,
        texts=[make_windows(tokens, name, text, context, windows) for name, text in texts.items()],
        needles=[],
        questions=[tokens.question(text) for text in QUESTIONS if settings.answer_tokens],
        answer_tokens=settings.answer_tokens,
        model_max_len=longest,
    )
    lengths = settings.needle_lengths
    needles = make_needles(
        tokens,
        clip(defaults.needle_lengths if lengths is None else lengths, longest, plan.needle_tokens),
        settings.needle_depths,
        settings.needle_samples or defaults.needle_samples,
    )
    plan = plan.model_copy(update={"needles": needles})
    if not (plan.texts or plan.needles or plan.questions):
        raise InputError("nothing to measure: give --windows, --needle-lengths or --answer-tokens")
    return plan


def cpu_name(info: Path = Path("/proc/cpuinfo")) -> str:
    """Model of this machine's processor where Linux says it, else "CPU"."""
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "CPU"


def load_config(model: str, trust_remote_code: bool) -> Any:
    """The configuration of the model, from transformers.

    Raises:
        InputError: There is no such model.
    """
    from transformers import AutoConfig

    if Path(model).is_dir() and not Path(model, "config.json").exists():
        raise InputError(f"model {model!r} is a folder without a config.json")
    try:
        return AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        first_line = str(error).split("\n")[0]
        raise InputError(
            f"model {model!r} is no folder, and cannot be loaded by that name: {first_line}"
            if not Path(model).is_dir()
            else f"model {model!r} cannot be loaded: {first_line}"
        ) from None


def clip(lengths: Sequence[int], longest: int | None, reserve: int) -> list[int]:
    """Cut lengths to what leaves room for an answer and its companion; equal ones fall together."""
    room = longest - reserve - 1 if longest else max(lengths, default=0)
    return sorted({min(length, room) for length in lengths})


@dataclass(frozen=True)
class Tokens:
    """A model's tokenizer as the evaluation uses it.

    Attributes:
        tokenizer: From transformers.
        prefix: Token ids that every prompt begins with: BOS or nothing.
    """

    tokenizer: Any
    prefix: list[int]

    @staticmethod
    def load(model: str, model_type: str, trust_remote_code: bool) -> Tokens:
        """Load the tokenizer and find out whether the model expects BOS."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        return Tokens(tokenizer, bos_prefix(tokenizer, model_type))

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text`` without special ones."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def prompt(self, text: str) -> list[int]:
        """Token ids of ``text`` as a prompt."""
        return [*self.prefix, *self.encode(text)]

    def question(self, text: str) -> list[int]:
        """Token ids of ``text`` as a user's turn, where the model knows turns."""
        if not getattr(self.tokenizer, "chat_template", None):
            return self.prompt(f"Question: {text}\nAnswer:")
        turn = [{"role": "user", "content": text}]
        # The template writes special tokens itself.
        return self.encode(
            self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        )


def bos_prefix(tokenizer: Any, model_type: str) -> list[int]:
    """BOS where the tokenizer adds it, and for Gemma, whose perplexity is wrong without it, always.

    Gemma's tokenizer loses the setting when it is converted from GGUF.
    """
    bos = tokenizer.bos_token_id
    if bos is None:
        return []
    adds_it = list(tokenizer("a")["input_ids"])[:1] == [bos]
    return [bos] if adds_it or model_type.startswith("gemma") else []


def default_texts() -> dict[str, str]:
    """Prose and code that come with every Python; nothing is copied into this repository."""
    library = Path(sysconfig.get_path("stdlib"))
    longest = sorted(topics, key=lambda name: len(topics[name]), reverse=True)
    return {
        "prose": "\n\n".join(topics[name] for name in longest[:40]),
        "code": "\n\n".join((library / f"{name}.py").read_text() for name in CODE_MODULES),
    }


def read_texts(files: Sequence[Path]) -> dict[str, str]:
    """Texts by the name that stands in tables.

    Raises:
        InputError: A file cannot be read as UTF-8 text, or two have the same name.
    """
    texts: dict[str, str] = {}
    for file in files:
        try:
            with file.open(encoding="utf-8") as stream:
                text = stream.read(MAX_CHARACTERS)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--text {file} cannot be read as UTF-8 text: {error}") from None
        if file.stem in texts:
            raise InputError(f"--text {file}: another text is called {file.stem!r}; rename one")
        texts[file.stem] = text
    return texts


def make_windows(tokens: Tokens, name: str, text: str, context: int, num_windows: int) -> Text:
    """Cut equally long windows, evenly spaced over the text.

    Args:
        tokens: Tokenizer.
        name: Of the text.
        text: At least ``num_windows`` windows long.
        context: Tokens of a window, BOS included.
        num_windows: How many.

    Raises:
        InputError: The text is too short.
    """
    ids = tokens.encode(text)
    size = context - len(tokens.prefix)
    if len(ids) < size * num_windows:
        raise InputError(
            f"text {name!r} has {len(ids)} tokens, and {num_windows} windows of {size} need "
            f"{size * num_windows}; give a longer text, or lower --windows or --context"
        )
    last = len(ids) - size
    starts = [last * i // max(num_windows - 1, 1) for i in range(num_windows)]
    return Text(name=name, windows=[[*tokens.prefix, *ids[s : s + size]] for s in starts])


def make_needles(
    tokens: Tokens, lengths: Sequence[int], depths: Sequence[int], samples: int
) -> list[Needle]:
    """All needle prompts, by length, depth and sample.

    Raises:
        InputError: A length without room for text, or a depth that is no percentage.
    """
    needles = []
    for length in lengths:
        for depth in depths:
            for sample in range(samples):
                try:
                    prompt, number = make_needle(
                        lambda text: len(tokens.prompt(text)), length, depth, sample
                    )
                except ValueError as error:
                    raise InputError(f"--needle-lengths, --needle-depths: {error}") from None
                ids = tokens.prompt(prompt)
                needles.append(Needle(length=length, depth=depth, number=number, prompt=ids))
    return needles
