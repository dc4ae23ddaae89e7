#!/usr/bin/env python3
"""Compare three scales for keys and for values by what a model loses with each.

    study_scales.py MODEL --json scales.json

Codes do not change with the scale that multiplies them. For a vector x = |x| / sqrt(d) u and its
reconstruction u^ from the codes, each scale is |x| / sqrt(d) times

    unbiased         <u, u> / <u, u^>      so that <x, x^> = |x|^2; what turboquant3 stores
    norm             |u| / |u^|            so that |x^| = |x|
    least_squares    <u, u^> / <u^, u^>    so that |x - x^| is smallest

Keys alone or values alone are replaced by their reconstructions on their way into a bfloat16 cache,
so that the two decisions do not mix; keys are centered by the mean of the text at hand.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vllm_turboquant import reference
from vllm_turboquant.frame import plain_frame
from vllm_turboquant.layout import SlotLayout

SCALES = ("unbiased", "norm", "least_squares")
NUM_SINK_TOKENS = 4  # unlike all others, and no part of a center


def rescale(x: Tensor, unbiased: Tensor, layout: SlotLayout, scale: str) -> Tensor:
    """Multiply each group of a reconstruction with the unbiased scale by another scale's share.

    With c the cosine between x and its reconstruction, the unbiased one has length |x| / c.

    Args:
        x: [..., head_dim].
        unbiased: As ``x``.
        layout: Its groups.
        scale: One of ``SCALES``.
    """
    shape = (*x.shape[:-1], layout.num_groups, layout.group)
    groups, decoded = x.reshape(shape), unbiased.reshape(shape)
    cosine = torch.cosine_similarity(groups, decoded, dim=-1)[..., None]
    factor = {"unbiased": torch.ones_like(cosine), "norm": cosine, "least_squares": cosine**2}
    return (decoded * factor[scale]).reshape(x.shape)


def code_keys(key: Tensor, scale: str) -> Tensor:
    """Keys [num_tokens, num_kv_heads, head_dim] as turboquant3 codes with ``scale`` give them."""
    layout = SlotLayout(key.shape[-1])
    exact = key.float().cpu()
    center = exact[NUM_SINK_TOKENS:].mean(dim=0) if len(key) > 64 else torch.zeros(key.shape[1:])
    key_frame = plain_frame(center)
    code = reference.encode_keys(exact, key_frame, layout)
    decoded = reference.decode_keys(code, key_frame, layout, dtype=torch.float32)
    return (center + rescale(exact - center, decoded - center, layout, scale)).to(key)


def code_values(value: Tensor, scale: str) -> Tensor:
    """Values, likewise."""
    layout = SlotLayout(value.shape[-1])
    exact = value.float().cpu()
    decoded = reference.decode_values(
        reference.encode_values(exact, layout), layout, dtype=torch.float32
    )
    return rescale(exact, decoded, layout, scale).to(value)


def _quantizer(part: str, scale: str) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """What ``Recorder.fake_quantize`` looks up in this module."""

    def quantize(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if part == "keys":
            return code_keys(key, scale), value
        return key, code_values(value, scale)

    return quantize


for _part in ("keys", "values"):
    for _scale in SCALES:
        globals()[f"{_part}_{_scale}"] = _quantizer(_part, _scale)


def main() -> None:
    """Run one engine per row, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--windows", type=int, help="windows of each text")
    parser.add_argument("--context", type=int, help="tokens of a window")
    parser.add_argument("--cache-gib", type=float, help="memory of each engine's cache")
    parser.add_argument("--jobs", type=int, default=1, help="engines at a time; default 1")
    args = parser.parse_args()
    # The rows' processes import this file by its name.
    paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

    from vllm.platforms import current_platform

    from vllm_turboquant.evaluation.plan import Result
    from vllm_turboquant.evaluation.prepare import make_plan
    from vllm_turboquant.evaluation.report import summarize
    from vllm_turboquant.evaluation.rows import REFERENCE, Row
    from vllm_turboquant.evaluation.runner import Evaluation
    from vllm_turboquant.evaluation.settings import Settings

    on_gpu = not current_platform.is_cpu()
    device = current_platform.get_device_name() if on_gpu else "CPU"
    settings = Settings(
        args.model,
        context=args.context,
        windows=args.windows,
        needle_lengths=(),
        answer_tokens=0,
        cache_gib=args.cache_gib,
    )
    plan = make_plan(settings, device, on_gpu)
    rows = [Row(name=REFERENCE)] + [
        Row(name=f"{part}_{scale}", fake_quantize=f"study_scales:{part}_{scale}")
        for part in ("keys", "values")
        for scale in SCALES
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        evaluation = Evaluation(plan, Path(folder))

        def run(row: Row) -> Result:
            return evaluation.run(row, lambda phase: None, lambda tokens: None)

        results = [run(rows[0]), *pool.map(run, rows[1:])]
    for result in results:
        if result.status != "complete":
            parser.error(f"{result.row.name}: {result.reason}")
    record: dict[str, object] = {"model": args.model, "device": device}
    table = Table("codes", *(f"{text.name}, KL" for text in plan.texts))
    for summary, result in zip(summarize(plan, results), results, strict=True):
        kl = {name: (text.kl.mean, text.kl.error) for name, text in summary.texts.items()}
        record[result.row.name] = kl
        table.add_row(
            result.row.name, *(f"{mean:.4f} ± {error:.4f}" for mean, error in kl.values())
        )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
