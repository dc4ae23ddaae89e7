"""Needle in a haystack: generated text with a number in it, asked for at the end."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

NEEDLE_DIGITS = 5
QUESTION = "\n\nQuestion: What is the secret number?\nAnswer: The secret number is"
# Every combination is a sentence; there is no digit in them, so the needle is the only number.
WHO = "A baker|The teacher|Her brother|An old sailor|The gardener|My neighbour|A young nurse"
DID = "found|painted|carried|repaired|described|sold|remembered|photographed"
WHAT = "a wooden boat|the green door|a basket of apples|the letter|two heavy chairs|an old map"
WHERE = "near the river|in the village|behind the school|at the market|on the hill|by the window"
WHEN = "before breakfast|in the rain|on a quiet evening|after the harvest|during the festival"


def make_needle(
    count: Callable[[str], int], length: int, depth: int, sample: int
) -> tuple[str, str]:
    """One prompt of at most ``length`` tokens; the same arguments always give the same prompt.

    Args:
        count: Number of tokens that a text takes as a prompt.
        length: Prompt length in tokens; the prompt is at most a sentence shorter.
        depth: Where the number is, in percent of the text; 0 is the beginning, 100 the end.
        sample: Tells prompts of the same length and depth apart, by their text and number.

    Returns:
        The prompt and the digits hidden in it.

    Raises:
        ValueError: A depth that is no percentage, or no room for any text.
    """
    if not 0 <= depth <= 100:
        raise ValueError(f"depth {depth} was given; depths are percentages from 0 to 100")
    rng = random.Random(f"{length}/{depth}/{sample}")
    number = "".join(rng.choices("123456789", k=NEEDLE_DIGITS))
    needle = f"Remember this: the secret number is {number}."
    room = length - count(needle) - count(QUESTION) - 2  # where pieces meet, tokens may split anew
    sentences: list[str] = []
    while (room := room - count(" " + (sentence := filler(rng)))) >= 0:
        sentences.append(sentence)
    sentences.insert(round(len(sentences) * depth / 100), needle)
    prompt = " ".join(sentences) + QUESTION
    if len(sentences) == 1 or count(prompt) > length:
        raise ValueError(f"context length {length} was given; it must have room for some sentences")
    return prompt, number


def filler(rng: random.Random) -> str:
    """One sentence about nothing."""
    who, did, what, where, when = (
        rng.choice(words.split("|")) for words in (WHO, DID, WHAT, WHERE, WHEN)
    )
    return f"{who} {did} {what} {where} {when}."


def is_found(answer: str, number: str) -> bool:
    """Whether the digits in the first line of ``answer`` are ``number`` and nothing else."""
    return re.sub(r"\D", "", answer.split("\n")[0]) == number
