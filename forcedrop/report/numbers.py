"""Numbers in files as tables for the page: names with units, cells with as many digits as help."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from forcedrop.report.labels import LABEL
from forcedrop.report.page import Table

_UNITS = {  # endings of names in files; a longer one comes before its own ending
    "meV_atom": "meV/atom", "meV_A3": "meV/Å³", "meV_A": "meV/Å", "eV_A3": "eV/Å³", "eV_A": "eV/Å", "meV": "meV", "eV": "eV",
    "GPa": "GPa", "fs": "fs", "ps": "ps", "K": "K", "A3": "Å³", "percent": "%",
}  # fmt: skip
_MEASURES = {"rmse": "RMSE", "mae": "MAE", "sigma_rms": "σ (rms)"}
_SHAPES = {"z2": "z²", "miscalibration_area": "area", "rll": "RLL %", "spearman": "Spearman"}


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; a last one that a killed run left incomplete is dropped.

    Raises:
        ValueError: if the file has no row.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if None not in row.values()]
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def title_of(name: str) -> str:
    """Return a column's name in words, with its unit in brackets: ``max_force_sigma_eV_A`` is max force σ [eV/Å]."""
    for ending, unit in _UNITS.items():
        if name.endswith(f"_{ending}"):
            return f"{_words(name.removesuffix(f'_{ending}'))} [{unit}]"
    return _words(name)


def cell_of(value: Any, name: str = "") -> str:
    """Return a value as it shall be read: whole numbers and kelvins whole, others with four digits, missing ones as a dash."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None or value == "":
        return "–"
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    if math.isnan(number):
        return "–"
    if math.isfinite(number) and (name.endswith("_K") or number.is_integer()) and abs(number) < 1e15:
        return f"{number:.0f}"
    if abs(number) >= 100:  # such as an energy of −309.6201 eV, of which the changes count
        return f"{number:.3f}"
    return f"{number:.4g}"


def rows_table(rows: Sequence[Mapping[str, Any]], caption: str = "") -> Table:
    """Return rows of equal keys as a table in the order given."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return Table(
        [title_of(key) for key in keys], [[cell_of(row.get(key), key) for key in keys] for row in rows], caption
    )


def summary_table(rows: Sequence[Mapping[str, str]], left_out: Sequence[str] = ()) -> Table:
    """Return first, last, mean, smallest and largest of each column of numbers."""
    table = []
    for key in rows[0]:
        if key in left_out:
            continue
        try:
            values = [float(row[key]) for row in rows]
        except ValueError:  # a column of words
            continue
        numbers = [values[0], values[-1], math.fsum(values) / len(values), min(values), max(values)]
        table.append([title_of(key), *(cell_of(number, key) for number in numbers)])
    return Table(["", "first", "last", "mean", "smallest", "largest"], table)


def errors_table(reports: Mapping[str, Mapping[str, Any]], caption: str) -> Table:
    """Return errors [thousandths] and honesty, a row a property or an element.

    Args:
        reports: by name of the row, each as ``UncertaintyReport.as_dict`` gives it.
        caption: what the rows are.
    """
    rows = []
    for name, report in reports.items():
        what, unit = LABEL.get(name, (name, "eV/Å"))
        milli = [f"{1e3 * report[key]:.2f}" for key in _MEASURES]
        low, high = report["intervals"]["z2"]
        shape = [f"{report[key]:.3f}" if key == "miscalibration_area" else f"{report[key]:.2f}" for key in _SHAPES]
        rows.append([f"{what} [m{unit}]", *milli, *shape[:1], f"{low:.2f} … {high:.2f}", *shape[1:]])
    names = list(_SHAPES.values())
    return Table(["", *_MEASURES.values(), names[0], "95 % of z²", *names[1:]], rows, caption)


def coverage_table(coverage: Mapping[str, Mapping[str, float]]) -> Table:
    """Return the shares of errors inside the conformal intervals, by the share stated."""
    stated = sorted({float(level) for levels in coverage.values() for level in levels})
    names = {"atoms": "force vector"} | {name: what for name, (what, _) in LABEL.items()}
    rows = []
    for name, levels in coverage.items():
        found = {float(level): share for level, share in levels.items()}
        rows.append([names.get(name, name), *(f"{100 * found[x]:.1f} %" if x in found else "–" for x in stated)])
    return Table(["", *(f"{100 * x:g} %" for x in stated)], rows, "errors inside conformal intervals of …")


def _words(name: str) -> str:
    return " ".join("σ" if word == "sigma" else word for word in name.split("_"))
