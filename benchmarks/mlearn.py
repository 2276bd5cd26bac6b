"""Crystals of the mlearn set (Zuo et al. 2020): train on its training file, errors on its test file, for Cu, Li and Si.

    python benchmarks/mlearn.py train Cu      # examples/configs/copper.yaml, also for Li; silicon.yaml for Si
    python benchmarks/mlearn.py test Cu       # once, at the very end: adds to results/mlearn.json

Mean absolute errors of energy [meV/atom] and force components [eV/Å], of the Monte-Carlo mean and of the plain (weight-scaled)
pass, beside published ones. The data are not part of the project; ``--data`` says where they are. Trainings resume.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, read_results, write_results

from forcedrop.evaluation import predict_frames
from forcedrop.structures import read_frames
from forcedrop.training import TrainConfig, load_config, load_model, parse_config, train

ROOT = Path(__file__).resolve().parent.parent
RECIPES: dict[str, tuple[str, dict[str, float]]] = {
    "Cu": ("copper.yaml", {}),
    "Li": ("copper.yaml", {"cutoff": 5.0}),
    "Si": ("silicon.yaml", {}),
}
"""Training file, and what of its model differs."""
PUBLISHED = {
    "Cu": {"GAP": (0.46, 0.01), "MTP": (0.41, 0.01)},
    "Li": {"GAP": (0.49, 0.01), "MTP": (0.49, 0.01)},
    "Si": {"GAP": (2.91, 0.07), "MTP": (2.21, 0.06)},
}
"""Energy [meV/atom] and force [eV/Å] MAE on the same test files: Zuo et al., J. Phys. Chem. A 124, 731 (2020)."""


def main() -> None:
    """Train or test one element."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "test"))
    parser.add_argument("element", choices=list(RECIPES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "mlearn")
    arguments = parser.parse_args()
    config = recipe(arguments.element, arguments.data)
    if arguments.what == "train":
        train(config, resume=(config.output / "last.pt").exists())
    else:
        test(arguments.element, config, arguments.data)


def recipe(element: str, data: Path) -> TrainConfig:
    """Return the shipped recipe with the element's own training file."""
    file, model = RECIPES[element]
    values = load_config(ROOT / "examples" / "configs" / file).model_dump(mode="json", exclude_unset=True)
    values["model"] |= model
    values["data"]["train"] = [str(data / f"{element}_train.xyz")]
    return parse_config({**values, "output": str(ROOT / "runs" / "mlearn" / element)})


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
