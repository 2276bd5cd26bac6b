"""Figures and tables."""

from __future__ import annotations

import base64
import csv
import html
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ase.data import chemical_symbols
from ase.symbols import Symbols
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

from forcedrop.active import UNITS, Flags
from forcedrop.evaluation import Evaluation
from forcedrop.metrics import calibration_curve
from forcedrop.structures import Frame
from forcedrop.training import TrainedModel

_LABEL = {
    "energy": ("energy", "eV/atom"),
    "forces": ("force component", "eV/Å"),
    "stress": ("stress component", "eV/Å³"),
}
_BLUE, _RED, _GREY = "#2c6fbb", "#c0392b", "#888888"
_MOST_POINTS = 4000


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Save a figure, making its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
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
        what, unit = _LABEL[name]
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
            f"{_LABEL[name][0]}: z² = {report.z2:.2f}, area = {report.miscalibration_area:.3f}", fontsize=10
        )
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
    what, unit = _LABEL[name]
    axes.set_xlabel(f"σ of {what} [{unit}]")
    axes.set_ylabel(f"|error| [{unit}]")
    axes.legend(fontsize=8, loc="lower right")


def training_figure(log: str | Path) -> Figure:
    """Return the errors along a training from its ``log.csv``."""
    with Path(log).open(encoding="utf-8") as stream:
        rows = [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]
    minutes = np.array([row["seconds"] for row in rows]) / 60
    second = [row["stage"] == 2 for row in rows]
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    for axes, name, unit in zip(figure.subplots(1, 2), ("forces_meV_A", "energy_meV"), ("meV/Å", "meV"), strict=True):
        axes.plot(minutes, [row[f"train_{name}"] for row in rows], color=_GREY, lw=1, label="training")
        axes.plot(minutes, [row[f"val_{name}"] for row in rows], color=_BLUE, label="validation")
        if any(second):
            axes.axvline(minutes[second.index(True)], color=_RED, lw=0.8, ls="--", label="stage two")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("time [min]")
        axes.set_ylabel(f"RMSE of {'forces' if 'forces' in name else 'energy'} [{unit}]")
        axes.legend(fontsize=8)
    return figure


def md_figure(
    rows: Sequence[dict[str, float]], flagged: Sequence[float] = (), threshold: float | None = None
) -> Figure:
    """Return energy, temperature and σ along a run; ``rows`` as ``forcedrop.md`` writes them, ``flagged`` times [fs]."""
    time = np.array([row["time_fs"] for row in rows]) / 1000
    column = {key: np.array([row[key] for row in rows]) for key in rows[0]}
    panels = 4 if "pressure_GPa" in column else 3
    figure = Figure(figsize=(8.4, 2.1 * panels), layout="constrained")
    axes = figure.subplots(panels, 1, sharex=True)
    potential = column["potential_eV"] - column["potential_eV"][0]
    band = column["energy_sigma_eV"]
    axes[0].fill_between(time, potential - band, potential + band, color="#9cc0e7", label="potential ±1σ")
    axes[0].plot(time, potential, color=_BLUE, lw=1)
    axes[0].plot(time, column["total_eV"] - column["total_eV"][0], color="black", lw=1, label="total")
    axes[0].set_ylabel("energy − start [eV]")
    axes[0].legend(fontsize=8, ncols=2)
    axes[1].plot(time, column["temperature_K"], color=_RED, lw=1)
    axes[1].set_ylabel("temperature [K]")
    axes[2].plot(time, column["max_force_sigma_eV_A"], color=_BLUE, lw=1, label="largest atomic force σ")
    axes[2].plot(time, column["mean_force_sigma_eV_A"], color=_GREY, lw=1, label="mean atomic force σ")
    if threshold is not None:
        axes[2].axhline(threshold, color=_RED, lw=0.8, ls="--", label="threshold")
    if flagged:  # ticks at the top, which do not hide the curves when there are many
        place = axes[2].get_xaxis_transform()
        moments = np.array(flagged) / 1000
        axes[2].plot(
            moments, np.full(len(moments), 0.97), "|", color=_RED, ms=7, mew=0.6, transform=place, label="flagged"
        )
    axes[2].set_ylabel("force σ [eV/Å]")
    axes[2].margins(y=0.4)
    axes[2].set_ylim(bottom=0)
    axes[2].legend(fontsize=8, ncols=4, loc="upper right", bbox_to_anchor=(1, 0.93))
    if panels == 4:
        pressure, band = column["pressure_GPa"], column["pressure_sigma_GPa"]
        axes[3].fill_between(time, pressure - band, pressure + band, color="#9cc0e7")
        axes[3].plot(time, pressure, color=_BLUE, lw=1)
        axes[3].set_ylabel("pressure ±1σ [GPa]")
    axes[-1].set_xlabel("time [ps]")
    return figure


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


