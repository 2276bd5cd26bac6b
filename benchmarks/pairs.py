r"""What do pairs below the network do to accuracy, near the data and far from it?

    python benchmarks/pairs.py                    # all problems: trains what is missing, results/pairs.json; resumes
    python benchmarks/pairs.py ethanol silicon    # some
    python benchmarks/pairs.py --sigma            # functions and error bars of the networks that are there
    python benchmarks/pairs.py --prior runs/demo  # what the width of the regression's prior does to the demo's network

Trainings of each split that differ in one setting, ``model.repulsion``: with it (the default) the repulsion of GFN2-xTB and
the attraction of bonds lie below the network (``forcedrop/potential/repulsion.py``), without it nothing does; of silicon
a third one with a wall inside alone (``model.bonds: false``). Problems, splits
and recipes are those of ``dropout.py``; figures are of the network as its training leaves it, before the regression of its
readouts. Copper and lithium: mlearn, 40 epochs of the small network, judged on the test set that comes with them.

``dimers`` of every trained ethanol network: whether the energy of each pair of its elements rises monotonically from its minimum
down to 0.2 Å, with a model that has seen ethanol at 300 K and nothing else.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import dropout
import numpy as np
import torch
from ase import Atoms
from common import environment, read_results, with_changes, write_results

from forcedrop.derive import derive
from forcedrop.evaluation import evaluate
from forcedrop.graph import batch_graphs
from forcedrop.model import TrainedModel, load_model
from forcedrop.report import comparison_rows
from forcedrop.structures import Frame, read_frames, write_frames
from forcedrop.training import load_config, parse_config, train
from forcedrop.uncertainty.calibrate import calibrate
from forcedrop.uncertainty.equations import refit, solve_equations
from forcedrop.uncertainty.exact_dropout import ExactDropout
from forcedrop.uncertainty.method import Labels, find_functions

RUNS = dropout.ROOT / "runs" / "pairs"
METALS = {"copper": "Cu", "lithium": "Li"}
SEEDS = {"ethanol": 3, "demo": 2, "3bpa": 2, "silicon": 2, "copper": 2, "lithium": 2}
VARIANTS = {
    "pairs below": ("pairs", {"repulsion": True, "bonds": True}),
    "a wall inside": ("inside", {"repulsion": True, "bonds": False}),
    "nothing below": ("nothing", {"repulsion": False}),
}
"""Where the trainings are, and the settings in which they differ."""


def main() -> None:
    """Train what is missing, judge, and write each row at once."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", nargs="*", help="some problems, all by default")
    parser.add_argument("--sigma", action="store_true", help="judge the error bars of what is trained")
    parser.add_argument("--prior", type=Path, help="folder of a training on data/ethanol_300K.h5")
    arguments = parser.parse_args()
    if arguments.prior is not None:
        priors(arguments.prior)
        return
    problems = arguments.problems or list(SEEDS)
    torch.set_num_threads(1)
    for seed in range(max(SEEDS.values())):
        for problem in problems:
            if seed < SEEDS[problem]:
                for name in VARIANTS:
                    if name != "a wall inside" or problem == "silicon":
                        (honesty if arguments.sigma else judge)(problem, seed, name)
    summary()


