r"""Where should σ come from? No dropout, a posterior, exact dropout, edge dropout, trained masks, five networks: six problems.

    python benchmarks/dropout.py train                     # networks, in order of what is needed first; resumes
    python benchmarks/dropout.py train ethanol silicon     # of some problems
    python benchmarks/dropout.py train --members           # the further members of deep ensembles
    python benchmarks/dropout.py judge                     # functions, errors, honesty: results/dropout.json; resumes
    python benchmarks/dropout.py judge --only exact        # variants whose name begins so; =exact: that one
    python benchmarks/dropout.py summary                   # mean over the seeds, as a table

Every seed of a problem is another split and another start. Networks are trained without looking at σ; functions are found from
the frames that trained and from the validation frames, σ is calibrated on a third set, and judged on frames of yet others:

* ``ethanol``: the 260 coldest of 500 frames at 300 K to learn from, judged on cold ones and on the 150 hottest (as
  ``honesty.py``);
* ``demo``: ethanol at 300 K, judged at 600 and 1200 K (``data/``);
* ``3bpa``: a small network (32 channels, 40 epochs, as ``rivals.py``), judged at 300 and 600 K, every eighth frame;
* ``silicon``: crystals, vacancies, surfaces that are solid (mlearn), judged on crystals held out and on the *liquid* never seen;
* ``3bpa_recipe``: ``examples/configs/3bpa.yaml`` as it is shipped, judged at 300, 600 and 1200 K: the final number only.

``forces_rmse`` of the plain network without functions is the row "none". Nothing here is chosen by these tests: p, λ and the
draw of "exact" are chosen on validation frames by the one rule of ``forcedrop/uncertainty/exact_dropout.py``.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.neighborlist import neighbor_list
from common import environment, read_results, with_changes, write_results

from forcedrop.evaluation import Evaluation, evaluate
from forcedrop.model import TrainedModel, committee, load_model
from forcedrop.report import comparison_rows, comparison_table
from forcedrop.structures import Frame, read_frames, write_frames
from forcedrop.training import load_config, parse_config, train
from forcedrop.uncertainty.calibrate import calibrate
from forcedrop.uncertainty.calibration import deviations
from forcedrop.uncertainty.equations import Equations, solve_equations
from forcedrop.uncertainty.exact_dropout import ExactDropout
from forcedrop.uncertainty.method import Labels, Method, find_functions
from forcedrop.uncertainty.posterior import Posterior
from forcedrop.uncertainty.sampling import FramePrediction, predict_graphs

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "dropout"
SHARED = ROOT.parent / "shared" / "data"
SEEDS = 3
MEMBERS = 5
SMALL = {"n_channels": 32, "n_hidden": 32, "l_message": 1}
EVERY = 8


@dataclass(frozen=True)
class Problem:
    """What is learned, by which recipe.

    Attributes:
        recipe: file in ``examples/configs``.
        changes: of it.
        atoms: file of isolated atoms.
        seeds: how many.
    """

    recipe: str
    changes: dict[str, Any]
    atoms: Path | None = None
    seeds: int = SEEDS


PROBLEMS = {
    "ethanol": Problem("ethanol", {"epochs": 80}, ROOT / "data" / "ethanol_atoms.h5"),
    "demo": Problem("ethanol", {}, ROOT / "data" / "ethanol_atoms.h5"),
    "silicon": Problem("silicon", {"model": {**SMALL, "cutoff": 4.5}, "epochs": 40, "loss": {"stress": 0.1}}),
    "3bpa": Problem(
        "3bpa", {"model": SMALL, "epochs": 40, "optimiser": {"weight_decay": 0.02}}, SHARED / "3bpa" / "iso_atoms.xyz"
    ),
    "3bpa_recipe": Problem("3bpa", {}, SHARED / "3bpa" / "iso_atoms.xyz", seeds=1),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "none": {"dropout": {"edge": 0.0}},
    "edge0.1": {"dropout": {"edge": 0.1}},
    "edge0.3": {"dropout": {"edge": 0.3}},
    "masks": {"dropout": {"edge": 0.0, "update": 0.1, "readout": 0.3}, "uncertainty": {"method": "masks"}},
}
"""How networks are trained."""


@dataclass(frozen=True)
class Variant:
    """Where functions come from.

    Attributes:
        training: one of ``TRAININGS``.
        method: what finds them; None where the training left them.
    """

    training: str
    method: Method | None


VARIANTS = {
    "posterior": Variant("none", Posterior()),
    "exact": Variant("none", ExactDropout()),
    "exact p=0.1": Variant("none", ExactDropout(rate=0.1, prior=1.0, draw=1.0)),
    "exact p=0.3": Variant("none", ExactDropout(rate=0.3, prior=1.0, draw=1.0)),
    "exact p=0.5": Variant("none", ExactDropout(rate=0.5, prior=1.0, draw=1.0)),
    "exact p=0.3, masks alone": Variant("none", ExactDropout(rate=0.3, prior=1.0, draw=0.0)),
    "edge 0.1 in training, exact": Variant("edge0.1", ExactDropout()),
    "edge 0.3 in training, exact": Variant("edge0.3", ExactDropout()),
    "edge 0.1, 8 cuts at inference": Variant("edge0.1", ExactDropout(rate=0.3, prior=1.0, draw=1.0, cuts=8)),
    "trained masks": Variant("masks", None),
    f"deep ensemble of {MEMBERS}": Variant("none", None),
}


def main() -> None:
    """Train, judge, or summarise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "judge", "summary"))
    parser.add_argument("problems", nargs="*", help="some problems, all by default")
    parser.add_argument("--only", default="", help="trainings or variants whose name begins so; =NAME: that one")
    parser.add_argument("--members", action="store_true", help="train the further members of ensembles instead")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(range(SEEDS)))
    arguments = parser.parse_args()
    if unknown := set(arguments.problems) - set(PROBLEMS):
        parser.error(f"unknown problems {', '.join(sorted(unknown))}; known are {', '.join(PROBLEMS)}")
    torch.set_num_threads(1)
    problems = arguments.problems or list(PROBLEMS)
    if arguments.what == "train":
        for problem, training, seed, member in trainings(problems, arguments.seeds, arguments.members):
            if training.startswith(arguments.only):
                trained(problem, training, seed, member)
    elif arguments.what == "judge":
        for problem in problems:
            for seed in arguments.seeds:
                if seed < PROBLEMS[problem].seeds:
                    judge(problem, seed, arguments.only)
    summary()


