"""Tables and descriptions as text."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols
from ase.symbols import Symbols

from forcedrop.files import write_text
from forcedrop.report.labels import LABEL
from forcedrop.structures.compositions import formula
from forcedrop.uncertainty.calibration import CRITERIA, MEANING

if TYPE_CHECKING:  # who describes a model does not wait for what evaluates one
    from forcedrop.active.flagging import Flags
    from forcedrop.evaluation import Evaluation
    from forcedrop.metrics import UncertaintyReport
    from forcedrop.model import TrainedModel
    from forcedrop.potential import EnergyModel
    from forcedrop.structures import Frame


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
        interval = "{:.2f} … {:.2f}".format(*r.intervals["z2"])
        shape = [f"{r.z2:.2f}", interval, f"{r.miscalibration_area:.3f}", f"{r.rll:.0f}"]
        what, unit = LABEL[name]
        rows.append([f"{what} [m{unit}]", *milli, *shape, f"{r.spearman:.2f} ({r.spearman_ceiling:.2f})"])
    lines = format_table(rows)
    kind = "calibrated σ" if evaluation.calibrated else "raw spread, not calibrated"
    functions = f" of {evaluation.n_samples} functions" if evaluation.n_samples else ""
    lines.append(
        f"{evaluation.n_frames} frames, {kind}{functions}; total energy RMSE {1e3 * evaluation.total_energy_rmse:.2f} meV"
    )
    if found := evaluation.detection():
        low, high = found["auroc_interval"]
        lines.append(
            f"worst {100 * found['share']:.0f} % of atoms (force error above {1e3 * found['threshold']:.0f} meV/Å): "
            f"AUROC {found['auroc']:.3f} ({low:.3f} … {high:.3f}), precision {found['precision']:.2f}"
        )
    if elements := evaluation.by_element():
        lines += ["", *_element_lines(elements)]
    if evaluation.coverage:
        lines += ["", *_coverage_lines(evaluation.coverage)]
    lines.append("")
    lines += [f"{LABEL[name][0]}: {report.sentence()}" for name, report in reports.items()]
    return "\n".join(lines)


def _element_lines(reports: Mapping[str, UncertaintyReport]) -> list[str]:
    """Return errors and honesty of the force components of each element."""
    rows = [["force components of", "n", "RMSE [meV/Å]", "σ (rms)", "z²", "95 % of z²", "area"]]
    for symbol, r in reports.items():
        errors = [f"{1e3 * value:.2f}" for value in (r.rmse, r.sigma_rms)]
        interval = "{:.2f} … {:.2f}".format(*r.intervals["z2"])
        rows.append([symbol, str(r.n), *errors, f"{r.z2:.2f}", interval, f"{r.miscalibration_area:.3f}"])
    return format_table(rows)


def _coverage_lines(coverage: Mapping[str, Mapping[float, float]]) -> list[str]:
    """Return the shares of errors inside the conformal intervals."""
    stated = sorted({level for levels in coverage.values() for level in levels})
    rows = [["inside conformal intervals of", *(f"{100 * level:g} %" for level in stated)]]
    names = {name: what for name, (what, _) in LABEL.items()} | {"energy": "energy", "atoms": "force vector"}
    for name, levels in coverage.items():
        rows.append([names[name], *(f"{100 * levels[x]:.1f}" if x in levels else "–" for x in stated)])
    return format_table(rows)


def comparison_rows(evaluations: Mapping[str, Mapping[str, Evaluation]]) -> list[dict[str, Any]]:
    """Return one row a model and set: errors [meV, meV/Å], and of the forces how honest σ is.

    Args:
        evaluations: by model, then by set.
    """
    rows = []
    for model, sets in evaluations.items():
        for name, found in sets.items():
            reports, detection = found.reports(), found.detection()
            row: dict[str, Any] = {"model": model, "set": name, "samples": found.n_samples, "frames": found.n_frames}
            row |= {"energy_rmse_meV": 1e3 * found.total_energy_rmse}
            if "energy" in reports:
                row["energy_z2"] = reports["energy"].z2
            if "forces" in reports:
                r = reports["forces"]
                row |= {
                    "forces_rmse_meV_A": 1e3 * r.rmse,
                    "forces_nll": r.nll,
                    "forces_crps_meV_A": 1e3 * r.crps,
                    "forces_z2": r.z2,
                    "forces_z2_low": r.intervals["z2"][0],
                    "forces_z2_high": r.intervals["z2"][1],
                    "forces_area": r.miscalibration_area,
                    "forces_rll_percent": r.rll,
                    "auroc_worst_5_percent": detection["auroc"],
                }
            rows.append({k: v if isinstance(v, str | int) else round(float(v), 4) for k, v in row.items()})
    return rows


def comparison_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return the rows of :func:`comparison_rows` as text, a block a set."""
    heads = {
        "samples": "K", "frames": "frames", "energy_rmse_meV": "E RMSE [meV]", "energy_z2": "z² of E",
        "forces_rmse_meV_A": "F RMSE [meV/Å]", "forces_nll": "NLL",
        "forces_crps_meV_A": "CRPS [meV/Å]", "forces_z2": "z²", "forces_area": "area",
        "forces_rll_percent": "RLL %", "auroc_worst_5_percent": "AUROC",
    }  # fmt: skip
    lines: list[str] = []
    for name in dict.fromkeys(row["set"] for row in rows):
        chosen = [row for row in rows if row["set"] == name]
        keys = [key for key in heads if any(key in row for row in chosen)]
        table = [[name, *(heads[key] for key in keys)]]
        table += [[row["model"], *(_short(row[key]) if key in row else "–" for key in keys)] for row in chosen]
        lines += [*format_table(table), ""]
    return "\n".join(lines).rstrip()


