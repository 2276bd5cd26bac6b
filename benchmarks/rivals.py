"""One network with a posterior against deep ensembles of five: 3BPA, trained and calibrated at 300 K, three times over.

    python benchmarks/rivals.py train 0        # set 0 of five networks, and the longer one; also 1 and 2; resumes
    python benchmarks/rivals.py judge          # table, results/rivals.json, rivals.png, of the sets that are complete

A smaller network than the recipe's, the same for all (32 channels, messages up to l = 1, 40 epochs): 400 frames to train on,
50 to validate, 50 to calibrate, drawn anew for each set. Judged on every fourth frame of the published test sets, once everything
was decided (``honesty.py`` is where choices were made). ``longer`` is one network of 1.4 times the epochs: error bars may cost
half as much again as a plain training.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, environment, read_results, with_changes, write_results

from forcedrop.evaluation import Evaluation, compare
from forcedrop.report import comparison_figure, comparison_rows, comparison_table, save_figure
from forcedrop.structures import Frame, read_frames, write_frames
from forcedrop.training import Committee, TrainedModel, load_config, load_model, parse_config, train

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "rivals"
SETS, MEMBERS, EPOCHS, LONGER = 3, 5, 40, 56
SMALL = {"model": {"n_channels": 32, "n_hidden": 32, "l_message": 1}, "optimiser": {"weight_decay": 0.02}}
SAMPLES = 64
EVERY = 4


def main() -> None:
    """Train a set, or judge all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "3bpa")
    parts = parser.add_subparsers(dest="part", required=True)
    training = parts.add_parser("train")
    training.add_argument("set", type=int, choices=range(SETS))
    parts.add_parser("judge")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.part == "train":
        train_set(arguments.set, arguments.data)
    else:
        judge(arguments.data)


def frames_of(number: int, data: Path) -> dict[str, list[Frame]]:
    """Return training, validation and calibration frames of a set."""
    frames = read_frames(data / "train_300K.xyz")
    order = np.random.default_rng(100 + number).permutation(len(frames))
    parts = zip(("train", "validation", "calibration"), np.split(order, [400, 450]), strict=True)
    return {name: [frames[i] for i in chosen] for name, chosen in parts}


def train_set(number: int, data: Path) -> None:
    """Train five networks of a set and the longer one; the first and the longer one get a posterior."""
    folder = RUNS / str(number)
    folder.mkdir(parents=True, exist_ok=True)
    for name, frames in frames_of(number, data).items():
        if not (folder / f"{name}.h5").exists():
            write_frames(folder / f"{name}.h5", frames)
    recipe = load_config(ROOT / "examples" / "configs" / "3bpa.yaml").model_dump(mode="json", exclude_unset=True)
    recipe["data"] = {
        "train": [str(folder / "train.h5")],
        "validation": [str(folder / "validation.h5")],
        "calibration_fraction": 0.0,
        "isolated_atoms": str(data / "iso_atoms.xyz"),
    }
    for member in [*range(MEMBERS), "longer"]:
        output = folder / str(member)
        if (output / "model.pt").exists():
            continue
        single = member in (0, "longer")
        changes: dict[str, Any] = {
            **SMALL,
            "stage_one": {"epochs": LONGER if member == "longer" else EPOCHS},
            "posterior": {"frames": 1000 if single else 0},
        }
        seed = 10 * number + (0 if member == "longer" else int(member))
        config = parse_config(with_changes(recipe, changes) | {"seed": seed, "output": str(output)})
        train(config, resume=(output / "last.pt").exists())


def judge(data: Path) -> None:
    """Calibrate and judge every set, write table and figure."""
    tests = {f"{t} K": read_frames(data / f"test_{t}K.xyz")[::EVERY] for t in (300, 600)}
    every: list[dict[str, Any]] = []
    trained = [n for n in range(SETS) if (RUNS / str(n) / "longer" / "model.pt").exists()]
    for number in trained:
        folder = RUNS / str(number)
        members = [load_model(folder / str(m) / "model.pt") for m in range(MEMBERS)]
        models: dict[str, TrainedModel | Committee] = {
            "posterior": members[0],
            "posterior, longer": load_model(folder / "longer" / "model.pt"),
            "deep ensemble of 5": Committee(members),
        }
        held = read_frames(folder / "calibration.h5")
        found: dict[str, dict[str, Evaluation]] = compare(models, tests, held, n_samples=SAMPLES)
        found |= {"posterior, 16 samples": compare({"p": members[0]}, tests, held, n_samples=16)["p"]}
        rows = comparison_rows(found)
        print(f"set {number}\n{comparison_table(rows)}", flush=True)
        every += [{"number": number, **row} for row in rows]
        if number == trained[0]:
            save_figure(comparison_figure(found), RESULTS / "rivals.png")
    mean = averages(every)
    print("mean over the sets\n" + comparison_table(mean))
    minutes = {
        kind: round(
            sum(load_model(RUNS / str(trained[0]) / m / "model.pt").provenance["training_seconds"] for m in names) / 60,
            1,
        )
        for kind, names in {"one": ["0"], "longer": ["longer"], "five": [str(m) for m in range(MEMBERS)]}.items()
    }
    results = read_results("rivals") | {"mean": mean, "sets": every, "training_minutes": minutes}
    write_results(
        "rivals", results | {"test_frames": {k: len(v) for k, v in tests.items()}, "environment": environment(0)}
    )


def averages(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the mean of every number over the sets, a row a model and test."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        groups[row["model"], row["set"]].append(row)
    return [
        {"model": model, "set": test}
        | {k: round(float(np.mean([r[k] for r in group])), 4) for k in group[0] if k not in ("model", "set", "number")}
        for (model, test), group in groups.items()
    ]


if __name__ == "__main__":
    main()