def trainings(problems: Sequence[str], seeds: Sequence[int], members: bool) -> Iterator[tuple[str, str, int, int]]:
    """Yield problem, training, seed and member."""
    for seed in seeds:
        for problem in problems:
            if members and problem != "3bpa_recipe":
                yield from ((problem, "none", seed, member) for member in range(1, MEMBERS))
            elif not members and seed < PROBLEMS[problem].seeds:
                chosen = ["none"] if problem == "3bpa_recipe" else list(TRAININGS)
                yield from ((problem, training, seed, 0) for training in chosen)


def liquid(frame: Frame) -> bool:
    """Say whether a silicon frame is liquid: fewer than half of its atoms have four neighbours within 3 Å.

    Not by its description: the temperatures that the set gives for cells with a vacancy, 300 and 3374 K, are interchanged.
    """
    atoms = frame.to_atoms()
    count = np.bincount(neighbor_list("i", atoms, 3.0), minlength=len(atoms))
    return bool(frame.info.get("config_type") != "Surface" and np.mean(count == 4) < 0.5)


def split(problem: str, seed: int) -> dict[str, list[Frame]]:
    """Return the frames of a problem: train, validation, calibration; judged sets by their names."""
    names = ("train", "validation", "calibration")
    if problem == "ethanol":
        frames = read_frames(ROOT / "data" / "ethanol_300K.h5")
        order = np.argsort([f.energy for f in frames])
        cold = np.random.default_rng(0).permutation(order[:260])
        parts = np.split(cold, [150, 180, 220])
        places = dict(zip((*names, "cold"), parts, strict=True)) | {"hot": order[-150:]}
        return {name: [frames[i] for i in chosen] for name, chosen in places.items()}
    if problem == "silicon":
        every = read_frames(SHARED / "mlearn" / "Si_train.xyz")
        frames = [f for f in every if not liquid(f)]
        order = np.random.default_rng(200 + seed).permutation(len(frames))
        parts = np.split(order, [len(frames) - 40, len(frames) - 25])
        others = [f for f in read_frames(SHARED / "mlearn" / "Si_test.xyz") if not liquid(f)]
        sets: dict[str, list[Frame]] = {"crystals": others, "liquid": [f for f in every if liquid(f)][::3]}
    else:
        demo = problem == "demo"
        frames = read_frames(ROOT / "data" / "ethanol_300K.h5" if demo else SHARED / "3bpa" / "train_300K.xyz")
        order = np.random.default_rng(seed if demo else 100 + seed).permutation(len(frames))
        parts = np.split(order, [400, 450])
        if demo:
            sets = {f"{t} K": read_frames(ROOT / "data" / f"ethanol_{t}K.h5") for t in (600, 1200)}
        else:
            sets = {f"{t} K": read_frames(SHARED / "3bpa" / f"test_{t}K.xyz")[::EVERY] for t in (300, 600)}
        if problem == "3bpa_recipe":
            sets["1200 K"] = read_frames(SHARED / "3bpa" / "test_1200K_166.xyz")
    return {name: [frames[i] for i in chosen] for name, chosen in zip(names, parts, strict=True)} | sets


