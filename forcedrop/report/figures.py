"""Figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from forcedrop.evaluation import Evaluation
from forcedrop.files import write_bytes
from forcedrop.md import Kind, MDRun
from forcedrop.metrics import calibration_curve, roc_curve
from forcedrop.report.labels import LABEL

_BLUE, _RED, _GREY, _ORANGE = "#2c6fbb", "#c0392b", "#888888", "#e67e22"
_MOST_POINTS = 4000


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Save a figure, making its folder."""
    path, stream = Path(path), io.BytesIO()
    figure.savefig(stream, dpi=130, format=path.suffix[1:] or None)
    write_bytes(path, stream.getbuffer())
    return path


def parity_figure(evaluation: Evaluation, title: str = "") -> Figure:
    """Return predicted against reference with 1σ error bars, one panel a property."""
    names = list(evaluation.error)
    figure = Figure(figsize=(4.6 * len(names), 4.4), layout="constrained")
    for axes, name in zip(np.atleast_1d(figure.subplots(1, len(names))), names, strict=True):
        reference, error, sigma = (getattr(evaluation, what)[name] for what in ("reference", "error", "sigma"))
        keep = _thin(len(reference))
        shift = float(np.mean(reference)) if name == "energy" else 0.0
        x, y = reference[keep] - shift, (reference + error)[keep] - shift
        axes.errorbar(x, y, yerr=sigma[keep], fmt="o", ms=2, lw=0.6, color=_BLUE, ecolor="#9cc0e7", alpha=0.6)
        low, high = min(x.min(), y.min()), max(x.max(), y.max())
        axes.plot([low, high], [low, high], color=_GREY, lw=0.8, zorder=3)
        what, unit = LABEL[name]
        relative = " − mean" if name == "energy" else ""
        axes.set_xlabel(f"reference {what}{relative} [{unit}]")
        axes.set_ylabel(f"predicted, ±1σ [{unit}]")
        axes.locator_params(nbins=6)
        axes.set_title(f"RMSE {_milli(float(np.sqrt(np.mean(error**2))), unit)}", fontsize=10)
    if title:
        figure.suptitle(title)
    return figure


def sigma_figure(evaluation: Evaluation, title: str = "") -> Figure:
    r"""Return \|error\| against σ with the honest band, and the calibration curve, one row a property."""
    names = list(evaluation.error)
    reports = evaluation.reports()
    figure = Figure(figsize=(9.2, 4.0 * len(names)), layout="constrained")
    for row, name in zip(np.atleast_2d(figure.subplots(len(names), 2)), names, strict=True):
        error, sigma = evaluation.error[name], evaluation.sigma[name]
        used = (sigma > 1e-12) & (np.abs(error) > 1e-12)
        _error_against_sigma(row[0], np.abs(error[used]), sigma[used], name)
        nominal, observed = calibration_curve(error[used], sigma[used])
        row[1].plot([0, 1], [0, 1], color=_GREY, lw=0.8)
        row[1].fill_between(nominal, nominal, observed, color="#9cc0e7", alpha=0.5)
        row[1].plot(nominal, observed, color=_BLUE)
        row[1].set_xlabel("expected share inside the interval")
        row[1].set_ylabel("observed share")
        report = reports[name]
        row[1].set_title(
            f"{LABEL[name][0]}: z² = {report.z2:.2f}, area = {report.miscalibration_area:.3f}", fontsize=10
        )
    if title:
        figure.suptitle(title)
    return figure


