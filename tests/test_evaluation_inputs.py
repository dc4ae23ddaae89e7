"""What the evaluation asks: windows, needles, the beginning of prompts, and refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vllm_turboquant.evaluation.needle import NEEDLE_DIGITS, QUESTION, is_found, make_needle
from vllm_turboquant.evaluation.plan import Plan, Text
from vllm_turboquant.evaluation.prepare import (
    InputError,
    Tokens,
    bos_prefix,
    clip,
    cpu_name,
    default_texts,
    make_needles,
    make_windows,
    read_texts,
)
from vllm_turboquant.evaluation.rows import parse_row


class Words:
    """A tokenizer with a token for each word, as far as the evaluation uses tokenizers."""

    def __init__(self, adds_bos: bool = False, bos: int | None = 1) -> None:
        self.adds_bos, self.bos_token_id = adds_bos, bos
        self.vocabulary: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [self.vocabulary.setdefault(w, len(self.vocabulary) + 10) for w in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens and self.adds_bos else ids}


WORDS = " ".join(f"w{i}" for i in range(1000))


def test_the_name_of_a_cpu(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text("processor\t: 0\nmodel name\t: Some CPU: 2\n\nmodel name\t: ?\n")
    (tmp_path / "arm").write_text("processor\t: 0\n")
    names = [cpu_name(tmp_path / name) for name in ("x86", "arm", "no Linux")]
    assert names == ["Some CPU: 2", "CPU", "CPU"]


def test_windows_are_equally_long_and_spread_over_the_text() -> None:
    tokens = Tokens(Words(), prefix=[])
    text = make_windows(tokens, "t", WORDS, context=100, num_windows=3)
    ids = tokens.encode(WORDS)
    assert text.windows == [ids[0:100], ids[450:550], ids[900:1000]]


def test_every_window_begins_with_bos_where_prompts_do() -> None:
    text = make_windows(Tokens(Words(), prefix=[1]), "t", WORDS, context=100, num_windows=2)
    assert all(window[0] == 1 and len(window) == 100 for window in text.windows)


def test_a_short_text_is_refused() -> None:
    with pytest.raises(
        InputError, match="text 't' has 1000 tokens, and 5 windows of 300 need 1500"
    ):
        make_windows(Tokens(Words(), prefix=[]), "t", WORDS, context=300, num_windows=5)


@pytest.mark.parametrize(
    ("tokenizer", "model_type", "prefix"),
    [
        (Words(adds_bos=True), "llama", [1]),
        (Words(adds_bos=False), "llama", []),
        (Words(adds_bos=False), "gemma3_text", [1]),
        (Words(adds_bos=False, bos=None), "gemma3_text", []),
    ],
    ids=["adds it", "does not", "gemma lost it", "has none"],
)
def test_bos(tokenizer: Any, model_type: str, prefix: list[int]) -> None:
    assert bos_prefix(tokenizer, model_type) == prefix


def test_default_texts_are_long_enough_for_the_defaults() -> None:
    texts = default_texts()
    assert list(texts) == ["prose", "code"]
    assert all(len(text) > 8 * 2048 * 5 for text in texts.values())  # a token is 4 characters
    assert "def " in texts["code"]


def test_files_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be read as UTF-8 text: .*No such file"):
        read_texts([tmp_path / "missing.txt"])
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="cannot be read as UTF-8 text"):
        read_texts([tmp_path / "binary.txt"])


def test_texts_need_different_names(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "a.md").write_text("y")
    with pytest.raises(InputError, match="another text is called 'a'; rename one"):
        read_texts([tmp_path / "a.txt", tmp_path / "a.md"])


def count(text: str) -> int:
    return len(text.split())


@pytest.mark.parametrize("depth", [0, 50, 100])
def test_a_needle_is_where_it_should_be(depth: int) -> None:
    prompt, number = make_needle(count, 400, depth, sample=0)
    assert 380 <= count(prompt) <= 400
    assert len(number) == NEEDLE_DIGITS and prompt.count(number) == 1
    assert prompt.endswith(QUESTION)
    text = prompt.removesuffix(QUESTION)
    assert text.index(number) / len(text) == pytest.approx(depth / 100, abs=0.1)


def test_needles_are_deterministic_and_samples_differ() -> None:
    assert make_needle(count, 200, 25, 0) == make_needle(count, 200, 25, 0)
    others = {make_needle(count, *arguments) for arguments in ((200, 25, 1), (200, 50, 0))}
    assert len({make_needle(count, 200, 25, 0), *others}) == 3


def test_needle_prompts_by_length_depth_and_sample() -> None:
    needles = make_needles(Tokens(Words(), prefix=[1]), [100, 200], [0, 100], samples=2)
    assert [(n.length, n.depth) for n in needles] == [
        *[(100, 0)] * 2,
        *[(100, 100)] * 2,
        *[(200, 0)] * 2,
        *[(200, 100)] * 2,
    ]
    assert all(n.prompt[0] == 1 and len(n.prompt) <= n.length for n in needles)


@pytest.mark.parametrize(
    ("length", "depth", "sentence"),
    [(20, 0, "must have room for some sentences"), (200, 101, "percentages from 0 to 100")],
)
def test_impossible_needles_are_refused(length: int, depth: int, sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make_needles(Tokens(Words(), prefix=[]), [length], [depth], samples=1)


@pytest.mark.parametrize(
    ("answer", "found"),
    {
        " 12345.": True,
        " 1 2 3 4 5\nQuestion: 9": True,
        " 12346.": False,
        " 123456": False,
        "": False,
    }.items(),
)
def test_all_digits_have_to_be_right(answer: str, found: bool) -> None:
    assert is_found(answer, "12345") is found


def test_lengths_past_the_model_are_cut_to_it() -> None:
    assert clip([512, 2048, 4096], longest=1024, reserve=16) == [512, 1007]
    assert clip([512, 2048], longest=None, reserve=16) == [512, 2048]


def test_requests_fit_the_length_that_the_engine_is_started_with() -> None:
    plan = Plan(
        model="m",
        device="CPU",
        cache_bytes=1,
        step_tokens=1,
        texts=[Text(name="t", windows=[[0] * 300, [0] * 300])],
        needles=[],
        questions=[[0] * 10],
    )
    assert plan.max_model_len == 512
    assert plan.model_copy(update={"model_max_len": 400}).max_model_len == 400
    assert plan.model_copy(update={"texts": []}).max_model_len == 256
    assert plan.num_tokens(parse_row("fp8", ["fp8"])) == 610
    assert plan.num_tokens(parse_row("auto", ["auto"])) == 1210  # scores its texts twice
