"""Plots of an evaluation as PNG files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vllm_turboquant.evaluation.report import RowSummary

DPI = 150
COLUMNS = 4
LOG_RANGE_WITHOUT_DATA = (1e-3, 1.0)


def plot_quality(path: Path, rows: Sequence[RowSummary]) -> None:
    """Draw, for each text, the divergence of every row and how it changes along the context.

    Args:
        path: PNG file.
        rows: The reference and all others; those that were not measured are named as such.
    """
    reference, others = rows[0], rows[1:]
    texts = list(reference.texts)
    height = 2.2 + 0.35 * max(len(others), 4)
    figure = Figure(figsize=(12, height * len(texts)), layout="constrained")
    panels = figure.subplots(len(texts), 2, squeeze=False)
    for name, (means, curves) in zip(texts, panels, strict=True):
        _plot_means(means, name, others)
        means.set(title=f"{name}: mean", xlabel=f"KL from {reference.name}, nats per token")
        for place, row in enumerate(others):
            if name in row.texts:
                curve = np.array(row.texts[name].kl_curve)
                position = (np.arange(len(curve)) + 0.5) / len(curve)
                color = f"C{place % 10}"
                curves.plot(position, curve, marker=".", color=color, label=row.name)
        curves.set(
            yscale="log"
            if any((line.get_ydata() > 0).any() for line in curves.lines)
            else "linear",
            xlabel="position in the window (0 = first token, 1 = last)",
            ylabel="KL, nats per token",
            title=f"{name}: along the context",
        )
        curves.grid(alpha=0.3)
        if curves.lines:
            curves.legend(fontsize="small")
    figure.savefig(path, dpi=DPI)


def _plot_means(axes: Axes, name: str, rows: Sequence[RowSummary]) -> None:
    """One point for each row, with its standard error and its change of perplexity.

    Points and not bars: on a logarithmic axis a bar's length would mean nothing.
    """
    axes.set(xscale="log", yticks=range(len(rows)), yticklabels=[_wrap(row.name) for row in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    values = [row.texts[name].kl for row in rows if name in row.texts]
    positive = [value.mean for value in values if value.mean > 0]
    low, high = (min(positive), max(positive)) if positive else LOG_RANGE_WITHOUT_DATA
    axes.set_xlim(low / 2, high * 2 * (2 * high / low) ** 0.35)  # room for the labels
    for place, row in enumerate(rows):
        if name not in row.texts:
            _write(axes, (low, place), row.status)
            continue
        text = row.texts[name]
        error = np.nan_to_num(text.kl.error)
        color = f"C{place % 10}"
        axes.errorbar(text.kl.mean, place, xerr=error, fmt="o", color=color, capsize=3)
        right_end = max(text.kl.mean + error, low)
        change = text.change.mean
        times = f"{change:+.1%}" if change < 10 else f"x {1 + change:,.0f}"
        _write(axes, (right_end, place), f"perplexity {times}")
    axes.grid(axis="x", alpha=0.3)


def _write(axes: Axes, point: tuple[float, float], text: str) -> None:
    """Write ``text`` to the right of ``point``."""
    axes.annotate(text, point, (8, 0), textcoords="offset points", va="center", fontsize="small")


def _wrap(name: str) -> str:
    """The name of a row with a line for its cache and one for each option."""
    return name.replace(":", ":\n").replace(",", ",\n")


def plot_needles(path: Path, rows: Sequence[RowSummary]) -> None:
    """Draw a heat map of found needles for each row: context length across, depth down.

    Args:
        path: PNG file.
        rows: The reference and all others; those that were not measured get an empty panel.
    """
    lengths = sorted({cell.length for cell in rows[0].recall})
    depths = sorted({cell.depth for cell in rows[0].recall})
    columns = min(len(rows), COLUMNS)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(3.2 * columns + 1, 3 * lines + 0.6), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes, row in zip(panels, rows, strict=False):
        share = np.full((len(depths), len(lengths)), np.nan)
        for cell in row.recall:
            y, x = depths.index(cell.depth), lengths.index(cell.length)
            share[y, x] = cell.found / cell.total
            color = "black" if 0.2 < share[y, x] < 0.8 else "white"
            axes.text(x, y, f"{cell.found}/{cell.total}", ha="center", va="center", color=color)
        if not row.recall:
            axes.text(0.5, 0.5, row.status, ha="center", va="center", transform=axes.transAxes)
        image = axes.imshow(share, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth} %" for depth in depths])
        axes.set(xlabel="context, tokens", ylabel="depth of the needle")
        axes.set_title(_wrap(row.name), fontsize="medium")
    for axes in panels[len(rows) :]:
        axes.set_axis_off()
    figure.colorbar(image, ax=panels.tolist(), label="needles found")
    figure.savefig(path, dpi=DPI)