def evaluation_table(evaluation: Evaluation) -> str:
    """Return the errors and the honesty of σ as a text table, with a sentence on each property."""
    head = [
        "",
        "RMSE",
        "MAE",
        "plain RMSE",
        "σ (rms)",
        "z²",
        "95 % of z²",
        "area",
        "RLL %",
        "Spearman (ceiling)",
    ]
    reports = evaluation.reports()
    rows = [head]
    for name, r in reports.items():
        milli = [f"{1e3 * value:.2f}" for value in (r.rmse, r.mae, evaluation.plain_rmse[name], r.sigma_rms)]
        interval = f"{r.z2_interval[0]:.2f} … {r.z2_interval[1]:.2f}"
        shape = [f"{r.z2:.2f}", interval, f"{r.miscalibration_area:.3f}", f"{r.rll:.0f}"]
        what, unit = _LABEL[name]
        rows.append([f"{what} [m{unit}]", *milli, *shape, f"{r.spearman:.2f} ({r.spearman_ceiling:.2f})"])
    lines = format_table(rows)
    kind = "calibrated σ" if evaluation.calibrated else "raw spread, not calibrated"
    lines.append(
        f"{evaluation.n_frames} frames, {kind}; total energy RMSE {1e3 * evaluation.total_energy_rmse:.2f} meV"
    )
    if found := evaluation.detection():
        lines.append(
            f"worst {100 * found['share']:.0f} % of atoms (force error above {1e3 * found['threshold']:.0f} meV/Å): "
            f"AUROC {found['auroc']:.3f}, precision {found['precision']:.2f}"
        )
    lines += [f"{_LABEL[name][0]}: {report.sentence()}" for name, report in reports.items()]
    return "\n".join(lines)


def comparison_rows(evaluations: Mapping[str, Mapping[str, Evaluation]]) -> list[dict[str, Any]]:
    """Return one row a model and set: errors [meV, meV/Å], and of the forces how honest σ is.

    Args:
        evaluations: by model, then by set.
    """
    rows = []
    for model, sets in evaluations.items():
        for name, found in sets.items():
            reports, detection = found.reports(), found.detection()
            row: dict[str, Any] = {"model": model, "set": name, "energy_rmse_meV": 1e3 * found.total_energy_rmse}
            if "energy" in reports:
                row["energy_z2"] = reports["energy"].z2
            if "forces" in reports:
                r = reports["forces"]
                row |= {
                    "forces_rmse_meV_A": 1e3 * r.rmse,
                    "forces_nll": r.nll,
                    "forces_crps_meV_A": 1e3 * r.crps,
                    "forces_z2": r.z2,
                    "forces_z2_low": r.z2_interval[0],
                    "forces_z2_high": r.z2_interval[1],
                    "forces_area": r.miscalibration_area,
                    "forces_rll_percent": r.rll,
                    "auroc_worst_5_percent": detection["auroc"],
                }
            rows.append({k: v if isinstance(v, str) else round(float(v), 4) for k, v in row.items()})
    return rows


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of :func:`comparison_rows` as text, a block a set."""
    heads = {
        "energy_rmse_meV": "E RMSE [meV]", "energy_z2": "z² of E", "forces_rmse_meV_A": "F RMSE [meV/Å]",
        "forces_nll": "NLL", "forces_crps_meV_A": "CRPS [meV/Å]", "forces_z2": "z²", "forces_area": "area",
        "forces_rll_percent": "RLL %", "auroc_worst_5_percent": "AUROC",
    }  # fmt: skip
    lines: list[str] = []
    for name in dict.fromkeys(row["set"] for row in rows):
        chosen = [row for row in rows if row["set"] == name]
        keys = [key for key in heads if any(key in row for row in chosen)]
        table = [[name, *(heads[key] for key in keys)]]
        table += [[row["model"], *(f"{row[key]:.3g}" if key in row else "–" for key in keys)] for row in chosen]
        lines += [*format_table(table), ""]
    return "\n".join(lines).rstrip()


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


def ranking_csv(flags: Flags, path: str | Path) -> Path:
    """Write all frames, most uncertain first, with every criterion, and whether they are flagged."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        names = [f"sigma_{name}" for name in UNITS]
        writer.writerow(["rank", "frame", "source", *names, "flagged"])
        for rank, index in enumerate(flags.ranking):
            frame = flags.frames[index]
            values = [f"{frame.info[name]:.6g}" for name in names]
            flagged = int(flags.values[index] > flags.threshold)
            writer.writerow([rank + 1, int(index), frame.info["origin"], *values, flagged])
    return path


