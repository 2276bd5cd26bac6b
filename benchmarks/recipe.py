"""What each part of the recipe is worth: short trainings on 3BPA that differ in one thing, errors on the race's 50 frames.

    python benchmarks/race.py split                # once
    python benchmarks/recipe.py --epochs 10        # about two minutes a variant on one CPU core; resumes

Every variant runs the same number of epochs of the same schedule. Writes ``benchmarks/results/recipe.json`` after each.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from common import environment, read_results, with_changes, write_results
from race import DROPOUT, ROOT, race_config

from forcedrop.derive import derive
from forcedrop.graph import batch_graphs
from forcedrop.training import TrainConfig, parse_config
from forcedrop.training.data import prepare_data
from forcedrop.training.run import build_trainer

VARIANTS: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "dropout": {"dropout": DROPOUT},
    "dropout, a bank of 16 masks": {"dropout": DROPOUT, "uncertainty": {"method": "masks", "functions": 16}},
    "Adam instead of Muon": {"optimiser": {"muon": False}},
    "full energy weight from the start": {"loss": {"ramp": 1.0}},
    "cutoff function of power 6": {"model": {"cutoff_power": 6}},
    "cutoff 5 Å": {"model": {"cutoff": 5.0}},
    "l up to 2": {"model": {"l_max": 2}},
    "messages up to l = 1": {"model": {"l_message": 1}},
    "32 channels": {"model": {"n_channels": 32}},
    "10 radial functions": {"model": {"n_radial": 10}},
    "batches of 2": {"batch_size": 2},
}


def main() -> None:
    """Run what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "3bpa")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--only", nargs="*", choices=list(VARIANTS), help="some variants")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.only or VARIANTS:
        rows = read_results("recipe").get("variants", {})
        if name in rows and rows[name]["epochs"] == arguments.epochs:
            continue
        row = run(variant(VARIANTS[name], arguments.data, arguments.epochs))
        print(name, row, flush=True)
        write_results("recipe", {"environment": environment(0), "variants": rows | {name: row}})


def variant(changes: dict[str, Any], data: Path, epochs: int) -> TrainConfig:
    """Return the shipped recipe on the race's split with one thing changed."""
    values = race_config("plain", data).model_dump(mode="json", exclude_unset=True)
    return parse_config(with_changes(values, changes) | {"epochs": epochs})


def run(config: TrainConfig) -> dict[str, float]:
    """Train and return errors [meV/Å, meV] and seconds of training, validations not counted."""
    trainer = build_trainer(config, prepare_data(config))
    seconds = 0.0
    for epoch in range(config.epochs):
        start = time.perf_counter()
        for batch in trainer.batches():
            trainer.run_step(batch)
        seconds += time.perf_counter() - start
        fitted = trainer.training_errors()
        if epoch < config.epochs - 1:
            trainer.progress.epoch, trainer.progress.step = epoch + 1, 0
    errors = trainer.validate()
    network: Any = trainer.ema.module
    batch = batch_graphs(trainer.validation)
    plain = derive(network, batch)
    return {
        "epochs": config.epochs,
        "forces": round(errors.forces, 2),
        "energy": round(errors.energy, 2),
        "forces_weight_scaled": round(1e3 * float((plain.forces - batch.forces).square().mean().sqrt()), 2),
        "forces_training": round(fitted.forces, 2),
        "seconds": round(seconds, 1),
    }


if __name__ == "__main__":
    main()
