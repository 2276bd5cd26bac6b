"""The ``forcedrop`` command: thin doors onto the functions of the library. ``scripts/`` call the same."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from forcedrop.cli import models, runs  # noqa: F401 (their commands)
from forcedrop.cli.common import app


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    app(list(sys.argv[1:] if arguments is None else arguments), prog_name="forcedrop")
