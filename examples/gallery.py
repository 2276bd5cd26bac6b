"""What the numbered examples share: their command line, a plain table, a figure and how it is saved."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image

Numbers = dict[str, float]
"""What the ``main`` of an example returns: the numbers that its claim is about."""


def run(main: Callable[[bool, Path | None], Numbers]) -> None:
    """Run an example's ``main(fast, figure)`` from the command line: ``--fast``, ``--output FOLDER``."""
    script = Path(sys.modules[main.__module__].__file__ or "example")
    text = (sys.modules[main.__module__].__doc__ or "").strip()
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help="a few seconds, with less to see")
    parser.add_argument("--output", type=Path, default=script.parent / "figures", metavar="FOLDER")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # these networks are too small for more
    start = time.monotonic()
    figure = arguments.output / f"{script.stem}.png"
    main(arguments.fast, figure)
    print(f"\n{figure}, after {time.monotonic() - start:.0f} s")


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table with aligned columns; numbers with four digits."""
    cells = [list(header), *([f"{x:.4g}" if isinstance(x, float) else str(x) for x in row] for row in rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def panels(columns: int, rows: int = 1, size: tuple[float, float] = (4.2, 3.6)) -> tuple[Figure, list[Any]]:
    """Return a figure and its axes, row by row; ``size`` is that of a panel [inch]."""
    figure = Figure(figsize=(columns * size[0], rows * size[1]), dpi=110, layout="constrained")
    return figure, list(figure.subplots(rows, columns, squeeze=False).ravel())


def save(figure: Figure, path: Path | None) -> None:
    """Save the figure as PNG, making its folder; nothing without a path."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        figure.savefig(buffer)
        # 128 colours are enough, and take a third of the space
        Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