def priors(folder: Path) -> None:
    """Judge a network near and far after regressions whose prior is 1 to 10⁴ times as wide as that of the trained readouts."""
    parts = json.loads((folder / "split.json").read_text(encoding="utf-8"))
    every = read_frames(dropout.ROOT / "data" / "ethanol_300K.h5")
    sets = {what: [every[int(source.rpartition("#")[2])] for source in sources] for what, sources in parts.items()}
    sets |= {f"{t} K": read_frames(dropout.ROOT / "data" / f"ethanol_{t}K.h5") for t in (600, 1200)}
    model = load_model(folder / "model.pt")
    model.potential.forget_functions()
    labels = Labels(model.graphs(sets["train"]), model.graphs(sets["validation"]))
    equations = solve_equations(model.potential, labels, frames=300, held=False)
    judged = [what for what in sets if what not in ("train", "validation")]
    rows = [{"width": 0.0, **{what: errors(model, sets[what]) for what in judged}}]
    for width in (1.0, 1e2, 1e4):
        found = refit(model.potential, labels, replace(equations, prior=equations.prior / width))
        site: Any = model.potential.correction
        model.potential.set_functions(found.reshape(site.weight.shape), None)
        rows.append({"width": width, **{what: errors(model, sets[what]) for what in judged}})
        model.potential.set_functions(None, None)
    for row in rows:
        print(row, flush=True)
    write_results("pairs", read_results("pairs") | {"prior": rows, "environment": environment(0)})


def honesty(problem: str, seed: int, name: str) -> None:
    """Fill and calibrate a network that is there, as by default, and add what its error bars are worth on every judged set."""
    rows = read_results("pairs").get("sigma", [])
    known = any((row["problem"], row["seed"], row["model"]) == (problem, seed, name) for row in rows)
    path = folder_of(problem, seed, name) / "model.pt"
    frames = split(problem, seed) if path.exists() else {}
    if known or "calibration" not in frames:
        return
    model = load_model(path)
    method = ExactDropout()
    labels = Labels(model.graphs(frames["train"]), model.graphs(frames["validation"]))
    model.uncertainty = find_functions(model.potential, method, labels)
    model.calibration = calibrate(model.potential, model.graphs(frames["calibration"]), seed=model.seed)
    found: dict[str, Any] = {"problem": problem, "seed": seed, "model": name}
    for what, own in frames.items():
        if what not in ("train", "validation", "calibration"):
            (row,) = comparison_rows({name: {what: evaluate(model, own, n_samples=64)}})
            found[what] = {key: value for key, value in row.items() if isinstance(value, float)}
    print(found, flush=True)
    results = read_results("pairs")
    write_results("pairs", results | {"sigma": [*results.get("sigma", []), found], "environment": environment(0)})


def split(problem: str, seed: int) -> dict[str, list[Frame]]:
    """Return the frames of a problem, as ``dropout.split``."""
    if problem not in METALS:
        return dropout.split(problem, seed)
    symbol = METALS[problem]
    frames = [f for f in read_frames(dropout.SHARED / "mlearn" / f"{symbol}_train.xyz") if len(f) > 1]
    order = np.random.default_rng(300 + seed).permutation(len(frames))
    parts = {"train": order[30:], "validation": order[:30]}
    sets = {name: [frames[i] for i in chosen] for name, chosen in parts.items()}
    return sets | {"test": read_frames(dropout.SHARED / "mlearn" / f"{symbol}_test.xyz")}


def judge(problem: str, seed: int, name: str) -> None:
    """Train a network, unless it is there, and add its row."""
    rows = read_results("pairs").get("rows", [])
    if any((row["problem"], row["seed"], row["model"]) == (problem, seed, name) for row in rows):
        return
    frames = split(problem, seed)
    model = trained(problem, seed, name, frames)
    row: dict[str, Any] = {"problem": problem, "seed": seed, "model": name}
    for what, own in frames.items():
        if what not in ("train", "calibration"):
            row[what] = errors(model, own)
    if problem in ("ethanol", "demo"):
        row["dimers"] = {pair: rises(model, pair) for pair in ("HH", "CH", "OH", "CC", "CO", "OO")}
    row["minutes"] = round(model.provenance["training_seconds"] / 60, 2)
    print(row, flush=True)
    results = read_results("pairs")
    write_results("pairs", results | {"rows": [*results.get("rows", []), row], "environment": environment(0)})


def folder_of(problem: str, seed: int, name: str) -> Path:
    """Return where the training of a problem is."""
    return RUNS / problem / VARIANTS[name][0] / str(seed)