def detection_figure(evaluation: Evaluation, title: str = "") -> Figure:
    """Return how well σ of the forces finds the worst atoms, the ROC curve, and how honest it is for each element."""
    figure = Figure(figsize=(9.2, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    error, sigma, _ = evaluation.atoms()
    found = evaluation.detection()
    left.plot([0, 1], [0, 1], color=_GREY, lw=0.8)
    left.plot(*roc_curve(error > found["threshold"], sigma), color=_BLUE)
    left.set_xlabel("share of the other atoms that are flagged")
    left.set_ylabel(f"share of the worst {100 * found['share']:.0f} % that are flagged")
    left.set_title(f"AUROC = {found['auroc']:.3f}", fontsize=10)
    reports = evaluation.by_element()
    place = np.arange(len(reports))
    z2 = np.array([r.z2 for r in reports.values()])
    ends = np.array([r.intervals["z2"] for r in reports.values()]).T
    right.axhspan(0.9, 1.1, color=_GREY, alpha=0.2, label="honest")
    right.errorbar(
        place, z2, yerr=np.abs(ends - z2), fmt="o", color=_BLUE, capsize=3, label="z² of force components, 95 %"
    )
    right.set_xticks(place, [f"{symbol}\nRMSE {1e3 * r.rmse:.1f}" for symbol, r in reports.items()])
    right.set_xlim(-0.6, len(reports) - 0.4)
    right.set_ylim(bottom=0)
    right.set_xlabel("element; RMSE in meV/Å")
    right.set_ylabel("mean squared z-score")
    right.legend(fontsize=8)
    if title:
        figure.suptitle(title)
    return figure


def _error_against_sigma(axes: Axes, error: np.ndarray, sigma: np.ndarray, name: str) -> None:
    """Draw the points, the band that holds 90 % of honest Gaussian errors, and the binned root mean square."""
    keep = _thin(len(error))
    axes.plot(sigma[keep], error[keep], "o", ms=1.6, color=_BLUE, alpha=0.25, rasterized=True)
    line = np.array([sigma.min(), sigma.max()])
    axes.fill_between(line, 0.0627 * line, 1.96 * line, color=_GREY, alpha=0.2, label="90 % of honest errors")
    order = np.array_split(np.argsort(sigma), min(12, max(len(sigma) // 10, 1)))
    centre = [float(np.sqrt(np.mean(sigma[part] ** 2))) for part in order]
    spread = [float(np.sqrt(np.mean(error[part] ** 2))) for part in order]
    axes.plot(centre, spread, "s-", color=_RED, ms=4, lw=1, label="RMSE in bins of σ")
    axes.plot(line, line, color=_GREY, lw=0.8)
    axes.set_xscale("log")
    axes.set_yscale("log")
    if line[1] < 30 * line[0]:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())  # its labels would overlap
    axes.set_ylim(bottom=max(error.min(), sigma.min() * 1e-2))
    what, unit = LABEL[name]
    axes.set_xlabel(f"σ of {what} [{unit}]")
    axes.set_ylabel(f"|error| [{unit}]")
    axes.legend(fontsize=8, loc="lower right")


def training_figure(log: str | Path) -> Figure:
    """Return the errors along a training from its ``log.csv``."""
    with Path(log).open(encoding="utf-8") as stream:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    minutes = np.array([row["seconds"] for row in rows]) / 60
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    for axes, name, unit in zip(figure.subplots(1, 2), ("forces_meV_A", "energy_meV"), ("meV/Å", "meV"), strict=True):
        axes.plot(minutes, [row[f"train_{name}"] for row in rows], color=_GREY, lw=1, label="training")
        axes.plot(minutes, [row[f"val_{name}"] for row in rows], color=_BLUE, label="validation")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("time [min]")
        axes.set_ylabel(f"RMSE of {'forces' if 'forces' in name else 'energy'} [{unit}]")
        axes.legend(fontsize=8)
    return figure


def functions_figure(
    x: np.ndarray,
    functions: np.ndarray,
    mean: np.ndarray,
    sigma: np.ndarray,
    *,
    label: str,
    reference: np.ndarray | None = None,
    seen: tuple[float, float] | None = None,
) -> Figure:
    """Return the energies of single functions along a path, their mean with ±2σ, and beside them σ alone.

    Args:
        x: place along the path, shape (n,).
        functions: energies above that of the mean's lowest point [eV], shape (K, n).
        mean: the same of the mean, shape (n,).
        sigma: of ``mean``, shape (n,).
        label: of ``x``, with its unit.
        reference: the reference method's energies above its own lowest point.
        seen: range of ``x`` in the training set.
    """
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, row in enumerate(functions):
        left.plot(
            x, row, color="#9cc0e7", lw=0.6, alpha=0.8, label=f"{len(functions)} functions" if not number else None
        )
    left.fill_between(x, mean - 2 * sigma, mean + 2 * sigma, color=_BLUE, alpha=0.15, lw=0, label="±2σ")
    left.plot(x, mean, color=_BLUE, lw=1.6, label="their mean, the force field")
    if reference is not None:
        left.plot(x, reference, "o", color=_RED, ms=3, label="reference")
        right.plot(x, np.abs(mean - reference), "o", color=_RED, ms=3, label="|error|")
    right.plot(x, sigma, color=_BLUE, label="σ")
    right.set_yscale("log")
    top = float(max(mean.max(), 0.0 if reference is None else reference.max()))
    left.set_ylim(-0.08 * top, 1.25 * top)
    for axes, what in ((left, "energy [eV]"), (right, "σ of the energy [eV]")):
        if seen is not None:
            axes.axvspan(*seen, color="#eeeeee", zorder=0, label="in the training set")
        axes.set_xlabel(label)
        axes.set_ylabel(what)
        axes.legend(fontsize=8)
    return figure


def run_figure(run: MDRun) -> Figure:
    """Return :func:`md_figure` of a run of ``forcedrop.md``, with what its guard saw and did."""
    step = run.timestep
    kept = [event.step * step for event in run.events if event.kind is Kind.FLAGGED]
    back = [event.step * step for event in run.events if event.back_to is not None]
    high = None if run.band is None or not np.isfinite(run.band.high) else run.band.high
    ours = run.band is not None and run.band.criterion != "energy_per_atom"  # else in another unit
    return md_figure(
        run.rows, run.flagged, run.threshold if ours else None, high if ours else None, kept, back, run.stopped
    )


def md_figure(
    rows: Sequence[dict[str, float]],
    flagged: Sequence[float] = (),
    threshold: float | None = None,
    high: float | None = None,
    kept: Sequence[float] = (),
    back: Sequence[float] = (),
    stopped: float | None = None,
) -> Figure:
    """Return energy, temperature and σ along a run.

    Args:
        rows: as ``forcedrop.md`` writes them.
        flagged: times above the threshold [fs].
        threshold: lower end of the band [eV/Å].
        high: upper end [eV/Å].
        kept: times of the flagged frames that were kept [fs].
        back: times at which the run went back [fs].
        stopped: time at which it was stopped [fs].
    """
    time = np.array([row["time_fs"] for row in rows]) / 1000
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    panels = 4 if "pressure_GPa" in column else 3
    figure = Figure(figsize=(8.4, 2.1 * panels + 0.6), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True, height_ratios=[1, 0.8, 1.3, 1][:panels])
    potential = column["potential_eV"] - column["potential_eV"][0]
    band = column["energy_sigma_eV"]
    axes[0].fill_between(
        time,
        potential - band,
        potential + band,
        color="#9cc0e7",
        lw=0,
        label=f"potential ±1σ (at most {band.max():.2g} eV)",
    )
    axes[0].plot(time, potential, color=_BLUE, lw=1)
    axes[0].plot(time, column["total_eV"] - column["total_eV"][0], color="black", lw=1, label="total")
    axes[0].set_ylabel("energy − start [eV]")
    axes[1].plot(time, column["temperature_K"], color=_RED, lw=1)
    axes[1].set_ylabel("temperature [K]")
    _sigma_panel(axes[2], time, column, flagged, (threshold, high), kept)
    if panels == 4:
        pressure, band = column["pressure_GPa"], column["pressure_sigma_GPa"]
        axes[3].fill_between(time, pressure - band, pressure + band, color="#9cc0e7", lw=0)
        axes[3].plot(time, pressure, color=_BLUE, lw=1)
        axes[3].set_ylabel("pressure ±1σ [GPa]")
    for axis in axes:
        for moment in back:
            axis.axvline(moment / 1000, color=_GREY, lw=0.8, ls=":", label="went back" if moment == back[0] else None)
        if stopped is not None:
            axis.axvline(stopped / 1000, color=_RED, lw=1.2, label="stopped")
    for axis in (axes[0], axes[2]):
        axis.legend(fontsize=7, ncols=8, loc="lower right", bbox_to_anchor=(1.0, 1.0), frameon=False, borderpad=0.1)
    axes[-1].set_xlabel("time [ps]")
    return figure


def _sigma_panel(
    axes: Axes,
    time: np.ndarray,
    column: Mapping[str, np.ndarray],
    flagged: Sequence[float],
    band: tuple[float | None, float | None],
    kept: Sequence[float],
) -> None:
    """Draw σ, the band, ticks above it where a step is flagged, and points where a frame was kept."""
    largest = column["max_force_sigma_eV_A"]
    axes.plot(time, largest, color=_BLUE, lw=1, label="largest atomic force σ")
    axes.plot(time, column["mean_force_sigma_eV_A"], color=_GREY, lw=1, label="mean")
    if largest.max() > 10 * np.median(largest) > 0:  # one explosion must not flatten the rest
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    else:
        axes.margins(y=0.15)
        axes.set_ylim(bottom=0)
    low, high = band
    if low is not None:
        top = axes.get_ylim()[1]
        axes.axhline(low, color=_ORANGE, lw=0.8, ls="--", label="low")
        axes.axhspan(low, top if high is None else high, color=_ORANGE, alpha=0.08, lw=0)
        if high is not None and high < 3 * largest.max():
            axes.axhline(high, color=_RED, lw=0.8, ls="--", label="high")
        axes.set_ylim(top=max(top, 1.1 * low))
    if flagged:  # ticks at the top, which do not hide the curves when there are many
        moments, place = np.array(flagged) / 1000, axes.get_xaxis_transform()
        ticks = np.full(len(moments), 0.97)
        axes.plot(moments, ticks, "|", color=_ORANGE, ms=6, mew=0.6, transform=place, label="flagged")
    if kept:
        moments = np.array(kept) / 1000
        axes.plot(
            moments, np.interp(moments, time, largest), "o", color=_ORANGE, mec="black", mew=0.5, ms=4, label="kept"
        )
    axes.set_ylabel("atomic force σ [eV/Å]")


def flag_figure(values: np.ndarray, threshold: float, criterion: str, unit: str) -> Figure:
    """Return σ of every frame in order with the threshold and the frames above it."""
    figure = Figure(figsize=(8.4, 3.4), layout="constrained")
    axes = figure.subplots()
    index, above = np.arange(len(values)), values > threshold
    axes.plot(index[~above], values[~above], "o", ms=3, color=_BLUE, label="below")
    axes.plot(
        index[above],
        values[above],
        "o",
        ms=3,
        color=_RED,
        label=f"flagged: {int(above.sum())} of {len(values)}",
    )
    axes.axhline(threshold, color=_RED, lw=0.8, ls="--")
    axes.set_xlabel("frame")
    axes.set_ylabel(f"{criterion} σ [{unit}]")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    return figure


def comparison_figure(evaluations: Mapping[str, Mapping[str, Evaluation]]) -> Figure:
    r"""Return for every set the calibration curves of the forces, and the RMSE in bins of σ against σ, a line a model."""
    sets = list(next(iter(evaluations.values())))
    figure = Figure(figsize=(9.2, 4.0 * len(sets)), layout="constrained")
    for row, name in zip(np.atleast_2d(figure.subplots(len(sets), 2)), sets, strict=True):
        row[0].plot([0, 1], [0, 1], color=_GREY, lw=0.8)
        ends: list[float] = []
        for model, found in evaluations.items():
            error, sigma = 1e3 * found[name].error["forces"], 1e3 * found[name].sigma["forces"]
            used = (sigma > 1e-9) & (np.abs(error) > 1e-9)
            error, sigma = error[used], sigma[used]
            row[0].plot(*calibration_curve(error, sigma), lw=1.2, label=model)
            parts = np.array_split(np.argsort(sigma), 15)
            x = [float(np.sqrt(np.mean(sigma[part] ** 2))) for part in parts]
            row[1].plot(
                x, [float(np.sqrt(np.mean(error[part] ** 2))) for part in parts], "o-", ms=3, lw=1.2, label=model
            )
            ends += [x[0], x[-1]]
        row[1].plot([min(ends), max(ends)], [min(ends), max(ends)], color=_GREY, lw=0.8)
        row[0].set(xlabel="expected share inside the interval", ylabel="observed share", title=name)
        row[1].set(
            xscale="log", yscale="log", xlabel="σ of force components [meV/Å]", ylabel="RMSE in bins of σ [meV/Å]"
        )
        for axis in (row[1].xaxis, row[1].yaxis):
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(FormatStrFormatter("%g"))
            axis.set_minor_formatter(NullFormatter())
        row[1].legend(fontsize=8)
    return figure


def _thin(n: int) -> np.ndarray:
    """Return at most a few thousand indices, evenly spread: a plot of a million error bars helps nobody."""
    return np.unique(np.linspace(0, n - 1, min(n, _MOST_POINTS)).astype(int))


def _milli(value: float, unit: str) -> str:
    return f"{1e3 * value:.1f} m{unit}"
