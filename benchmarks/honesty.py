r"""Which error bars are honest away from the data? Chosen on a domain that is held out of a training set, never on a test set.

    python benchmarks/honesty.py            # about a minute a training on one CPU core; trainings that are there are kept
    python benchmarks/honesty.py --only "dropout" "posterior"
    python benchmarks/honesty.py --curves   # calibration curves and numbers of samples of the posterior; quick

The 500 frames of ethanol at 300 K (``data``) are sorted by energy. Networks learn 150 of the coldest 260, are validated on 30 and
calibrated on 40 others, and judged on the 40 cold ones that are left and on the hottest 150. Each variant is one recipe with
one thing changed. Writes ``benchmarks/results/honesty.json`` after each and draws ``honesty.png``.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, environment, read_results, with_changes, write_results
from race import DROPOUT, graphs_of

from forcedrop.calibration import Calibration, Growth
from forcedrop.evaluation import Evaluation, compare, evaluate
from forcedrop.metrics import mean_z2, nll
from forcedrop.report import comparison_figure, comparison_rows, comparison_table, save_figure
from forcedrop.structures import Frame, read_frames, write_frames
from forcedrop.training import Committee, TrainedModel, load_config, load_model, parse_config, train
from forcedrop.training.calibrate import CANDIDATES, calibrate, cross_validate, force_errors, monotone

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "honesty"
SEED, EPOCHS = 0, 80
MANY = 512
"""Draws whose σ counts as exact."""
NONE = {"edge": 0.0, "message": 0.0, "update": 0.0, "readout": 0.0}
STRONG = {"message": 0.2, "update": 0.2, "readout": 0.5}
LATE = {"stage_one": {"epochs": EPOCHS - 16, "dropout": False}, "stage_two": {"epochs": 16, "samples": 4}}


@dataclass(frozen=True)
class Variant:
    """One way to error bars: what is trained, and what is made of it.

    Attributes:
        changes: of the training file.
        seeds: one network a seed.
        finish: from the trained networks to what is judged.
        n_samples: K of the prediction.
    """

    changes: dict[str, Any]
    finish: Callable[[list[TrainedModel]], TrainedModel | Committee] = field(default=lambda models: models[0])
    seeds: Sequence[int] = (0,)
    n_samples: int = 16


def masks_alone(models: list[TrainedModel]) -> TrainedModel:
    """Take the posterior away."""
    models[0].potential.posterior = models[0].potential.refit = None
    return models[0]


VARIANTS = {
    "posterior": Variant({"dropout": NONE}),
    "posterior, 64 samples": Variant({"dropout": NONE}, n_samples=64),
    "dropout": Variant({"dropout": NONE | DROPOUT}, masks_alone),
    "dropout, 64 samples": Variant({"dropout": NONE | DROPOUT}, masks_alone, n_samples=64),
    "dropout and posterior": Variant({"dropout": NONE | DROPOUT}),
    "strong dropout": Variant({"dropout": NONE | STRONG}, masks_alone),
    "strong dropout, bank of 16": Variant({"dropout": NONE | STRONG | {"bank": 16}}, masks_alone),
    "likelihood after plain training": Variant({"dropout": NONE | DROPOUT | {"bank": 16}, **LATE}, masks_alone),
    "likelihood, strong dropout": Variant({"dropout": NONE | STRONG | {"bank": 16}, **LATE}, masks_alone),
    "shallow ensemble of 16": Variant({"dropout": NONE, "model": {"n_heads": 16}, **LATE}),
    "deep ensemble of 5": Variant({"dropout": NONE}, Committee, seeds=range(5)),
}


def main() -> None:
    """Train and judge the variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="some variants")
    parser.add_argument("--curves", action="store_true", help="kinds of calibration and numbers of samples instead")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sets = split()
    if arguments.curves:
        model = trained(VARIANTS["posterior"].changes, 0, sets)
        results = read_results("honesty") | {"samples": samples_needed(model, sets), "calibrations": kinds(model, sets)}
        write_results("honesty", results | {"environment": environment(SEED)})
        return
    found: dict[str, dict[str, Evaluation]] = {}
    for name in arguments.only or VARIANTS:
        variant = VARIANTS[name]
        start = time.perf_counter()
        models = [trained(variant.changes, seed, sets) for seed in variant.seeds]
        minutes = sum(m.provenance["training_seconds"] for m in models) / 60
        model = variant.finish(models)
        judged = {name: sets[name] for name in ("cold", "hot")}
        found |= compare({name: model}, judged, sets["calibration"], n_samples=variant.n_samples)
        one = one_factor(found[name], model, sets, variant.n_samples)
        rows = comparison_rows({name: found[name], f"{name}; one factor": one})
        print(comparison_table(rows), f"({time.perf_counter() - start:.0f} s)", flush=True)
        results = read_results("honesty")
        results.setdefault("rows", {})[name] = {"training_minutes": round(minutes, 2), "judged": rows}
        write_results("honesty", results | {"environment": environment(SEED)})
    shown = {name: found[name] for name in ("posterior", "dropout", "deep ensemble of 5") if name in found}
    if len(shown) == 3:
        save_figure(comparison_figure(shown), RESULTS / "honesty.png")


