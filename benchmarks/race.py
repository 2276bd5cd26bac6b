"""forcedrop against MACE: both learn the same 450 frames of 3BPA (300 K); errors on the same 50 frames against wall time.

    python benchmarks/race.py split                                  # once
    python benchmarks/race.py mace --program PATH/mace_run_train     # of an environment of its own with mace-torch
    python benchmarks/race.py forcedrop plain                        # the recipe as shipped
    python benchmarks/race.py forcedrop dropout                      # with trained masks: update 0.1, readout 0.3
    python benchmarks/race.py forcedrop no_decay                     # without weight decay: see holes.py
    python benchmarks/race.py collect                                # table, plot, results/race.json
    python benchmarks/race.py test                                   # once, at the very end: the published test sets

MACE: 64 channels, L=0, two layers, r_max 5 Å, batch 5, float32, its recommended recipe (Adam with AMSGrad at 0.01, EMA 0.99,
energy and force weights 1 and 100, then stage two with 1000 and 100 for the last quarter).
forcedrop: ``examples/configs/3bpa.yaml``. Everything runs on one thread; times include the validation after each epoch. Trainings
resume where they stopped.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import subprocess
from datetime import datetime
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from ase.io import write
from common import RESULTS, environment, read_results, write_results

from forcedrop.derive import derive
from forcedrop.evaluation import evaluate
from forcedrop.graph import batch_graphs
from forcedrop.metrics import rmse
from forcedrop.model import TrainedModel, load_model
from forcedrop.structures import Frame, LabelKeys, read_frames
from forcedrop.training import TrainConfig, load_config, parse_config, train
from forcedrop.uncertainty.calibrate import calibrate

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "race"
SEED = 0
MINUTES = (1, 3, 10, 30, 60)
DROPOUT = {"update": 0.1, "readout": 0.3}
NAMES = {
    "mace": "MACE, 64 channels, L=0",
    "plain": "forcedrop",
    "no_decay": "forcedrop, no weight decay",
    "dropout": "forcedrop, dropout, no decay (mean of 4)",
}
COLOURS = {"mace": "tab:grey", "plain": "tab:blue", "no_decay": "tab:cyan", "dropout": "tab:orange"}
MACE_EPOCHS, MACE_STAGE_TWO = 108, 80
"""What an hour takes on one core of the machine of the committed results."""


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "3bpa")
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("split", help="450 and 50 frames, the same for all")
    mace = parts.add_parser("mace", help="train MACE for an hour")
    mace.add_argument("--program", type=Path, required=True, help="mace_run_train of its own environment")
    own = parts.add_parser("forcedrop", help="train forcedrop")
    own.add_argument("kind", choices=("plain", "dropout", "no_decay"))
    parts.add_parser("collect", help="table, plot and results/race.json from the logs")
    judge = parts.add_parser("test", help="errors on the published test sets; once, at the very end")
    judge.add_argument("kinds", nargs="*", default=["plain", "dropout"], help="which trainings")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "split":
        split(arguments.data)
    elif arguments.part == "mace":
        run_mace(arguments.program, arguments.data)
    elif arguments.part == "forcedrop":
        train(race_config(arguments.kind, arguments.data), resume=(RUNS / arguments.kind / "last.pt").exists())
    elif arguments.part == "collect":
        collect()
    else:
        test(arguments.data, arguments.kinds)


def split(data: Path) -> None:
    """Write ``train.xyz`` (450) and ``validation.xyz`` (50) without cell, labels named as MACE expects them."""
    frames = read_frames(data / "train_300K.xyz")
    order = np.random.default_rng(SEED).permutation(len(frames))
    held = set(order[:50].tolist())
    RUNS.mkdir(parents=True, exist_ok=True)
    for name, inside in (("train", False), ("validation", True)):
        images = []
        for index, frame in enumerate(frames):
            if (index in held) is inside:
                image = Atoms(frame.z, frame.pos, info={"REF_energy": frame.energy})
                image.set_array("REF_forces", frame.forces)
                images.append(image)
        write(RUNS / f"{name}.xyz", images)


def isolated(data: Path) -> dict[str, float]:
    """Return the isolated-atom energies [eV] by symbol."""
    return {
        chemical_symbols[int(frame.z[0])]: float(frame.energy or 0) for frame in read_frames(data / "iso_atoms.xyz")
    }


def run_mace(program: Path, data: Path) -> None:
    """Train MACE through its own program; its log goes to ``mace.log``, with the time of each validation."""
    energies = {int(frame.z[0]): frame.energy for frame in read_frames(data / "iso_atoms.xyz")}
    options = {
        "name": "mace", "work_dir": "mace", "model": "MACE", "num_channels": 64, "max_L": 0, "num_interactions": 2,
        "r_max": 5.0, "correlation": 3, "max_ell": 3, "train_file": "train.xyz", "valid_file": "validation.xyz",
        "energy_key": "REF_energy", "forces_key": "REF_forces", "E0s": str(energies), "batch_size": 5,
        "valid_batch_size": 10, "max_num_epochs": MACE_EPOCHS, "start_stage_two": MACE_STAGE_TWO, "ema_decay": 0.99,
        "lr": 0.01, "device": "cpu", "default_dtype": "float32", "seed": SEED, "error_table": "TotalRMSE",
        "eval_interval": 1,
    }  # fmt: skip
    flags = [f"--{name}={value}" for name, value in options.items()]
    flags += ["--stage_two", "--ema", "--amsgrad", "--restart_latest"]
    one = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with (RUNS / "mace.log").open("a") as log:
        subprocess.run([program, *flags], cwd=RUNS, env=one, stdout=log, stderr=subprocess.STDOUT, check=True)


def race_config(kind: str, data: Path) -> TrainConfig:
    """Return the shipped recipe on the race's split, as it is or with dropout."""
    recipe = load_config(ROOT / "examples" / "configs" / "3bpa.yaml").model_dump(mode="json", exclude_unset=True)
    recipe["data"] = {
        "train": [str(RUNS / "train.xyz")],
        "validation": [str(RUNS / "validation.xyz")],
        "calibration_fraction": 0.0,
        "isolated_atoms": isolated(data),
        "energy_key": "REF_energy",
        "forces_key": "REF_forces",
    }
    if kind == "dropout":
        recipe |= {"dropout": DROPOUT, "uncertainty": {"method": "masks"}}
    if kind == "no_decay":
        recipe |= {"optimiser": {"weight_decay": 0.0}}
    return parse_config({**recipe, "output": str(RUNS / kind), "seed": SEED})


