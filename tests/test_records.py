"""The numbers in README.md and benchmarks/README.md are those of the records that they name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
README = (ROOT / "README.md").read_text()
RECORDS = (BENCHMARKS / "README.md").read_text()
#: Evaluations, in the order of the columns of README.md.
MODELS = ("qwen_h100", "smollm2_h100", "gemma_cpu")
CACHES = {
    "fp8": "`fp8`, scale 1",
    "turboquant_4bit_nc": "vLLM's `turboquant_4bit_nc`",
    "turboquant_3bit_nc": "vLLM's `turboquant_3bit_nc`",
    "turboquant3": "`turboquant3`",
    "turboquant3:recent_tokens=0": "the same, `recent_tokens` 0",
    "turboquant3:measure_keys=false,recent_tokens=0": "and `measure_keys` off",
}


def read(name: str) -> dict[str, Any]:
    """A record by its name without .json."""
    return json.loads((BENCHMARKS / f"{name}.json").read_text())


def evaluation(name: str) -> dict[str, Any]:
    """Rows of an evaluation by the name of the cache."""
    return {row["name"]: row for row in read(f"eval_{name}")["rows"]}


def change(text: dict[str, Any]) -> str:
    """Change of perplexity, large ones as multiples."""
    value = text["change"]["mean"]
    times = f"{1 + value:,.1f}" if value < 100 else f"{1 + value:,.0f}"
    return f"{100 * value:+.1f} %" if value < 3 else f"x {times}"


def losses(row: dict[str, Any] | None) -> str:
    """Cell of README.md for one cache and model."""
    if row is None:
        return ""
    texts = [row["texts"][name] for name in ("prose", "code")]
    kl = " / ".join(f"{text['kl']['mean']:.3f}" for text in texts)
    return f"{' / '.join(map(change, texts))}, {kl}"


def tokens(count: int) -> str:
    """A context as tables of kernels have it."""
    return f"{count // 1024}K" if count >= 1024 else str(count)


def cells(line: str) -> list[str]:
    """Cells of a row of a table."""
    return [cell.strip() for cell in line.strip("|\n").split("|")]


@pytest.mark.parametrize("cache", CACHES)
def test_accuracy(cache: str) -> None:
    rows = [evaluation(model).get(cache) for model in MODELS]
    assert rows[0] is not None
    table = README.split("## What it costs")[1].split("**Needles**")[0]
    (line,) = (line for line in table.splitlines() if line.startswith(f"| {CACHES[cache]} |"))
    assert cells(line)[2:] == [losses(row) for row in rows]


@pytest.mark.parametrize("model", MODELS)
def test_accuracy_by_model(model: str) -> None:
    """Rows of benchmarks/README.md end in perplexity, KL and answers."""
    found = [cells(line)[-3:] for line in RECORDS.splitlines() if line.startswith("|")]
    for name, row in evaluation(model).items():
        if name != "auto":
            perplexity, kl = losses(row).split(", ")
            agree = row["answers_agree"]  # with an error in newer records
            agree = agree["mean"] if isinstance(agree, dict) else agree
            assert [perplexity, kl, f"{100 * agree:.0f} %"] in found, name


def test_needles() -> None:
    """Of each length, as README.md has them."""
    names = {
        "auto": "`auto`",
        "turboquant3:exact_prefill=true": "`turboquant3`",
        "turboquant3:exact_prefill=true,recent_tokens=0": "`turboquant3`, `recent_tokens` 0",
    }
    rows = {row["name"]: row for row in read("needle_qwen_h100")["rows"]}
    for name, title in names.items():
        found: dict[int, list[int]] = {}
        for cell in rows[name]["recall"]:
            total = found.setdefault(cell["length"], [0, 0])
            total[0] += cell["found"]
            total[1] += cell["total"]
        shares = [f"{hits}/{total}" for _, (hits, total) in sorted(found.items())]
        assert f"| {title} | {' | '.join(shares)} |" in README


def test_needles_one_token_a_step() -> None:
    (row,) = (r for r in read("needle_qwen_h200")["rows"] if r["name"] == "turboquant3")
    found, total = (sum(cell[key] for cell in row["recall"]) for key in ("found", "total"))
    assert row["in_lockstep"] and {cell["length"] for cell in row["recall"]} == {16384}
    assert f"{found} of {total} were found in 16K tokens" in README


def kernel_rows(gpu: str = "h100") -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of the record of kernels on a GPU, with their names in tables."""
    for row in read(f"decode_{gpu}")["rows"]:
        yield row, f"{row['batch']} x {tokens(row['context'])}"