def split() -> dict[str, list[Frame]]:
    """Return training, validation, calibration, cold and hot frames."""
    frames = read_frames(ROOT / "data" / "ethanol_300K.h5")
    order = np.argsort([f.energy for f in frames])
    cold = np.random.default_rng(SEED).permutation(order[:260])
    parts = np.split(cold, [150, 180, 220])
    places = dict(zip(("train", "validation", "calibration", "cold"), parts, strict=True)) | {"hot": order[-150:]}
    return {name: [frames[i] for i in chosen] for name, chosen in places.items()}


def trained(changes: dict[str, Any], seed: int, sets: dict[str, list[Frame]]) -> TrainedModel:
    """Return the trained network of a variant; trainings that are there already are not repeated."""
    values = load_config(ROOT / "examples" / "configs" / "ethanol.yaml").model_dump(mode="json", exclude_unset=True)
    values = with_changes(values, {"stage_one": {"epochs": EPOCHS}} | changes) | {"seed": seed}
    values["data"] = {
        "train": [str(RUNS / "train.h5")],
        "validation": [str(RUNS / "validation.h5")],
        "calibration_fraction": 0.0,
        "isolated_atoms": str(ROOT / "data" / "ethanol_atoms.h5"),
    }
    folder = RUNS / f"{zlib.crc32(json.dumps([changes, seed]).encode())}"
    if not (folder / "model.pt").exists():
        for name in ("train", "validation"):
            if not (RUNS / f"{name}.h5").exists():
                write_frames(RUNS / f"{name}.h5", sets[name])
        train(parse_config(values | {"output": str(folder)}), resume=(folder / "last.pt").exists())
    return load_model(folder / "model.pt")


def samples_needed(model: TrainedModel, sets: dict[str, list[Frame]]) -> list[dict[str, float]]:
    r"""Return for every K how far σ of K draws is from that of many, and how honest it is.

    The relative standard error of a standard deviation of K Gaussian draws is 1/√(2(K−1)).
    """
    cold, hot = sets["cold"], sets["hot"][::4]
    model = replace(model, calibration=calibrate(model, graphs_of(model, sets["calibration"])))
    exact = [evaluate(model, frames, n_samples=MANY, seed=1).sigma["forces"] for frames in (cold, hot)]
    rows = []
    for k in (4, 8, 16, 32, 64, 128):
        row: dict[str, float] = {"samples": k, "expected": round((2 * (k - 1)) ** -0.5, 4)}
        for name, frames, many in zip(("cold", "hot"), (cold, hot), exact, strict=True):
            found = evaluate(model, frames, n_samples=k)
            ratio = found.sigma["forces"] / many
            report = found.reports()["forces"]
            row |= {
                f"{name}_relative_error": round(float(np.std(ratio)), 4),
                f"{name}_nll": round(report.nll, 4),
                f"{name}_z2": round(report.z2, 3),
                f"{name}_auroc": round(found.detection()["auroc"], 4),
            }
        print(row, flush=True)
        rows.append(row)
    return rows


def kinds(model: TrainedModel, sets: dict[str, list[Frame]]) -> dict[str, dict[str, float]]:
    """Return likelihood and z² of every kind of calibration, on frames of the calibration set left out, cold and hot ones."""
    spreads = {name: force_errors(model, graphs_of(model, sets[name])) for name in ("calibration", "cold", "hot")}
    found = {}
    for candidate in (*CANDIDATES, monotone):
        row = {"left_out_nll": round(float(cross_validate(spreads["calibration"], candidate).mean()), 4)}
        fitted = candidate(spreads["calibration"])
        for name in ("cold", "hot"):
            own = spreads[name]
            sigma = own.sigma(fitted)
            row |= {f"{name}_nll": round(nll(own.error, sigma), 4), f"{name}_z2": round(mean_z2(own.error, sigma), 3)}
        found[candidate.__name__] = row
        print(candidate.__name__, row, flush=True)
    return found


def one_factor(
    found: dict[str, Evaluation], model: TrainedModel | Committee, sets: dict[str, list[Frame]], n_samples: int
) -> dict[str, Evaluation]:
    """Return the same with one factor for all spreads (γ = 0), fitted on the same frames."""
    judged = {what: sets[what] for what in ("calibration", "cold", "hot")}
    raw = compare({"raw": replace(model, calibration=Calibration(Growth(1.0)))}, judged, n_samples=n_samples)["raw"]
    z2 = float(np.mean((raw["calibration"].error["forces"] / raw["calibration"].sigma["forces"]) ** 2))
    return {
        what: replace(raw[what], sigma={name: s * z2**0.5 for name, s in raw[what].sigma.items()})
        for what in ("cold", "hot")
    }


if __name__ == "__main__":
    main()
