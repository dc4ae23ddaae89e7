"""What scripts/dummy_model.py writes is a model of the named shape, for Transformers too."""

from __future__ import annotations

import sys
from pathlib import Path

import dummy_model
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)

PUBLISHED_PARAMETERS = 8_030_261_248


def save_tokenizer(folder: Path, num_words: int) -> Path:
    """A tokenizer of ``num_words`` words, with an end-of-text token."""
    words = {"<end>": 0, **{f"w{i}": i for i in range(1, num_words)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["dummy_model.py", *map(str, arguments)])
    dummy_model.main()


def num_parameters(config: PretrainedConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_model_has_the_published_number_of_parameters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = save_tokenizer(tmp_path / "words", 10)
    run(monkeypatch, tmp_path / "model", "--tokenizer", tokenizer)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert num_parameters(config) == PUBLISHED_PARAMETERS


def test_config_and_tokenizer_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = save_tokenizer(tmp_path / "words", 10)
    run(monkeypatch, tmp_path / "new" / "model", "--tokenizer", tokenizer)
    config = AutoConfig.from_pretrained(tmp_path / "new" / "model")
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (32, 8, 128)
    assert (config.max_position_embeddings, config.vocab_size) == (131072, 128256)
    assert config.rope_parameters["rope_theta"] == 500000
    assert config.dtype == torch.bfloat16
    assert config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "new" / "model")("w3")["input_ids"] == [3]


def test_the_vocabulary_has_room_for_a_larger_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = save_tokenizer(tmp_path / "words", 150_001)
    run(monkeypatch, tmp_path / "model", "--tokenizer", tokenizer, "--layers", 3)
    config = AutoConfig.from_pretrained(tmp_path / "model")
    assert config.vocab_size == 150_016
    assert config.num_hidden_layers == 3


def test_weights_are_written_on_demand_and_do_not_vary(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = save_tokenizer(tmp_path / "words", 10)
    small = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 2, "vocab_size": 256}
    monkeypatch.setattr(dummy_model, "LLAMA_8B", dummy_model.LLAMA_8B | small)
    states = []
    for name in ("one", "two"):
        run(monkeypatch, tmp_path / name, "--tokenizer", tokenizer, "--layers", 2, "--weights")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        states.append(model.state_dict())
    one, two = states
    assert one["model.layers.1.self_attn.k_proj.weight"].std() > 0
    assert all(weight.dtype == torch.bfloat16 for weight in one.values())
    assert all(torch.equal(weight, two[name]) for name, weight in one.items())


def test_folders_that_exist_or_have_no_tokenizer_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match="exists; name another folder"):
        run(monkeypatch, tmp_path, "--tokenizer", tmp_path)
    with pytest.raises(SystemExit, match=r"has no tokenizer_config.json; name the folder of"):
        run(monkeypatch, tmp_path / "model", "--tokenizer", tmp_path)