def trained(problem: str, training: str, seed: int, member: int = 0, *, only: bool = False) -> TrainedModel | None:
    """Return a trained network; trainings that are there already are not repeated, with ``only`` none is begun."""
    folder = RUNS / problem / training / (f"{seed}_{member}" if member else str(seed))
    if not (folder / "model.pt").exists():
        if only:
            return None
        data = RUNS / problem / ("data" if problem == "ethanol" else f"data_{seed}")
        for name, frames in split(problem, seed).items():
            if name in ("train", "validation", "calibration") and not (data / f"{name}.h5").exists():
                data.mkdir(parents=True, exist_ok=True)
                write_frames(data / f"{name}.h5", frames)
        recipe = PROBLEMS[problem]
        values = load_config(ROOT / "examples" / "configs" / f"{recipe.recipe}.yaml").model_dump(
            mode="json", exclude_unset=True
        )
        values = with_changes(values, {"uncertainty": {"method": "none"}} | recipe.changes | TRAININGS[training])
        values["data"] = {
            "train": [str(data / "train.h5")],
            "validation": [str(data / "validation.h5")],
            "calibration_fraction": 0.0,
            **({"isolated_atoms": str(recipe.atoms)} if recipe.atoms else {}),
        }
        values |= {"seed": 1000 + 10 * seed + member if member else seed, "output": str(folder)}
        print(problem, training, seed, member, flush=True)
        train(parse_config(values), resume=(folder / "last.pt").exists())
    return load_model(folder / "model.pt")


def judge(problem: str, seed: int, only: str) -> None:
    """Judge every variant of one seed whose networks are there, and write each row at once."""
    frames, equations = split(problem, seed), {}
    for name, variant in VARIANTS.items():
        done = read_results("dropout").get("rows", [])
        chosen = name == only[1:] if only.startswith("=") else name.startswith(only)
        if not chosen or any((r["problem"], r["seed"], r["model"]) == (problem, seed, name) for r in done):
            continue
        found = with_functions(problem, seed, name, variant, frames, equations)
        if found is None:
            continue
        model, minutes = found
        graphs = model.graphs(frames["calibration"])
        model = replace(model, calibration=calibrate(model.potential, graphs, seed=model.seed))
        rows = judged(name, model, frames)
        print(f"{problem}, seed {seed}: {minutes:.1f} min\n{comparison_table(rows)}", flush=True)
        about = {"problem": problem, "seed": seed, "minutes": round(minutes, 2)}
        about |= {"chosen": {k: model.uncertainty[k] for k in ("rate", "prior", "draw") if k in model.uncertainty}}
        about |= {"factor": model.calibration.curve.scale, "own": model.calibration.own} if model.calibration else {}
        results = read_results("dropout")
        results["rows"] = results.get("rows", []) + [row | about for row in rows]
        write_results("dropout", results | {"environment": environment(0)})


def with_functions(
    problem: str, seed: int, name: str, variant: Variant, frames: dict[str, list[Frame]], known: dict[str, Equations]
) -> tuple[TrainedModel, float] | None:
    """Return a model with its functions, and minutes of training and of finding them; None if a network is missing."""
    model = trained(problem, variant.training, seed, only=True)
    if model is None:
        return None
    minutes = model.provenance["training_seconds"] / 60
    if name.startswith("deep"):
        members = [trained(problem, "none", seed, m, only=True) for m in range(MEMBERS)]
        whole = [m for m in members if m is not None]
        if len(whole) < MEMBERS:
            return None
        return committee(whole), sum(m.provenance["training_seconds"] for m in whole) / 60
    if variant.method is None:
        return model, minutes
    model.potential.forget_functions()
    start = time.perf_counter()
    labels = Labels(model.graphs(frames["train"]), model.graphs(frames["validation"]))
    if isinstance(variant.method, ExactDropout) and variant.method.cuts:
        about = find_functions(model.potential, variant.method, labels)
    else:
        if variant.training not in known:
            known[variant.training] = solve_equations(model.potential, labels, frames=1000)
        method: Any = variant.method
        about = {"method": method.name, **method.fill(model.potential, labels, known[variant.training])}
    model.uncertainty = {"functions": variant.method.functions, "seed": 0, **about}
    return model, minutes + (time.perf_counter() - start) / 60