def curve(kind: str) -> list[dict[str, float]]:
    """Return seconds, force and energy RMSE [meV/Å, meV] of every validation of one training."""
    if kind != "mace":
        with (RUNS / kind / "log.csv").open(newline="") as stream:
            columns = {"seconds": "seconds", "forces": "val_forces_meV_A", "energy": "val_energy_meV"}
            return [{k: float(row[v]) for k, v in columns.items()} for row in csv.DictReader(stream)]
    text = (RUNS / "mace.log").read_text()
    stamp = r"^(\S+ \S+) INFO: "
    start = datetime.fromisoformat(re.findall(stamp + "Started training", text, re.MULTILINE)[0])
    rows = re.findall(stamp + r"Epoch \d+: .*RMSE_E= *([\d.]+) meV, RMSE_F= *([\d.]+) meV", text, re.MULTILINE)
    return [
        {"seconds": (datetime.fromisoformat(t) - start).total_seconds(), "forces": float(f), "energy": float(e)}
        for t, e, f in rows
    ]


def at(rows: list[dict[str, float]], minutes: float) -> dict[str, float] | None:
    """Return the last validation before a time; None if there was none yet, or the training had ended long before."""
    before = [row for row in rows if row["seconds"] <= 60 * minutes]
    return before[-1] if before else None


def collect() -> None:
    """Print the table, draw the curves, write the results."""
    curves = {kind: curve(kind) for kind in NAMES if _log(kind).exists()}
    points = {kind: {str(m): at(rows, m) for m in MINUTES} for kind, rows in curves.items()}
    ratios: dict[str, dict[str, float]] = {}
    for kind in set(points) - {"mace"}:
        for minutes, row in points[kind].items():
            reference = points.get("mace", {}).get(minutes)
            if row and reference:
                ratios.setdefault(kind, {})[minutes] = round(row["forces"] / reference["forces"], 3)
    own = [kind for kind in curves if (RUNS / kind / "model.pt").exists()]
    print("validation force / energy RMSE [meV/Å / meV] after minutes: " + ", ".join(map(str, MINUTES)))
    for kind, found in points.items():
        print(f"{kind:8}", "  ".join(f"{v['forces']:.1f} / {v['energy']:.1f}" if v else "–" for v in found.values()))
    print("force RMSE over MACE's:", ratios)
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, key, label in zip(
        panels, ("forces", "energy"), ("force RMSE [meV/Å]", "energy RMSE [meV]"), strict=True
    ):
        for kind, rows in curves.items():
            panel.plot(
                [r["seconds"] / 60 for r in rows], [r[key] for r in rows], color=COLOURS[kind], label=NAMES[kind]
            )
        panel.set(xscale="log", yscale="log", xlabel="minutes of training on one CPU core", ylabel=label)
        panel.grid(alpha=0.3, which="both")
    panels[0].legend(fontsize=8, loc="lower left")
    figure.savefig(RESULTS / "race.png", dpi=130)
    results = read_results("race") | {
        "environment": environment(SEED),
        "dropout": {
            kind: json.loads(load_model(RUNS / kind / "model.pt").provenance["settings"])["dropout"] for kind in own
        },
        "split": "450 frames to train on, 50 to validate, seed 0",
        "validation": points,
        "force_rmse_over_mace": ratios,
        "final": {kind: rows[-1] for kind, rows in curves.items()},
        "curves": {kind: [[round(v, 2) for v in row.values()] for row in rows] for kind, rows in curves.items()},
    }
    write_results("race", results)


