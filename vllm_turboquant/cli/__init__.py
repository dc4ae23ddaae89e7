"""The command line, `vllm-turboquant COMMAND`: one module of this folder per command.

NOTE: Every module is imported to describe its options, before any command runs. At their top,
modules import neither PyTorch nor vLLM nor what imports these; the functions that need them do.
"""

from __future__ import annotations

from typing import Annotated

import typer

from vllm_turboquant import __version__
from vllm_turboquant.cli.codec import measure_codes
from vllm_turboquant.cli.eval import evaluate

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # errors are sentences, on one line and without a box around them
)
app.command("codec")(measure_codes)
app.command("eval")(evaluate)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, help="Print the version.")
    ] = False,
) -> None:
    """A KV cache about 6x smaller for stock vLLM: look into it, measure it."""


def main() -> None:
    """Run the command that the arguments name."""
    app(prog_name="vllm-turboquant")