def judged(name: str, model: TrainedModel, frames: dict[str, list[Frame]]) -> list[dict[str, Any]]:
    """Return a row for each set and K = 16 and 64; the fewer functions are the first of the many."""
    sets = {what: own for what, own in frames.items() if what not in ("train", "validation", "calibration")}
    most = min(64, model.n_functions or 64)
    held = predicted(model, frames["calibration"], most)
    ruled = predicted(model, frames["validation"], most)
    validation = evaluate(model, frames["validation"], predictions=with_sigma(model, frames["validation"], ruled, most))
    rows = []
    for what, own in sets.items():
        many = predicted(model, own, most)
        for k in sorted({min(16, most), most}):
            predictions = with_sigma(model, own, many, k)
            found: Evaluation = evaluate(model, own, predictions=predictions)
            (row,) = comparison_rows({name: {what: found}})
            row |= {"samples": k, "validation_rmse_meV_A": round(1e3 * found_rmse(validation), 4)}
            if what == "liquid":
                row["flagged"] = flagged(with_sigma(model, frames["calibration"], held, k), predictions)
            rows.append(row)
    return rows


def found_rmse(found: Evaluation) -> float:
    """Return the root mean square error of forces."""
    return float(np.sqrt(np.mean(np.square(found.error["forces"]))))


def predicted(model: TrainedModel, frames: Sequence[Frame], k: int) -> list[FramePrediction]:
    """Return the predictions with K functions, all of which are kept."""
    return list(predict_graphs(model.potential, model.graphs(frames), n_samples=k, seed=model.seed))


def with_sigma(
    model: TrainedModel, frames: Sequence[Frame], found: Sequence[FramePrediction], k: int
) -> list[FramePrediction]:
    """Return them with σ of the first K functions (of energies: of the whole bank, if there is one)."""
    calibration: Any = model.calibration
    result = []
    for frame, p in zip(frames, found, strict=True):
        few = {
            name: x if model.potential.centred and x.ndim < 3 and name != "stress" else x[:k]
            for name, x in p.samples.items()
        }
        mean = p.mean if model.potential.centred else {name: x.mean(0) for name, x in few.items()}
        scaled = calibration.apply(few, frame.z, mean)
        result.append(replace(p, mean=mean, sigma=deviations(scaled), samples={"energy": scaled["energy"]}))
    return result


def flagged(held: Sequence[FramePrediction], found: Sequence[FramePrediction]) -> float:
    """Return the share of atoms with σ above what 1 % of the calibration frames' atoms exceed."""

    def sigmas(predictions: Sequence[FramePrediction]) -> np.ndarray:
        return np.concatenate([np.linalg.norm(p.error_bars["forces"], axis=1) for p in predictions])

    return round(float(np.mean(sigmas(found) > np.quantile(sigmas(held), 0.99))), 4)


def validations() -> dict[str, dict[str, list[float]]]:
    """Return the best validation force RMSE [meV/Å] of every training that is there, by problem and training."""
    found: dict[str, dict[str, list[float]]] = defaultdict(dict)
    for problem in PROBLEMS:
        for training in TRAININGS:
            logs = [RUNS / problem / training / str(seed) for seed in range(SEEDS)]
            rows = [read_log(folder / "log.csv") for folder in logs if (folder / "model.pt").exists()]
            if rows:
                found[problem][training] = [
                    round(min(float(row["val_forces_meV_A"]) for row in log), 2) for log in rows
                ]
    return dict(found)


def read_log(path: Path) -> list[dict[str, str]]:
    """Return the rows of a training's log."""
    with path.open(encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def summary() -> None:
    """Print the mean over the seeds and keep it beside the rows."""
    results = read_results("dropout")
    if found := validations():
        results["validation_rmse_meV_A"] = found
    groups: dict[tuple[str, str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in results.get("rows", []):
        groups[row["problem"], row["set"], row["model"], row["samples"]].append(row)
    means = []
    for (problem, what, model, k), rows in groups.items():
        numbers = {key for key, value in rows[0].items() if isinstance(value, float)}
        mean = {key: round(float(np.mean([row[key] for row in rows if key in row])), 4) for key in sorted(numbers)}
        means.append({"problem": problem, "set": what, "model": model, "samples": k, "seeds": len(rows), **mean})
    for problem in PROBLEMS:
        own = [
            row | {"model": f"{row['model']} (K {row['samples']}, {row['seeds']} seeds)"}
            for row in means
            if row["problem"] == problem
        ]
        if own:
            print(f"\n{problem}\n{comparison_table(own)}")
            for row in own:
                if "flagged" in row:
                    print(f"  {row['model']}: {100 * row['flagged']:.1f} % of the liquid's atoms flagged")
    if means:
        write_results("dropout", results | {"mean": means})


if __name__ == "__main__":
    main()