def _log(kind: str) -> Path:
    return RUNS / "mace.log" if kind == "mace" else RUNS / kind / "log.csv"


def test(data: Path, kinds: list[str]) -> None:
    """Add the errors of trainings on the published test sets, and how honest σ is; without masks on every fourth frame.

    σ is calibrated here on the 50 validation frames, the only ones that are left.
    """
    results = read_results("race")
    for kind in kinds:
        path = RUNS / kind / "model.pt"
        if not path.exists():
            continue
        model = load_model(path)
        if model.n_functions != 0:
            held = read_frames(RUNS / "validation.xyz", keys=LabelKeys(energy="REF_energy", forces="REF_forces"))
            model.calibration = calibrate(model.potential, model.graphs(held), seed=model.seed)
        for temperature in ("300", "600"):
            frames = read_frames(data / f"test_{temperature}K.xyz")
            row: dict[str, Any] = sampled_errors(model, frames) if kind == "dropout" else plain_errors(model, frames)
            if model.potential.centred:
                row["sigma"] = sampled_errors(model, frames[::4])
            print(kind, temperature, "K:", row)
            results.setdefault("test", {}).setdefault(kind, {})[f"{temperature} K"] = row
            write_results("race", results)


def plain_errors(model: TrainedModel, frames: list[Frame]) -> dict[str, float]:
    """Return force and energy RMSE [meV/Å, meV] of the plain network."""
    energy, forces = plain_residuals(model, frames)
    return {
        "forces": round(1e3 * rmse(forces), 2),
        "energy": round(1e3 * rmse(energy), 2),
        **without_worst(forces, len(frames)),
    }


def plain_residuals(model: TrainedModel, frames: list[Frame]) -> tuple[np.ndarray, np.ndarray]:
    """Return errors of energies (n,) [eV] and forces (n, 3N) [eV/Å] of the plain pass, on frames of one molecule."""
    graphs, energy, forces = model.graphs(frames), [], []
    for first in range(0, len(graphs), 10):
        batch = batch_graphs(graphs[first : first + 10])
        found = derive(model.potential, batch)
        energy.append((found.energy - batch.energy).numpy())
        forces.append((found.forces - batch.forces).numpy().reshape(batch.num_graphs, -1))
    return np.concatenate(energy), np.concatenate(forces)


def without_worst(error: np.ndarray, n_frames: int) -> dict[str, float]:
    """Return the largest force RMSE of a frame and the RMSE [meV/Å] without the worst 1 % of the frames."""
    frame = np.sort(np.mean(np.square(error.reshape(n_frames, -1)), axis=1))
    kept = frame[: int(0.99 * n_frames)]
    return {
        "forces_worst_frame": round(1e3 * float(frame[-1]) ** 0.5, 2),
        "forces_without_worst_1_percent": round(1e3 * float(kept.mean()) ** 0.5, 2),
    }


def sampled_errors(model: TrainedModel, frames: list[Frame]) -> dict[str, float]:
    """Return the same of the mean over the functions and of the weight-scaled pass, and measures of σ of the forces."""
    found = evaluate(model, frames)
    report, detection = found.reports()["forces"], found.detection()
    n_atoms = len(frames[0])  # all frames are of one molecule
    return {
        "forces": round(1e3 * rmse(found.error["forces"]), 2),
        "energy": round(1e3 * found.total_energy_rmse, 2),
        **without_worst(found.error["forces"], len(frames)),
        "forces_weight_scaled": round(1e3 * found.plain_rmse["forces"], 2),
        "energy_weight_scaled": round(1e3 * n_atoms * found.plain_rmse["energy"], 2),
        "forces_mean_z2": round(report.z2, 3),
        "forces_rll_percent": round(report.rll, 1),
        "forces_miscalibration_area": round(report.miscalibration_area, 4),
        "auroc_worst_5_percent_of_atoms": round(detection["auroc"], 3),
    }


if __name__ == "__main__":
    main()
