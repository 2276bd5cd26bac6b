"""Table and figure of a learning loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, MaxNLocator, NullFormatter

from forcedrop.report.tables import format_table

_BLUE, _RED, _GREY = "#2c6fbb", "#c0392b", "#888888"


def rounds_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rounds as text; ``rows`` as ``forcedrop.active`` writes them to ``rounds.csv``."""
    head = [
        "round", "labels", "explored [ps]", "flagged", "labelled", "failed", "F RMSE [meV/Å]", "F σ", "z²", "95 % of z²",
        "E RMSE [meV/atom]", "verdict",
    ]  # fmt: skip
    table = [head]
    for row in rows:
        interval = "–" if row["z2"] is None else f"{row['z2_low']:.2f} … {row['z2_high']:.2f}"
        table.append(
            [
                str(row["round"]),
                str(row["labels"]),
                _number(row["explored_ps"], "{:.2f}"),
                _number(row["flagged"], "{}") + ("" if row["candidates"] is None else f" of {row['candidates']}"),
                _number(row["labelled"], "{}"),
                _number(row["failed"], "{}"),
                _number(row["force_rmse_eV_A"], "{:.1f}", 1e3),
                _number(row["force_sigma_eV_A"], "{:.1f}", 1e3),
                _number(row["z2"], "{:.2f}"),
                interval,
                _number(row["energy_rmse_eV_atom"], "{:.2f}", 1e3),
                row["verdict"] or "–",
            ]
        )
    return "\n".join(format_table(table))


def _number(value: Any, form: str, factor: float | None = None) -> str:
    if value is None:
        return "–"
    return form.format(value if factor is None else factor * value)


def active_figure(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Return error and σ of fresh labels, their z² with its interval, and the number of labels, against the round."""
    judged = [row for row in rows if row["z2"] is not None]
    number = [row["round"] for row in judged]
    figure = Figure(figsize=(11.4, 3.6), layout="constrained")
    error, honest, labels = figure.subplots(1, 3)
    error.plot(number, [1e3 * row["force_rmse_eV_A"] for row in judged], "o-", color=_RED, label="error (RMSE)")
    error.plot(
        number, [1e3 * row["force_sigma_eV_A"] for row in judged], "s--", color=_BLUE, label="σ (root mean square)"
    )
    error.set_ylabel("forces of fresh labels [meV/Å]")
    error.set_ylim(bottom=0)
    error.legend(fontsize=8)
    z2 = np.array([row["z2"] for row in judged])
    ends = np.array([[row["z2_low"], row["z2_high"]] for row in judged]).reshape(-1, 2).T
    honest.axhline(1, color=_GREY, lw=0.8)
    honest.errorbar(number, z2, yerr=np.abs(ends - z2), fmt="o-", color=_BLUE, capsize=3)
    honest.set_yscale("log")
    honest.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    honest.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    honest.yaxis.set_minor_formatter(NullFormatter())
    honest.set_ylabel("mean z² of fresh labels, 95 %")
    labels.step([row["round"] for row in rows], [row["labels"] for row in rows], "o-", where="mid", color=_BLUE)
    labels.set_ylabel("labels trained on")
    labels.set_ylim(bottom=0)
    for axes in (error, honest, labels):
        axes.set_xlabel("round")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure
