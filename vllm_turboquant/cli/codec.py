"""`vllm-turboquant codec`: the method without a model, as tables, as JSON and as a plot."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from vllm_turboquant import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from vllm_turboquant.distortion import Report
    from vllm_turboquant.estimate import Estimate

DEFAULT_HEAD_DIM = 128
DEFAULT_NUM_VECTORS = 8192
PIPED_WIDTH = 100  # columns where the output is not a terminal


def measure_codes(
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Your own vectors, .npy or .safetensors, shape [..., head_dim]; best those of one "
            "KV head, because the cache centers each alone.",
        ),
    ] = None,
    tensor: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which tensor, where a .safetensors file has several."),
    ] = None,
    head_dim: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help=f"Size of random vectors; {DEFAULT_HEAD_DIM} by default.",
        ),
    ] = None,
    num_vectors: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            show_default=False,
            help=f"How many, of a file drawn at random; at most {DEFAULT_NUM_VECTORS} by default.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Fixes everything random.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the numbers to FILE.")
    ] = None,
    plot_file: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Also draw them: FILE.png, .svg or .pdf."),
    ] = None,
) -> None:
    """Measure the codes alone, without a model.

    On random vectors, or on yours, beside the numbers of the paper and of theory.
    """
    _check_outputs(json_file, plot_file)
    if tensor is not None and data is None:
        raise typer.BadParameter("--tensor names a tensor of a file; give the file with --data")

    import torch

    from vllm_turboquant import distortion

    # More threads only wait for each other on matrices this small, and reorder sums.
    torch.set_num_threads(1)
    try:
        if data is None:
            number = DEFAULT_NUM_VECTORS if num_vectors is None else num_vectors
            dim = DEFAULT_HEAD_DIM if head_dim is None else head_dim
            vectors = distortion.random_vectors("Gaussian", number, dim, seed)
        else:
            vectors = _sample(load_vectors(data, tensor), head_dim, num_vectors, seed)
        name = None if data is None else f"{data.name}:{tensor}" if tensor else data.name
        report = distortion.measure_all(vectors, name, seed)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--data" if data else None) from None

    print_tables(report)
    if json_file is not None:
        content = {"version": __version__, **asdict(report)}
        json_file.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    if plot_file is not None:
        draw(report, None if data is None else vectors).savefig(plot_file)


def _check_outputs(json_file: Path | None, plot_file: Path | None) -> None:
    """Refuse, before anything is computed, what could not be written afterwards."""
    for option, file in (("--json", json_file), ("--plot", plot_file)):
        if file is not None and file.is_dir():
            raise typer.BadParameter(f"{file} is a folder; name a file in it", param_hint=option)
        if file is not None and not file.parent.is_dir():
            raise typer.BadParameter(
                f"the folder {file.parent} does not exist; create it first", param_hint=option
            )
    if plot_file is None:
        return
    if plot_file.suffix not in (".png", ".svg", ".pdf"):
        raise typer.BadParameter(
            f"{plot_file.name} is no .png, .svg or .pdf file; give it one of these endings",
            param_hint="--plot",
        )
    if find_spec("matplotlib") is None:
        raise typer.BadParameter(
            "a plot needs matplotlib; install it with: pip install 'vllm-turboquant[plot]'",
            param_hint="--plot",
        )


def load_vectors(path: Path, name: str | None) -> Tensor:
    """Read vectors from a file.

    Args:
        path: A .npy or .safetensors file.
        name: The tensor of a .safetensors file; may be None where there is only one.

    Returns:
        [num_vectors, head_dim] in the file's dtype, float16, bfloat16, float32 or float64.

    Raises:
        ValueError: There is no such file, or it is of another kind, damaged or holds something
            else; in one sentence.
    """
    import torch

    if not path.is_file():
        raise ValueError(f"{path} is not a file; give a .npy or .safetensors file")
    readers = {".npy": _read_npy, ".safetensors": _read_safetensors}
    if path.suffix not in readers:
        raise ValueError(f"{path.name} is neither a .npy nor a .safetensors file; convert it")
    vectors = readers[path.suffix](path, name)
    if vectors.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(
            f"{path.name} holds {str(vectors.dtype).removeprefix('torch.')}; "
            "accepted: float16, bfloat16, float32, float64"
        )
    if vectors.dim() < 2:
        raise ValueError(
            f"{path.name} holds shape {tuple(vectors.shape)}; accepted: [..., head_dim], "
            "two axes or more"
        )
    return vectors.flatten(0, -2)


def _read_npy(path: Path, name: str | None) -> Tensor:
    import numpy as np
    import torch

    if name is not None:
        raise ValueError(f"a .npy file has one array without a name; leave out --tensor {name}")
    with path.open("rb") as file:
        try:
            array = np.lib.format.read_array(file, allow_pickle=False)
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{path.name} is not a readable .npy file of numbers ({error}); save it with "
                "numpy.save"
            ) from None


def _read_safetensors(path: Path, name: str | None) -> Tensor:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys())
            if name is None and len(names) == 1:
                name = names[0]
            if name in names:
                return file.get_tensor(name)
    except SafetensorError as error:
        raise ValueError(f"{path.name} is not a readable .safetensors file ({error})") from None
    listed = ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")
    if name is None:
        raise ValueError(f"{path.name} has {len(names)} tensors; choose with --tensor: {listed}")
    raise ValueError(f"{path.name} has no tensor {name}; choose one of: {listed}")


def _sample(vectors: Tensor, head_dim: int | None, num_vectors: int | None, seed: int) -> Tensor:
    """Draw rows of [n, head_dim] in random order, as float64."""
    import torch

    from vllm_turboquant.distortion import check_shape, generator_for

    available, dim = vectors.shape
    if head_dim not in (None, dim):
        raise ValueError(f"its vectors have {dim} coordinates; leave out --head-dim {head_dim}")
    wanted = min(available, DEFAULT_NUM_VECTORS) if num_vectors is None else num_vectors
    if wanted > available:
        raise ValueError(f"it has {available} vectors; --num-vectors {wanted} is more than that")
    check_shape(wanted, dim)
    order = torch.randperm(available, generator=generator_for(seed, "order"))
    return vectors[order[:wanted]].double()


def print_tables(report: Report) -> None:
    """Print a report to standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from vllm_turboquant.distortion import LARGE_MEAN_SHARE, KeyModel

    def table(title: str, caption: str, *columns: str) -> Table:
        made = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
        for column in columns:
            made.add_column(
                escape(column), justify="left" if column in ("code", "data") else "right"
            )
        return made

    distortion = table(
        "Distortion by bits",
        "mse: TurboQuant_mse, |x^ - x|² / |x|². prod: TurboQuant_prod, d <q, x^ - x>² / (|q| |x|)² "
        "for random q. bound: 4^-bits. The paper rounds 0.0345 to 0.03, and 0.047 is pi/2 * 0.03.",
        *("bits", "mse", "expected", "paper", "prod", "expected", "paper", "bound"),
    )
    for mse, prod in zip(report.mse, report.prod, strict=True):
        row = [f"{mse.bits}"]
        for code, measured in ((mse, mse.squared_error), (prod, prod.product_error)):
            row += [_with_error(measured), f"{code.expected:.4g}", f"{code.published}"]
        distortion.add_row(*row, f"{mse.bound:.4g}")

    codes = table(
        "Codes of 2 and 3 bits, the sign of QJL included",
        "squared error: |x^ - x|² / |x|²; expected over all rotations, for turboquant3 up to 1 / d "
        "of it. bias: slope of <q, x^> on <q, x>, less 1, for random q. variance: of <q, x^> about "
        "that line, in units of (|q| |x|)² / d.",
        *("code", "bits", "squared error", "expected", "bias", "variance"),
    )
    for code in report.codes:
        error, *others = map(_with_error, (code.squared_error, code.bias, code.variance))
        codes.add_row(code.code, f"{code.bits}", error, f"{code.expected:.4g}", *others)

    model = KeyModel()
    sources = list(dict.fromkeys(row.data for row in report.distances))
    distances = table(
        "Correlation of pairwise distances, true and from 3-bit codes",
        f"key-like: random, but as in real keys |mean| is {model.mean_share} of the rms norm and "
        f"{model.num_outliers} outlier channels have {model.outlier_std} times the deviation of "
        "others. absmax: equidistant levels up to the largest coordinate of each vector.",
        *("code", *sources),
    )
    found = {(row.code, row.data): row.correlation for row in report.distances}
    for name in dict.fromkeys(row.code for row in report.distances):
        distances.add_row(name, *(_with_error(found[name, source]) for source in sources))

    centering = table(
        f"Centering where |mean| / rms norm is at least {LARGE_MEAN_SHARE}, turboquant3 key",
        "errors: mean |x^ - x|² over mean |x - mean|², the part that a softmax sees.",
        *("data", "|mean| / rms norm", "error as given", "error centered"),
    )
    for line in report.centering:
        if line.mean_share >= LARGE_MEAN_SHARE:
            numbers = (line.mean_share, line.error, line.centered_error)
            centering.add_row(escape(line.data), *(f"{number:.4g}" for number in numbers))

    console = Console()
    if not console.is_terminal:
        console = Console(width=PIPED_WIDTH)
    console.print(
        f"{report.num_vectors} vectors of head_dim {report.head_dim}, {escape(report.data)}, "
        f"seed {report.seed}; ± is one standard error\n",
        highlight=False,
    )
    for each in (distortion, codes, distances, centering):
        console.print(each, "")