def describe_model(model: TrainedModel) -> str:
    """Return what a model knows: elements, shape, dropout sites, data, calibration."""
    config, provenance = model.potential.config, model.provenance
    n_weights = sum(p.numel() for p in model.potential.parameters())
    data = provenance.get("training_set", {})
    lines = [
        f"forcedrop {provenance.get('forcedrop', '?')} model of {provenance.get('date', '?')}",
        f"elements: {' '.join(chemical_symbols[z] for z in config.elements)}; cutoff {config.cutoff} Å",
        f"network: {config.n_layers} layers, {config.n_channels} channels, l ≤ {config.l_max}, {n_weights} weights"
        + (", ZBL repulsion" if config.zbl else ""),
        "dropout sites: " + (", ".join(f"{s.name} p={s.rate:g}" for s in model.potential.sites) or "none"),
        f"trained on {data.get('frames', '?')} frames, {data.get('atoms', '?')} atoms (sha256 {data.get('hash', '?')[:12]})",
    ]
    shortest = data.get("shortest_distance", {})
    if shortest:
        lines.append("shortest distances [Å]: " + ", ".join(f"{k} {v:.2f}" for k, v in shortest.items()))
    last = provenance.get("last_epoch", {})
    if last:
        lines.append(
            f"validation RMSE: forces {last['val_forces_meV_A']:.1f} meV/Å, energy {last['val_energy_meV_atom']:.2f} meV/atom"
        )
    if model.calibration is None:
        lines.append("not calibrated")
    else:
        c = model.calibration
        own = ", ".join(f"{name} {value:.2f}" for name, value in c.scales.items())
        lines.append(
            f"calibration: {c.sentence()} of {c.n_samples} samples, on {c.n_frames} frames; then on their own: {own}"
        )
        for name, unit in UNITS.items():
            median, high = c.threshold(name, 0.5), c.threshold(name, 0.95)
            lines.append(f"  {name} σ there: median {median:.4g}, 95 % below {high:.4g} {unit}")
    return "\n".join(lines)


def describe_frames(frames: Sequence[Frame]) -> str:
    """Return how many frames of what, with which labels, in which ranges."""
    sizes = [len(f) for f in frames]
    formulas = Counter(symbols_formula(f) for f in frames)
    labelled = {name: sum(getattr(f, name) is not None for f in frames) for name in ("energy", "forces", "stress")}
    periodic = sum(bool(f.pbc.any()) for f in frames)
    common = ", ".join(f"{formula} ({count})" for formula, count in formulas.most_common(6))
    lines = [
        f"{len(frames)} frames of {min(sizes)} to {max(sizes)} atoms, {periodic} periodic",
        f"compositions: {common}" + (f" and {len(formulas) - 6} more" if len(formulas) > 6 else ""),
        "labels: " + ", ".join(f"{name} {count}" for name, count in labelled.items()),
    ]
    energies = [f.energy / len(f) for f in frames if f.energy is not None]
    if energies:
        lines.append(f"energy: {min(energies):.4f} … {max(energies):.4f} eV/atom")
    forces = [f.forces.ravel() for f in frames if f.forces is not None]
    if forces:
        every = np.concatenate(forces)
        lines.append(f"forces: RMS {np.sqrt(np.mean(every**2)):.4f}, largest component {np.abs(every).max():.3f} eV/Å")
    return "\n".join(lines)


def symbols_formula(frame: Frame) -> str:
    """Return the chemical formula in Hill order."""
    return str(Symbols(frame.z).get_chemical_formula())


def results_page(path: str | Path, title: str, sections: Sequence[tuple[str, str, Sequence[Path]]]) -> Path:
    """Write one HTML file that needs nothing else: each section has a heading, a text and pictures, embedded."""
    parts = []
    for heading, text, pictures in sections:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        for paragraph in text.split("\n\n"):
            plain = paragraph.startswith(" ") or "  " in paragraph
            tag = "pre" if plain else "p"
            parts.append(f"<{tag}>{html.escape(paragraph)}</{tag}>")
        for picture in pictures:
            data = base64.b64encode(picture.read_bytes()).decode()
            parts.append(f'<img alt="{html.escape(picture.stem)}" src="data:image/png;base64,{data}">')
    page = _PAGE.format(title=html.escape(title), body="\n".join(parts))
    path = Path(path)
    path.write_text(page, encoding="utf-8")
    return path


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
pre {{ background: #f4f4f4; padding: .8rem; overflow-x: auto; font-size: 13px; line-height: 1.4; }}
img {{ max-width: 100%; display: block; margin: 1rem auto; }}
h2 {{ margin-top: 2.5rem; border-bottom: 1px solid #ddd; }}
</style></head><body><h1>{title}</h1>
{body}
</body></html>
"""


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _thin(n: int) -> np.ndarray:
    """Return at most a few thousand indices, evenly spread: a plot of a million error bars helps nobody."""
    return np.unique(np.linspace(0, n - 1, min(n, _MOST_POINTS)).astype(int))


def _milli(value: float, unit: str) -> str:
    return f"{1e3 * value:.1f} m{unit}"
