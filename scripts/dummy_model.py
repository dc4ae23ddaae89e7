#!/usr/bin/env python3
"""Write a model of Llama-3.1-8B's shape, for benchmarks: `vllm serve FOLDER --load-format dummy`.

    dummy_model.py models/llama-3.1-8b-dummy --tokenizer models/qwen2.5-coder-1.5b-instruct

vLLM makes the weights up, so what the model says means nothing, but it takes the time and memory of
one of that shape. The tokenizer is that of another model; where it has more tokens than the shape,
the vocabulary is as large as it needs, which adds to the embeddings and the last layer alone.
--weights writes random weights too, for engines that shall agree on them: what vLLM makes up
depends on how many GPUs share the model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

# NOTE: read by huggingface_hub when it is imported; nothing here may ask a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

#: What the published Llama-3.1-8B consists of, but for its scaling of rotary embeddings, which
#: changes numbers and not the work.
LLAMA_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
VOCAB_MULTIPLE = 256


def write_model(folder: Path, tokenizer: Path, layers: int | None = None) -> None:
    """Write the configuration and the tokenizer.

    Args:
        folder: What to make.
        tokenizer: Folder of a model whose tokenizer is copied.
        layers: Instead of the model's number of layers.
    """
    from transformers import AutoTokenizer

    copied = AutoTokenizer.from_pretrained(tokenizer)
    config = dict(LLAMA_8B)
    if layers is not None:
        config["num_hidden_layers"] = layers
    needed = -(-len(copied) // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    config["vocab_size"] = max(config["vocab_size"], needed)
    config |= {"bos_token_id": copied.bos_token_id, "eos_token_id": copied.eos_token_id}
    folder.mkdir(parents=True)
    copied.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def write_weights(folder: Path) -> None:
    """Write random weights, the same on all devices of one kind, for a model of `write_model`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
        )
    model.save_pretrained(folder)


def main() -> None:
    """Write the folder named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="what to write; must not exist")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="folder of a model to copy a tokenizer from"
    )
    parser.add_argument("--layers", type=int, help="how many, if not those of the model")
    parser.add_argument("--weights", action="store_true", help="write random weights as well")
    options = parser.parse_args()
    if options.folder.exists():
        sys.exit(f"{options.folder} exists; name another folder")
    if not (options.tokenizer / "tokenizer_config.json").exists():
        sys.exit(f"{options.tokenizer} has no tokenizer_config.json; name the folder of a model")
    write_model(options.folder, options.tokenizer, options.layers)
    if options.weights:
        write_weights(options.folder)
    hint = "" if options.weights else "; serve it with --load-format dummy"
    print(f"[model] wrote {options.folder}{hint}")


if __name__ == "__main__":
    main()