def _with_error(estimate: Estimate) -> str:
    """Mean and standard error, both to the error's first digit."""
    digits = 4 if estimate.error == 0 else max(0, -math.floor(math.log10(estimate.error)))
    return f"{estimate.mean:.{digits}f} ± {estimate.error:.{digits}f}"


def draw(report: Report, vectors: Tensor | None) -> Figure:
    """Draw distortion by bits beside the distances that plain and rotated codes keep.

    Args:
        report: What to draw.
        vectors: [num_vectors, head_dim] whose distances to draw; None for key-like random ones.
    """
    from matplotlib.figure import Figure

    from vllm_turboquant import distortion

    figure = Figure(figsize=(13, 5.5), dpi=150, layout="constrained")
    left, right = figure.subplots(1, 2)
    bits = [row.bits for row in report.mse]
    prod = [row.product_error.mean for row in report.prod]
    mse = [row.squared_error.mean for row in report.mse]
    left.plot(bits, prod, "C1-o", label="TurboQuant_prod, product error times d")
    left.plot(bits, mse, "C0-o", label="TurboQuant_mse, squared error")
    for rows in (report.prod, report.mse):
        left.plot(bits, [row.published for row in rows], "kx", markersize=9, zorder=3)
    left.plot([], [], "kx", markersize=9, label="as printed in arXiv 2504.19874")
    left.plot(bits, [row.bound for row in report.mse], "--", c="gray", label="bound, $4^{-bits}$")
    points = {"QJL, orthogonal S": "C4D", "turboquant3 key": "C2*", "turboquant3 value": "C2P"}
    for row in report.codes:
        if marker := points.get(row.code):
            error = row.squared_error.mean
            left.plot(row.bits, error, marker, markersize=12, label=row.code, zorder=4)
    left.set(
        title=f"Distortion of codes: {report.data} vectors, d = {report.head_dim}",
        xlabel="bits per coordinate (scales not counted)",
        ylabel=r"$|\hat x - x|^2 / |x|^2$ or $d\,\langle q, \hat x - x\rangle^2 / (|q| |x|)^2$",
        xticks=bits,
        yscale="log",
        ylim=(6e-4, 3),
    )

    name = report.data
    if vectors is None:
        name = "key-like"
        vectors = distortion.random_vectors(name, report.num_vectors, report.head_dim, report.seed)
    colors = {
        "absmax, 7 levels": "C3",
        "rotated, Lloyd-Max": "C0",
        "turboquant3 key, centered": "C2",
    }
    for code in distortion.distance_codes(vectors):
        if color := colors.get(code.name):
            true, decoded = distortion.pair_distances(code, vectors, report.seed)
            x, y = ((distances / true.mean()).flatten().tolist() for distances in (true, decoded))
            r = distortion.correlation(true, decoded).mean
            right.scatter(x, y, s=3, c=color, alpha=0.4, label=f"{code.name}: {r:.3f}")
    right.axline((1, 1), slope=1, c="black", linewidth=1, label="exact: 1")
    right.set(
        title=f"Distances between vectors: {name}, d = {report.head_dim}",
        xlabel="true distance / mean true distance",
        ylabel="distance from 3-bit codes / mean true distance",
    )
    left.legend(loc="lower left")
    legend = right.legend(loc="lower right", title="3-bit code: correlation", markerscale=4)
    for handle in legend.legend_handles:
        handle.set_alpha(1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure
