"""Crystals of the mlearn set (Zuo et al. 2020): train on its training file, errors on its test file, for Cu, Li and Si.

    python benchmarks/mlearn.py train Cu      # examples/configs/copper.yaml, also for Li; silicon.yaml for Si
    python benchmarks/mlearn.py labels Cu     # do the labelled stresses fit the labelled energies?
    python benchmarks/mlearn.py test Cu       # once, at the very end: adds to results/mlearn.json
    python benchmarks/mlearn.py carry Si      # then: σ calibrated on bulk frames alone, judged on surfaces and vacancies

Mean absolute errors of energy [meV/atom] and force components [eV/Å], of the mean over the functions and of the plain network
(the same for exact dropout), beside published ones. The data are not part of the project; ``--data`` says where they are.
Trainings resume.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from ase import units
from common import environment, read_results, with_changes, write_results

from forcedrop.evaluation import evaluate, predict_frames
from forcedrop.metrics import mean_z2
from forcedrop.model import load_model
from forcedrop.structures import read_frames
from forcedrop.training import TrainConfig, load_config, parse_config, train
from forcedrop.uncertainty.calibrate import calibrate

ROOT = Path(__file__).resolve().parent.parent
RECIPES: dict[str, tuple[str, dict[str, dict[str, float]]]] = {
    "Cu": ("copper.yaml", {}),
    "Li": ("copper.yaml", {"model": {"cutoff": 5.0}, "loss": {"stress": 0.1}}),
    "Si": ("silicon.yaml", {}),
}
"""Training file, and what differs."""
BULK = ("AIMD-NVT", "Elastic")
"""Groups (``config_type``) of crystals without surface and vacancy."""
SAMPLES = 64
NOISE = 2e-3
"""Of the labels [eV/Å]: what forces have that symmetry forbids, in slabs; σ knows nothing of it."""
PERFECT, VACUUM = 0.06, 22.5
"""Largest force RMS [eV/Å] of a perfect crystal, and largest volume per atom [Å³] of one without vacuum."""
PUBLISHED = {
    "Cu": {"GAP": (0.46, 0.01), "MTP": (0.41, 0.01)},
    "Li": {"GAP": (0.49, 0.01), "MTP": (0.49, 0.01)},
    "Si": {"GAP": (2.91, 0.07), "MTP": (2.21, 0.06)},
}
"""Energy [meV/atom] and force [eV/Å] MAE on the same test files: Zuo et al., J. Phys. Chem. A 124, 731 (2020)."""


def main() -> None:
    """Train or test one element."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "labels", "test", "carry"))
    parser.add_argument("element", choices=list(RECIPES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mlearn")
    arguments = parser.parse_args()
    config = recipe(arguments.element, arguments.data)
    if arguments.what == "train":
        train(config, resume=(config.output / "last.pt").exists())
    elif arguments.what == "labels":
        labels(arguments.element, arguments.data)
    elif arguments.what == "carry":
        carry(arguments.element, config, arguments.data)
    else:
        test(arguments.element, config, arguments.data)


def recipe(element: str, data: Path) -> TrainConfig:
    """Return the shipped recipe with the element's own training file."""
    file, changes = RECIPES[element]
    values = load_config(ROOT / "examples" / "configs" / file).model_dump(mode="json", exclude_unset=True)
    values = with_changes(values, changes)
    values["data"]["train"] = [str(data / f"{element}_train.xyz")]
    return parse_config({**values, "output": str(ROOT / "runs" / "mlearn" / element)})


def labels(element: str, data: Path) -> None:
    """Compare dE/dε of perfect crystals stretched along one axis with their stress, and add both to the results.

    A polynomial through the energies is differentiated at ε = 0, where another goes through the stresses. A difference is Pulay
    stress: with it, no potential can have both right.
    """
    frames = [f for f in read_frames(data / f"{element}_train.xyz") if f.forces is not None and f.stress is not None]
    still = [f for f in frames if np.sqrt(np.mean(f.forces**2)) < PERFECT and f.volume / len(f) < VACUUM]
    size = max({len(f) for f in still}, key=lambda n: sum(len(f) == n for f in still))
    still = [f for f in still if len(f) == size]
    lengths = np.array([np.linalg.norm(f.cell, axis=1) for f in still])
    strain = lengths / np.median(lengths, axis=0) - 1
    straight = np.array([np.abs(f.cell @ f.cell.T - np.diag(np.diag(f.cell @ f.cell.T))).max() < 1e-4 for f in still])
    found = []
    for axis in range(3):
        chosen = straight & (np.abs(np.delete(strain, axis, axis=1)).max(axis=1) < 1e-3)
        x = strain[chosen, axis]
        degree = min(5, len(x) // 2)
        energy = np.polyfit(x, [f.energy for f, c in zip(still, chosen, strict=True) if c], degree)
        stress = np.polyfit(x, [f.stress[axis] for f, c in zip(still, chosen, strict=True) if c], degree - 1)
        volume = float(np.prod(np.median(lengths, axis=0)))
        found.append((energy[-2] / volume / units.GPa, stress[-1] / units.GPa))
    row = dict(zip(("from_energies_GPa", "labelled_GPa"), np.round(np.mean(found, axis=0), 2).tolist(), strict=True))
    print(element, row)
    results = read_results("mlearn")
    write_results("mlearn", {**results, "stress_at_rest": results.get("stress_at_rest", {}) | {element: row}})


def carry(element: str, config: TrainConfig, data: Path) -> None:
    """Calibrate on the bulk frames held out for it, judge on surfaces and vacancies held out or in the test file."""
    model = load_model(config.output / "model.pt")
    held = {Path(source).name for source in json.loads((config.output / "split.json").read_text())["calibration"]}
    frames = [f for f in read_frames(data / f"{element}_train.xyz") if Path(f.source).name in held]
    if len(frames) != len(held):
        raise ValueError(
            f"{config.output / 'split.json'} names {len(held)} frames, found {len(frames)}: of other data?"
        )
    bulk = [f for f in frames if f.info["config_type"] in BULK]
    others = [f for f in [*frames, *read_frames(data / f"{element}_test.xyz")] if f.info["config_type"] not in BULK]
    model.calibration = calibrate(model.potential, model.graphs(bulk))
    row: dict[str, Any] = {"calibration_frames": len(bulk), "calibration": model.calibration.sentence()}
    for name in sorted({f.info["config_type"] for f in others}):
        chosen = [f for f in others if f.info["config_type"] == name]
        found = evaluate(model, chosen, n_samples=SAMPLES)
        report = found.reports()["forces"]
        with_noise = np.hypot(found.sigma["forces"], NOISE)
        row[name] = {
            "frames": len(chosen),
            "forces_rmse_eV_A": round(report.rmse, 4),
            "forces_z2": round(report.z2, 3),
            "forces_z2_interval": [round(x, 3) for x in report.intervals["z2"]],
            "forces_z2_with_label_noise": round(mean_z2(found.error["forces"], with_noise), 3),
        }
    print(element, row)
    results = read_results("mlearn")
    write_results("mlearn", results | {"carry": results.get("carry", {}) | {element: row}})


def test(element: str, config: TrainConfig, data: Path) -> None:
    """Measure on the test file and add to the results."""
    model = load_model(config.output / "model.pt")
    frames = read_frames(data / f"{element}_test.xyz")
    predictions = predict_frames(model, frames)
    row: dict[str, Any] = {}
    for kind in ("mean", "plain"):
        values = [getattr(p, kind) for p in predictions]
        energy = [(v["energy"] - f.energy) / len(f) for v, f in zip(values, frames, strict=True)]
        forces = np.concatenate([np.ravel(v["forces"] - f.forces) for v, f in zip(values, frames, strict=True)])
        row[f"energy_mae_{kind}_meV_atom"] = round(1e3 * float(np.mean(np.abs(energy))), 3)
        row[f"forces_mae_{kind}_eV_A"] = round(float(np.mean(np.abs(forces))), 4)
        row[f"forces_rmse_{kind}_eV_A"] = round(float(np.sqrt(np.mean(forces**2))), 4)
    row["training_minutes"] = round(model.provenance["training_seconds"] / 60, 1)
    row["published_energy_forces_mae"] = PUBLISHED[element]
    row["last_epoch_validation"] = model.provenance["last_epoch"]
    print(element, row)
    results = read_results("mlearn") | {element: row}
    write_results("mlearn", results | {"environment": environment(config.seed)})


if __name__ == "__main__":
    main()