def trained(problem: str, seed: int, name: str, frames: dict[str, list[Frame]]) -> TrainedModel:
    """Return the network of a problem; trainings that are there are not repeated."""
    folder = folder_of(problem, seed, name)
    if not (folder / "model.pt").exists():
        recipe = dropout.PROBLEMS["silicon" if problem in METALS else problem]
        data = RUNS / problem / f"data_{seed}"
        for part in ("train", "validation"):
            if not (data / f"{part}.h5").exists():
                data.mkdir(parents=True, exist_ok=True)
                write_frames(data / f"{part}.h5", frames[part])
        values = load_config(dropout.ROOT / "examples" / "configs" / f"{recipe.recipe}.yaml").model_dump(
            mode="json", exclude_unset=True
        )
        values = with_changes(values, {"uncertainty": {"method": "none"}} | recipe.changes)
        values = with_changes(values, {"model": VARIANTS[name][1]})
        values["data"] = {
            "train": [str(data / "train.h5")],
            "validation": [str(data / "validation.h5")],
            "calibration_fraction": 0.0,
            "skip_bad": True,  # copies of training frames are not to validate on
            **({"isolated_atoms": str(recipe.atoms)} if recipe.atoms else {}),
        }
        values |= {"seed": seed, "output": str(folder)}
        train(parse_config(values), resume=(folder / "last.pt").exists())
    return load_model(folder / "model.pt")


def errors(model: TrainedModel, frames: list[Frame]) -> dict[str, float]:
    """Return root mean square errors of the plain network: forces [meV/Å], energy [meV per frame]."""
    forces, energies = [], []
    for graph in model.graphs(frames):
        found = derive(model.potential, batch_graphs([graph]))
        forces.append((found.forces - graph.forces).double().square().flatten())
        energies.append(float(found.energy[0] - graph.energy[0]) ** 2)
    return {
        "forces_meV_A": round(1e3 * float(torch.cat(forces).mean().sqrt()), 2),
        "energy_meV": round(1e3 * float(np.sqrt(np.mean(energies))), 2),
    }


def rises(model: TrainedModel, pair: str) -> bool:
    """Say whether the energy of two atoms rises all the way from its minimum down to 0.2 Å."""
    distances = np.linspace(0.2, 3.9, 75)
    images = [Frame.from_atoms(Atoms(pair, positions=[[0, 0, 0], [0, 0, r]])) for r in distances]
    energies = derive(model.potential, batch_graphs(model.graphs(images))).energy.numpy()
    return bool((np.diff(energies[: int(energies.argmin()) + 1]) < 0).all() and energies.argmin() > 0)


def summary() -> None:
    """Print and keep the ratio of errors, pairs below over nothing below, mean over the seeds."""
    results = read_results("pairs")
    ratios: dict[str, dict[str, dict[str, list[float]]]] = {}
    by_model = {(row["problem"], row["seed"], row["model"]): row for row in results.get("rows", [])}
    for (problem, seed, name), row in by_model.items():
        other = by_model.get((problem, seed, "nothing below"))
        if name == "pairs below" and other is not None:
            for what, own in row.items():
                if isinstance(own, dict) and "forces_meV_A" in own:
                    found = ratios.setdefault(problem, {}).setdefault(what, {})
                    for key, value in own.items():
                        found.setdefault(key, []).append(value / other[what][key])
    means = {
        problem: {
            what: {key: round(float(np.exp(np.mean(np.log(x)))), 3) for key, x in found.items()}
            for what, found in sets.items()
        }
        for problem, sets in ratios.items()
    }
    for problem, sets in means.items():
        for what, found in sets.items():
            print(f"{problem:10} {what:12} forces {found['forces_meV_A']:.3f}  energy {found['energy_meV']:.3f}")
    write_results("pairs", results | {"ratio": means})


if __name__ == "__main__":
    main()
