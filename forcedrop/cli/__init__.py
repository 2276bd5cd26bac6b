"""The ``forcedrop`` command: thin doors onto the functions of the library. ``scripts/`` call the same."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Annotated, TextIO

import typer

import forcedrop
from forcedrop.cli import models, predict, runs  # noqa: F401 (their commands)
from forcedrop.cli.common import app


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"forcedrop {forcedrop.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version and exit")
    ] = False,
) -> None:
    pass


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show a warning as a line of its own, without the place in the code."""
    typer.echo(f"warning: {message}", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    warnings.showwarning = _warn
    app(list(sys.argv[1:] if arguments is None else arguments), prog_name="forcedrop")