def test_cuda_kernels_in_the_readme() -> None:
    bars = [(row, name) for row, name in kernel_rows() if "bars" in row["sets"]]
    assert len(bars) == 8
    for row, name in bars:
        ours = row["turboquant3_us"]
        others = [row[f"{k}_us"] / ours for k in ("fa3_bf16", "fa3_fp8", "vllm_turboquant_3bit")]
        cells = [f"{ours:.1f}", *(f"{x:.1f}x" for x in others[:2]), f"{others[2]:.0f}x"]
        assert f"| {name} | {' | '.join(cells)} |" in README


def test_cuda_kernels_are_as_fast_as_they_are_meant_to_be() -> None:
    """As fractions of the time of FlashAttention-3 over bfloat16; never slower than over fp8."""
    most = dict.fromkeys(("8 x 32K", "32 x 32K", "32 x 8K", "1 x 128K", "64 x 8K"), 0.25)
    most |= {"8 x 8K": 0.35, "1 x 32K": 0.35, "64 x 2K": 0.4}
    for row, name in kernel_rows():
        assert row["turboquant3_us"] <= row["fa3_fp8_us"], name
        if "bars" in row["sets"]:
            assert row["turboquant3_us"] <= most[name] * row["fa3_bf16_us"], name


def test_cuda_kernels_in_the_records() -> None:
    rows = [cells(line) for line in RECORDS.splitlines() if line.startswith("|")]
    for row, name in kernel_rows():
        ours = row["turboquant3_us"]
        ratios = [f"{row[f'{other}_us'] / ours:.2f}x" for other in ("fa3_bf16", "fa3_fp8")]
        codes_only = f"{row['codes_only_us']:.1f}" if "codes_only_us" in row else ""
        if row["sets"] != ["plot"]:
            want = [name, f"{ours:.1f}", codes_only, *ratios]
            assert any(line[-5:] == want for line in rows), (name, row["heads"])


def test_cuda_kernels_in_the_records_of_the_h200() -> None:
    lines = [cells(line) for line in RECORDS.splitlines() if line.startswith("|")]
    for row, name in kernel_rows("h200"):
        if {"bars", "shapes"} & set(row["sets"]):
            ours = row["turboquant3_us"]
            heads = "{heads}/{kv_heads}, d {head_dim}".format(**row)
            want = [heads, name, f"{ours:.1f}", f"{row['codes_only_us']:.1f}"]
            want += [f"{row[f'{other}_us'] / ours:.2f}x" for other in ("fa3_bf16", "fa3_fp8")]
            triton = row.get("vllm_turboquant_3bit_us")
            assert [*want, f"{triton / ours:.0f}x" if triton else ""] in lines


def speed_and_time(row: dict[str, Any]) -> tuple[float, float]:
    """Tokens/s while all requests run, and milliseconds between the tokens of one."""
    return 1000 * row["clients"] / row["itl_ms"], row["itl_ms"]


def numbers(cell: str) -> list[float]:
    """Those of a cell, separated by slashes."""
    return [float(part.replace(",", "")) for part in cell.split("/")]


def test_decoding_in_engines() -> None:
    rows = read("engine_decode_llama_h100")["rows"]
    lines = [cells(line) for line in README.splitlines() if " + 512 x " in line]
    names = list(dict.fromkeys(row["name"] for row in rows))
    for line, name in zip(lines, names, strict=True):
        same = [row for row in rows if row["name"] == name]
        assert [row["kv_cache_dtype"] for row in same] == ["auto", "fp8", "turboquant3"]
        speeds, times = zip(*map(speed_and_time, same), strict=True)
        assert numbers(line[1]) == pytest.approx(speeds, rel=5e-4, abs=0.51)
        assert numbers(line[2]) == pytest.approx(times, abs=0.0051)


@pytest.mark.parametrize("name", ["decode_h100", "decode_llama_h100", "decode_tp_h200"])
def test_decoding_in_engines_in_the_records(name: str) -> None:
    lines = [cells(line) for line in RECORDS.splitlines() if " + 512 | `" in line]
    for row in read(f"engine_{name}")["rows"]:
        start = [
            f"{row['input_tokens']:,} + {row['output_tokens']}",
            f"`{row['kv_cache_dtype']}`",
            str(row["clients"]),
        ]
        speed, _ = speed_and_time(row)
        found = [numbers(line[3])[0] for line in lines if line[:3] == start]
        assert any(value == pytest.approx(speed, rel=5e-4, abs=0.51) for value in found), start


