r"""How many samples σ needs, and which kind of calibration: exact dropout on a domain that is held out of the training set.

    python benchmarks/honesty.py --curves             # both; minutes
    python benchmarks/honesty.py --curves --quick     # to try the script: few samples and frames, writes nothing

The network and the frames are those of ``dropout.py`` (problem ``ethanol``, seed 0, trained without dropout): 150 of the coldest
260 of 500 frames of ethanol at 300 K to learn, 30 to validate, 40 to calibrate; judged on the 40 cold ones that are left and on
the hottest 150. Which way to error bars is honest there is ``dropout.py``'s question; ``rows`` in ``results/honesty.json`` are
answers from before exact dropout. Writes ``samples``, ``calibrations`` and what belongs to them into the same file.
"""

from __future__ import annotations

import argparse
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from common import environment, read_results, write_results
from dropout import VARIANTS, split, trained, with_functions

from forcedrop.evaluation import evaluate
from forcedrop.metrics import mean_z2, nll
from forcedrop.model import TrainedModel
from forcedrop.structures import Frame
from forcedrop.uncertainty.calibrate import CANDIDATES, calibrate, cross_validate, force_errors
from forcedrop.uncertainty.equations import Equations
from forcedrop.uncertainty.exact_dropout import ExactDropout
from forcedrop.uncertainty.method import Labels

PROBLEM, SEED = "ethanol", 0
SAMPLES = (4, 8, 16, 32, 64, 128)
MANY = 512
"""Functions, of other masks, whose σ counts as exact."""


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--curves", action="store_true", required=True, help="numbers of samples and kinds of calibration"
    )
    parser.add_argument("--quick", action="store_true", help="to try the script: writes nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    frames = split(PROBLEM, SEED)
    samples, many = ((4, 8), 16) if quick else (SAMPLES, MANY)
    if quick:
        frames |= {name: frames[name][:12] for name in ("calibration", "cold", "hot")}
    model, equations = filled(frames)
    chosen = {name: model.uncertainty[name] for name in ("rate", "prior", "draw")}
    few = with_bank(model, max(samples), 0, frames, equations)
    found = {
        "curves_of": chosen,
        "samples": samples_needed(few, with_bank(model, many, 1, frames, equations), samples, frames),
        "calibrations": kinds(model, frames),
        "curves_environment": environment(SEED),
    }
    if not quick:
        write_results("honesty", read_results("honesty") | found)


def filled(frames: dict[str, list[Frame]]) -> tuple[TrainedModel, Equations]:
    """Return the network with functions by exact dropout, and its normal equations; trained, if it is not there."""
    trained(PROBLEM, "none", SEED)
    known: dict[str, Equations] = {}
    found = with_functions(PROBLEM, SEED, "exact", VARIANTS["exact"], frames, known)
    if found is None:
        raise ValueError(f"the network of {PROBLEM}, seed {SEED}, was trained, but is not there")
    return found[0], known["none"]


def with_bank(
    model: TrainedModel, functions: int, seed: int, frames: dict[str, list[Frame]], equations: Equations
) -> TrainedModel:
    """Return the model with another bank of the settings that were chosen, calibrated."""
    chosen: dict[str, Any] = {name: model.uncertainty[name] for name in ("rate", "prior", "draw")}
    potential = deepcopy(model.potential)
    potential.forget_functions()
    labels = Labels(model.graphs(frames["train"]), model.graphs(frames["validation"]))
    ExactDropout(functions=functions, seed=seed, **chosen).fill(potential, labels, equations)
    return replace(model, potential=potential, calibration=calibrate(potential, model.graphs(frames["calibration"])))


def samples_needed(
    model: TrainedModel, many: TrainedModel, samples: tuple[int, ...], frames: dict[str, list[Frame]]
) -> list[dict[str, float]]:
    r"""Return for every K how far σ of K functions is from that of many others, and how honest it is.

    The relative standard error of a standard deviation of K Gaussian draws is 1/√(2(K−1)). Both take the calibration of the many.
    """
    model = replace(model, calibration=many.calibration)
    sets = {"cold": frames["cold"], "hot": frames["hot"][::4]}
    exact = {name: evaluate(many, own, n_samples=many.n_functions).sigma["forces"] for name, own in sets.items()}
    rows = []
    for k in samples:
        row: dict[str, float] = {"samples": k, "expected": round((2 * (k - 1)) ** -0.5, 4)}
        for name, own in sets.items():
            found = evaluate(model, own, n_samples=k)
            report = found.reports()["forces"]
            row |= {
                f"{name}_relative_error": round(float(np.std(found.sigma["forces"] / exact[name])), 4),
                f"{name}_nll": round(report.nll, 4),
                f"{name}_z2": round(report.z2, 3),
                f"{name}_auroc": round(found.detection()["auroc"], 4),
            }
        print(row, flush=True)
        rows.append(row)
    return rows


def kinds(model: TrainedModel, frames: dict[str, list[Frame]]) -> dict[str, dict[str, float]]:
    """Return likelihood and z² of every kind of calibration, on frames of the calibration set left out, cold and hot ones."""
    sets = ("calibration", "cold", "hot")
    spreads = {name: force_errors(model.potential, model.graphs(frames[name])) for name in sets}
    found = {}
    for candidate in CANDIDATES:
        row = {"left_out_nll": round(float(cross_validate(spreads["calibration"], candidate).mean()), 4)}
        fitted = candidate(spreads["calibration"])
        for name in ("cold", "hot"):
            own = spreads[name]
            sigma = own.sigma(fitted)
            row |= {f"{name}_nll": round(nll(own.error, sigma), 4), f"{name}_z2": round(mean_z2(own.error, sigma), 3)}
        found[candidate.__name__] = row
        print(candidate.__name__, row, flush=True)
    return found


if __name__ == "__main__":
    main()
