"""Paths, targets and options that the README names exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vllm_turboquant.layout import SlotLayout
from vllm_turboquant.options import Options

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CODE = re.findall(r"`([^`\n]+)`", README)


def test_paths() -> None:
    folders = "vllm_turboquant|csrc|scripts|configs|benchmarks|docker|tests|\\.ci"
    paths = [code for code in CODE if re.fullmatch(rf"({folders})/[\w./-]*", code)]
    assert len(paths) > 15
    missing = [path for path in paths if not (ROOT / path).exists()]
    assert not missing


def test_modules_in_the_code_map_are_all_there_are() -> None:
    named = {code for code in CODE if re.fullmatch(r"vllm_turboquant/\w+\.py", code)}
    present = {f"vllm_turboquant/{path.name}" for path in (ROOT / "vllm_turboquant").glob("*.py")}
    assert named == present - {"vllm_turboquant/__init__.py"}


def test_make_targets() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE))
    assert named >= {"serve", "test", "lint", "lm-eval"}
    assert named <= targets


def test_options() -> None:
    table = README.split("\n## Options\n")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)`", table, re.MULTILINE)) == set(Options.model_fields)


@pytest.mark.parametrize(("head_dim", "slot_bytes"), [(64, 44), (128, 84), (256, 168)])
def test_slot_bytes(head_dim: int, slot_bytes: int) -> None:
    assert SlotLayout(head_dim).slot_bytes == slot_bytes
    assert re.search(rf"{slot_bytes}( bytes)? at (head_dim )?{head_dim}\b", README)
