"""Data sets and scores of the lm-eval tasks in this folder; all of it made or found locally."""

from __future__ import annotations

from functools import cache
from pydoc_data.topics import topics
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vllm_turboquant.evaluation.needle import is_found, make_needle


def needle_dataset(
    tokenizer: str, context_lengths: list[int], depths: list[int], samples: int, **_: Any
) -> dict[str, Dataset]:
    """Prompts of a given length in tokens, with a number hidden at a given depth.

    Args:
        tokenizer: Folder of the tokenizer, as in --model_args; measures the lengths.
        context_lengths: Prompt lengths in tokens; a prompt is at most a sentence shorter.
        depths: Where the number is, in percent of the text; 0 is the beginning, 100 the end.
        samples: Prompts for each length and depth, each with a text and a number of its own.
    """
    docs = [
        needle_doc(load_tokenizer(tokenizer), length, depth, sample)
        for length in context_lengths
        for depth in depths
        for sample in range(samples)
    ]
    return {"test": Dataset.from_list(docs)}


@cache
def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    """The tokenizer in ``folder``."""
    return AutoTokenizer.from_pretrained(folder)


def needle_doc(
    tokenizer: PreTrainedTokenizerBase, length: int, depth: int, sample: int
) -> dict[str, Any]:
    """One prompt of at most ``length`` tokens; the same arguments always give the same prompt."""
    prompt, number = make_needle(
        lambda text: len(tokenizer(text)["input_ids"]), length, depth, sample
    )
    return {"prompt": prompt, "number": number, "length": length, "depth": depth}


def score_needle(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 where the answer's digits are the number, under every heading the prompt counts for."""
    hit = float(is_found(results[0], doc["number"]))
    return {
        "exact_match": hit,
        f"exact_match_length_{doc['length']}": hit,
        f"exact_match_depth_{doc['depth']}": hit,
    }


def prose_dataset(documents: int, characters: int, **_: Any) -> dict[str, Dataset]:
    """The beginnings of the longest topics of the Python reference.

    Args:
        documents: How many topics.
        characters: Length of each; a token is about four characters.
    """
    longest = sorted(topics, key=lambda name: len(topics[name]), reverse=True)[:documents]
    docs = [{"topic": name, "text": topics[name][:characters]} for name in longest]
    return {"test": Dataset.from_list(docs)}


def score_prose(doc: dict[str, Any], results: list[float]) -> dict[str, tuple[float, int]]:
    """Log-likelihood with its units; lm-eval turns the sums into perplexities."""
    words, text_bytes = len(doc["text"].split()), len(doc["text"].encode())
    return {
        "word_perplexity": (results[0], words),
        "byte_perplexity": (results[0], text_bytes),
        "bits_per_byte": (results[0], text_bytes),
    }