def test_tensor_parallel_in_the_readme() -> None:
    rows = {
        (row["name"], row["kv_cache_dtype"]): row for row in read("engine_decode_tp_h200")["rows"]
    }
    for name in ("4k-x1", "16k-fit"):
        ours, auto = (speed_and_time(rows[name, dtype])[0] for dtype in ("turboquant3", "auto"))
        assert f"{ours / auto:.2f}x" in README


def test_times_to_the_first_token() -> None:
    """Medians in both files; quartiles and the engine's own prefill in benchmarks/."""
    in_readme, in_records = (
        [cells(line) for line in text.splitlines() if line.startswith("| ")]
        for text in (README, RECORDS)
    )
    rows = read("engine_ttft_h100")["rows"]
    for tokens in (2048, 8192, 16384):
        same = {row["kv_cache_dtype"]: row for row in rows if row["input_tokens"] == tokens}
        names = ("auto", "fp8", "turboquant3", "int4_per_token_head")
        medians = [f"{same[name]['ttft_ms']:.1f}" for name in names]
        assert [f"{tokens:,}", *medians] in in_readme
        figures = ("ttft_ms", "ttft_p25_ms", "ttft_p75_ms", "prefill_ms")
        quartiles = [
            "{:.1f} ({:.1f} to {:.1f}), {:.1f}".format(*(row[name] for name in figures))
            for row in same.values()
        ]
        assert [f"{tokens:,}", *quartiles] in in_records


def test_prefill_is_as_fast_as_without_a_code() -> None:
    rows = read("engine_ttft_h100")["rows"]
    times = {(row["kv_cache_dtype"], row["input_tokens"]): row["ttft_ms"] for row in rows}
    for tokens in (2048, 8192, 16384):
        assert times["turboquant3", tokens] <= 1.05 * times["auto", tokens]


def test_times_to_the_first_token_by_turns() -> None:
    rows = read("engine_ttft_h200")["rows"]
    for tokens in (2048, 8192):
        same = [row for row in rows if row["input_tokens"] == tokens]
        (line,) = (
            cells(x)
            for x in RECORDS.split("Measured by turns")[1].splitlines()
            if x.startswith(f"| {tokens:,} | ")
        )
        for row, cell in zip(same, line[1:], strict=True):
            turns = [float(x) for x in cell.split("(")[1].strip(")").split(",")]
            assert float(cell.split(" ")[0]) == pytest.approx(row["ttft_ms"], abs=0.051)
            assert turns == pytest.approx(row["ttft_ms_by_turn"], abs=0.051)


def test_lm_eval() -> None:
    rows = read("lm_eval_cpu")["rows"]
    auto, ours, codes = (
        rows[name] for name in ("auto", "turboquant3", "turboquant3, exact_prefill false")
    )
    needles = [row["turboquant_needle"]["exact_match"] for row in (auto, ours, codes)]
    words = [row["turboquant_perplexity"]["word_perplexity"] for row in (auto, ours, codes)]
    text = " ".join(README.split("`make lm-eval` runs")[1].split("## Code map")[0].split())
    assert f"needles {needles[0]:.2f} with `auto` and {needles[1]:.2f} with `turboquant3`" in text
    assert f"word perplexity {words[0]:.1f} and {words[1]:.1f};" in text
    assert f"{needles[2]:.2f} and {words[2]:.1f}." in text


def test_at_a_glance() -> None:
    """The few numbers at the top are those of the tables below."""
    glance = README.split("At a glance")[1].split("From a fresh clone")[0]
    rows = evaluation("qwen_h100")
    for name in ("fp8", "turboquant3"):
        text = rows[name]["texts"]["prose"]
        assert f"{change(text)}, {text['kl']['mean']:.3f}" in glance
    row = next(row for row, name in kernel_rows() if name == "8 x 32K" and row["heads"] == 32)
    bf16 = row["fa3_bf16_us"]
    times = [f"{bf16 / row[key]:.1f}x" for key in ("fa3_fp8_us", "turboquant3_us")]
    assert f"| 1x | {' | '.join(times)} |" in glance
    capacity = rows["turboquant3"]["capacity_ratio"]
    assert "| 1x | 2x | 5.9x |" in glance and 5.8 < capacity / 1.04 < 5.95


@pytest.mark.parametrize(("name", "instructions"), [("", "AVX-512"), ("_avx2", "AVX2")])
def test_cpu_kernels(name: str, instructions: str) -> None:
    rows = read(f"attention_cpu{name}")["rows"]
    at_8k = [row for row in rows if (row["batch"], row["context"]) == (1, 8192)]
    for other in ("sdpa best", "vllm auto"):
        ratios = [row[f"{other} / turboquant3"] for row in at_8k]
        text = f"{min(ratios):.1f}x to {max(ratios):.1f}x"
        assert text in README, (instructions, other, text)
