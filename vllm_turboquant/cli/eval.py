"""``vllm-turboquant eval MODEL``: what a model loses with each KV cache, measured through vLLM."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from vllm_turboquant.evaluation.rows import DEFAULT_ROWS
from vllm_turboquant.evaluation.settings import ANSWER_TOKENS, CPU, GPU, NEEDLE_DEPTHS, Settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.progress import TaskID
    from rich.table import Table

    from vllm_turboquant.evaluation.plan import Plan, Result
    from vllm_turboquant.evaluation.rows import Row
    from vllm_turboquant.evaluation.runner import Evaluation


def _by_device(name: str) -> str:
    """The default of an option, for its help."""
    values = []
    for defaults in (CPU, GPU):
        value = getattr(defaults, name)
        values.append(",".join(map(str, value)) if isinstance(value, tuple) else value)
    return f"Default: {values[0]} on CPUs, {values[1]} on GPUs."


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder of the model, or its name on the hub.")],
    row: Annotated[
        list[str] | None,
        typer.Option(
            "--row",
            "-r",
            help="A cache to measure: NAME or NAME:option=value,... with the options of "
            f"--additional-config turboquant; repeat it. Default: {', '.join(DEFAULT_ROWS)}. "
            "auto, which the others are compared with, always runs.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results. Default: eval-NAME-OF-THE-MODEL.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text file to score; repeat it. Default: Python's documentation (prose) and its "
            "standard library (code), as installed."
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=16, help=f"Tokens of a window of text. {_by_device('context')}"),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Windows of each text; 0 for none, and engines that run with CUDA graphs then. "
            f"{_by_device('windows')}",
        ),
    ] = None,
    needle_lengths: Annotated[
        str | None,
        typer.Option(
            help="Context lengths for the needle, in tokens; empty for none. "
            f"{_by_device('needle_lengths')}"
        ),
    ] = None,
    needle_depths: Annotated[
        str, typer.Option(help="Depths of the needle, in percent; 0 is the beginning.")
    ] = ",".join(map(str, NEEDLE_DEPTHS)),
    needle_samples: Annotated[
        int | None,
        typer.Option(
            min=1,
            help=f"Prompts of each length and depth. {_by_device('needle_samples')}",
        ),
    ] = None,
    answer_tokens: Annotated[
        int, typer.Option(min=0, help="Tokens of each greedy answer; 0 for no answers.")
    ] = ANSWER_TOKENS,
    cache_gib: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            help=f"Memory of the KV cache of every row, in GiB. {_by_device('cache_gib')}",
        ),
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option(min=1, help="GPUs for the model.")] = 1,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="As vLLM's option.")
    ] = False,
    one_token_steps: Annotated[
        bool,
        typer.Option(
            "--one-token-steps",
            help="Compute every prompt token by token, as decoding does, with every cache (slow). "
            "Otherwise only where prefill would not read what decoding reads.",
        ),
    ] = False,
    again: Annotated[
        bool,
        typer.Option(
            "--again",
            help="Measure also the rows that OUT has already, and discard its results of other "
            "settings.",
        ),
    ] = False,
) -> None:
    """Measure what MODEL loses with each KV cache, beside vLLM's auto.

    Every token is read back from the cache: scores are those of decoding, where a cache costs most.
    Prints a table; writes report.json, quality.png, needle.png and the logs of the engines to OUT.
    Rows that are complete in OUT are kept and shown too; where they were made with other settings,
    nothing runs.
    """
    from rich.console import Console

    from vllm_turboquant.evaluation.prepare import InputError
    from vllm_turboquant.evaluation.rows import RowError
    from vllm_turboquant.evaluation.runner import Evaluation

    console = Console()
    settings = Settings(
        model=model,
        texts=text or (),
        context=context,
        windows=windows,
        needle_lengths=None if needle_lengths is None else _integers(needle_lengths),
        needle_depths=_integers(needle_depths),
        needle_samples=needle_samples,
        answer_tokens=answer_tokens,
        cache_gib=cache_gib,
        tensor_parallel_size=tensor_parallel_size,
        trust_remote_code=trust_remote_code,
        one_token_steps=one_token_steps,
    )
    local = Path(model)
    folder = out or Path(f"eval-{(local.resolve() if local.is_dir() else local).name}")
    try:
        with console.status("loading vLLM and the tokenizer"):
            rows, plan = _prepare(settings, row or DEFAULT_ROWS)
        folder.mkdir(parents=True, exist_ok=True)
    except (InputError, RowError) as error:
        raise typer.BadParameter(str(error)) from None
    except OSError as error:
        raise typer.BadParameter(f"--out {folder} cannot be a folder: {error}") from None
    _check_results(plan, folder, again)
    try:
        results = _run(Evaluation(plan, folder), rows, again, console)
    except KeyboardInterrupt:
        command = "the same command without --again" if again else "the same command"
        console.print(f"Stopped. Complete rows are kept: {command} goes on from {folder}.")
        raise typer.Exit(130) from None
    _show(plan, results, folder, console)
    # Of the rows by default, some are not available on every machine.
    missed = {"failed", "not available"} if row else {"failed"}
    if any(result.status in missed for result in results):
        raise typer.Exit(1)


def _integers(text: str) -> list[int]:
    """Numbers separated by commas."""
    try:
        return [int(number) for number in text.split(",") if number.strip()]
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list like 512,2048") from None


def _prepare(settings: Settings, specs: Sequence[str]) -> tuple[list[Row], Plan]:
    """Rows and plan, checked.

    Raises:
        InputError: Something cannot be used.
        RowError: A row does not exist.
    """
    from vllm_turboquant.evaluation.prepare import InputError, cpu_name, make_plan
    from vllm_turboquant.evaluation.rows import parse_rows

    try:
        from vllm.config.cache import CacheDType
        from vllm.platforms import current_platform
    except ImportError as error:
        raise InputError(f"vLLM cannot be imported ({error}); install it first") from None
    rows = parse_rows(specs, get_args(CacheDType))
    on_gpu = not current_platform.is_cpu()
    device = current_platform.get_device_name() if on_gpu else cpu_name()
    return rows, make_plan(settings, device, on_gpu)


def _check_results(plan: Plan, folder: Path, again: bool) -> None:
    """Refuse a folder with results that are not of ``plan``; with ``again``, discard these."""
    from vllm_turboquant.evaluation.runner import complete_results

    misfits = [file for file, result in complete_results(plan, folder) if not result]
    if misfits and not again:
        raise typer.BadParameter(
            f"{folder} holds results of another model, of other settings or versions "
            f"({', '.join(file.name for file in misfits)}); give another folder with --out, or "
            "discard them with --again"
        )
    for file in misfits:
        file.unlink()


def _run(evaluation: Evaluation, rows: list[Row], again: bool, console: Console) -> list[Result]:
    """Run the rows that are not there, with progress bars; a broken reference ends it.

    Returns:
        The results of ``rows``, and of the others that are there.
    """
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    results: list[Result] = []
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        for row in rows:
            kept = None if again else evaluation.kept(row)
            if kept:
                results.append(kept)
                progress.console.print(f"{row.name}: kept from an earlier run")
                continue
            task = progress.add_task(row.name, total=evaluation.plan.num_tokens(row))

            def on_phase(phase: str, task: TaskID = task, name: str = row.name) -> None:
                progress.update(task, description=f"{name}: {phase}")

            def on_tokens(tokens: int, task: TaskID = task) -> None:
                progress.advance(task, tokens)

            result = evaluation.run(row, on_phase, on_tokens)
            on_phase(result.status)
            progress.stop_task(task)
            results.append(result)
            if row.is_reference and result.status != "complete":
                break
    if results[0].status != "complete":
        console.print(
            f"{rows[0].name} is {results[0].status}: {results[0].reason}\n"
            f"Nothing can be compared without it; its log is {evaluation.log(rows[0])}.",
            style="red",
            markup=False,
        )
        raise typer.Exit(1)
    for other in evaluation.others(rows):
        results.append(other)
        console.print(f"{other.row.name}: kept from an earlier run")
    return results


def _width(table: Table) -> int:
    """Columns that a table takes if nothing is cut."""
    from rich.console import Console

    return Console(width=1000).measure(table).maximum


def _show(plan: Plan, results: list[Result], folder: Path, console: Console) -> None:
    """Print the table; write JSON and plots."""
    from rich.console import Console

    from vllm_turboquant.evaluation.report import footnotes, make_table, summarize, write_json

    summaries = summarize(plan, results)
    table = make_table(summaries)
    if console.is_terminal and _width(table) > console.width:
        table = make_table(summaries, with_errors=False)
    # Where even that is too wide, the terminal breaks lines; rich would leave digits out.
    Console(width=max(console.width, _width(table))).print(table)
    for line in footnotes(plan, summaries):
        console.print(line, markup=False, highlight=False)
    written = [folder / "report.json"]
    write_json(written[0], plan, summaries)
    try:
        from vllm_turboquant.evaluation.plots import plot_needles, plot_quality
    except ImportError as error:
        console.print(f"No plots: {error}; install matplotlib and run the same command again.")
    else:
        if plan.texts and len(summaries) > 1:
            written.append(folder / "quality.png")
            plot_quality(written[-1], summaries)
        if plan.needles:
            written.append(folder / "needle.png")
            plot_needles(written[-1], summaries)
    console.print(f"Written: {', '.join(map(str, written))}", markup=False)