def _short(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"


def ranking_csv(flags: Flags, path: str | Path) -> Path:
    """Write all frames, most uncertain first, with every criterion, and whether they are flagged."""
    path, stream = Path(path), io.StringIO(newline="")
    writer = csv.writer(stream)
    names = [f"sigma_{name}" for name in CRITERIA]
    writer.writerow(["rank", "frame", "source", *names, "flagged"])
    for rank, index in enumerate(flags.ranking):
        frame = flags.frames[index]
        values = [f"{frame.info[name]:.6g}" for name in names]
        flagged = int(flags.values[index] > flags.threshold)
        writer.writerow([rank + 1, int(index), frame.info["origin"], *values, flagged])
    write_text(path, stream.getvalue())
    return path


def describe_model(model: TrainedModel) -> str:
    """Return what a model knows: elements, shape, what is dropped, data, calibration."""
    provenance = model.provenance
    n_weights = sum(p.numel() for p in model.potential.parameters())
    data = provenance.get("training_set", {})
    lines = [
        f"forcedrop {provenance.get('forcedrop', '?')} model of {provenance.get('date', '?')}",
        f"elements: {' '.join(chemical_symbols[z] for z in model.elements)}; cutoff {model.cutoff} Å",
        f"network: {describe_network(model.potential)}, {n_weights} weights",
        *describe_functions(model),
        f"trained on {data.get('frames', '?')} frames, {data.get('atoms', '?')} atoms (sha256 {data.get('hash', '?')[:12]})",
    ]
    shortest = data.get("shortest_distance", {})
    if shortest:
        lines.append("shortest distances [Å]: " + ", ".join(f"{k} {v:.2f}" for k, v in shortest.items()))
    lines += describe_zero(provenance.get("isolated_energies", {}))
    lines.append(describe_validation(provenance))
    if model.calibration is None:
        lines.append("not calibrated")
    else:
        c = model.calibration
        own = ", ".join(f"{name} {value:.2f}" for name, value in c.scales.items())
        lines.append(
            f"calibration: {c.sentence()} of {c.n_samples} samples, on {c.n_frames} frames; then on their own: {own}"
        )
        for name, unit in CRITERIA.items():
            median, high = c.threshold(name, 0.5), c.threshold(name, 0.95)
            lines.append(f"  {name} σ ({MEANING[name]}) there: median {median:.4g}, 95 % below {high:.4g} {unit}")
    return "\n".join(lines)


def describe_validation(provenance: Mapping[str, Any]) -> str:
    """Return the errors on the frames that chose epoch and functions, of the model as it is in the file."""
    found = provenance.get("validation")
    if found:
        of = f"mean of {found['functions']} functions" if found["functions"] else "the network"
        errors = [
            f"{what} {found[key]:.{digits}f} {unit}"
            for what, key, unit, digits in (
                ("forces", "forces_meV_A", "meV/Å", 1),
                ("energy", "energy_meV_atom", "meV/atom", 2),
                ("stress", "stress_meV_A3", "meV/Å³", 2),
            )
            if found.get(key) is not None
        ]
        return (
            f"validation RMSE of this model ({of}; {found['frames']} frames, by which epoch and functions were chosen): "
            + (", ".join(errors) or "no labels")
        )
    last = provenance.get("last_epoch")
    if not last:
        return "validation RMSE: unknown"
    return (
        "validation RMSE in the last epoch of training, not of this model, whose readouts were found afterwards: "
        f"forces {last['val_forces_meV_A']:.1f} meV/Å, energy {last['val_energy_meV_atom']:.2f} meV/atom"
    )


def describe_zero(about: Mapping[str, Any]) -> list[str]:
    """Return where energies are counted from, and which compositions have one that means something."""
    if "origin" not in about:
        return []
    lines = [f"isolated-atom energies: {about['origin']}"]
    compositions = about.get("compositions")
    if compositions:
        names = ", ".join(formula(known) for known in compositions)
        lines.append(
            f"energies mean something for {names} and combinations of them only: no others are determined by the training data"
        )
    elif compositions is not None:
        lines.append("energies mean nothing, only their differences at one composition do: no training frame had one")
    return lines


def describe_network(potential: EnergyModel) -> str:
    """Return the kind of a network and its shape."""
    if potential.kind == "ensemble":
        members: Any = potential
        return f"deep ensemble of {len(members.each())}: {describe_network(members.each()[0])}"
    values = {name: value for name, value in potential.settings().items() if name != "cutoff"}
    return f"{potential.kind} (" + ", ".join(f"{name} {value}" for name, value in values.items()) + ")"


def describe_functions(model: TrainedModel) -> list[str]:
    """Return what is dropped, where, at which rate, how many functions there are and how they were found."""
    about, potential = model.uncertainty, model.potential
    rates = {name: rate for name, rate in model.provenance.get("training_rates", {}).items() if rate}
    trained = "dropout in training: " + (", ".join(f"{name} p={rate:g}" for name, rate in rates.items()) or "none")
    method = about.get("method", "none")
    if method == "exact_dropout":
        own = "weights of each element" if about["sets"] == len(potential.elements) else "weights shared by elements"
        line = (
            f"{potential.n_functions} functions by exact dropout: of the {about['weights']} weights that energies are read with "
            f"({potential.n_features} features, {own}), each function drops its own p={about['rate']:g} and has the others "
            f"solved in closed form from {about['frames']} training frames, prior λ={about['prior']:g}, "
            f"{about['draw']:g} × a draw of the posterior given the mask"
        )
        if about.get("cuts"):
            line += f"; with {about['cuts']} sets of cut radii of pairs of elements (edge dropout)"
    elif method == "posterior":
        line = f"{potential.n_functions} functions: draws from the posterior of the weights that energies are read with"
    elif method == "heads":
        line = f"{potential.n_functions} functions: a shallow ensemble of heads that learned side by side"
    elif method == "masks":
        sites = ", ".join(f"{name} p={site.p:g}" for name, site in potential.inner_sites.items() if site.p)
        line = f"{model.n_functions} functions: masks that were trained, of {sites}"
    elif method == "ensemble":
        line = f"{potential.n_functions} functions: the members of a deep ensemble"
    else:
        line = "no functions: this model cannot give error bars (`forcedrop fill` finds functions)"
    return [trained, line]


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


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: first column to the left, the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
