"""The whole path on DFT data: train, calibrate, evaluate on the published test sets, dynamics with error bars.

    python benchmarks/whole_path.py 3bpa       # molecule: 300 K and 600 K tests, NVE at 300 K and at 1200 K
    python benchmarks/whole_path.py silicon    # crystals: test set with stress, NPT

The data are not part of the project; ``--data`` says where they are. Training resumes where it stopped. Pictures go to
``runs/``, numbers to ``benchmarks/results/whole_path_CASE.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, write_results

from forcedrop.calculator import DropoutCalculator
from forcedrop.evaluation import evaluate
from forcedrop.md import NPT, NVE, MDRun, run_md
from forcedrop.model import TrainedModel, load_model
from forcedrop.report import evaluation_table, md_figure, parity_figure, save_figure, sigma_figure
from forcedrop.structures import read_frames
from forcedrop.training import load_config, train

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Dynamics:
    """One run: ``start`` picks the frame of ``file``."""

    name: str
    file: str
    index: int
    ensemble: NVE | NPT
    temperature: float
    steps: int
    timestep: float


@dataclass(frozen=True)
class Case:
    """A training file, test files by name, and runs."""

    config: str
    tests: dict[str, str]
    runs: tuple[Dynamics, ...]


CASES = {
    "3bpa": Case(
        "3bpa.yaml",
        {"300 K": "3bpa/test_300K.xyz", "600 K": "3bpa/test_600K.xyz"},
        (
            Dynamics("NVE 300 K", "3bpa/train_300K.xyz", 0, NVE(), 300.0, 10_000, 0.5),
            Dynamics("NVE 1200 K", "3bpa/train_300K.xyz", 0, NVE(), 1200.0, 10_000, 0.5),
        ),
    ),
    "silicon": Case(
        "silicon.yaml",
        {"test": "mlearn/Si_test.xyz"},
        (Dynamics("NPT 300 K", "mlearn/Si_train.xyz", 80, NPT(), 300.0, 1000, 2.0),),
    ),
}


def main() -> None:
    """Run one case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=list(CASES))
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the data sets")
    parser.add_argument("--samples", type=int, default=16, help="K of the evaluation")
    parser.add_argument("--md-samples", type=int, default=8, help="K of the dynamics")
    arguments = parser.parse_args()
    case, out = CASES[arguments.case], ROOT / "runs" / f"whole_path_{arguments.case}"
    config = load_config(ROOT / "examples" / "configs" / case.config)
    finished = config.output / "model.pt"
    model = load_model(finished) if finished.exists() else train(config, resume=True)
    results = {
        "what": f"forcedrop on {arguments.case}: trained by examples/configs/{case.config}, calibrated on held-out frames",
        "environment": environment(config.seed),
        "training": _training(model),
    }
    tests = {
        name: _evaluate(model, arguments.data / file, name, arguments.samples, out) for name, file in case.tests.items()
    }
    results["evaluation"] = {"samples": arguments.samples, **tests}
    results["dynamics"] = {
        run.name: _simulate(model, run, arguments.data, arguments.md_samples, out) for run in case.runs
    }
    print(write_results(f"whole_path_{arguments.case}", results).relative_to(ROOT))


def _training(model: TrainedModel) -> dict[str, Any]:
    provenance = model.provenance
    calibration = model.calibration.to_dict() if model.calibration else {}
    return {
        "minutes": provenance["training_seconds"] / 60,
        "frames": provenance["training_set"]["frames"],
        "parameters": sum(p.numel() for p in model.potential.parameters()),
        "last_epoch": {k: v for k, v in provenance["last_epoch"].items() if np.isfinite(v)},
        "calibration": {k: v for k, v in calibration.items() if k != "levels"},
        "settings": json.loads(provenance["settings"]),
    }


def _evaluate(model: TrainedModel, path: Path, name: str, samples: int, out: Path) -> dict[str, Any]:
    start = time.perf_counter()
    result = evaluate(model, read_frames(path), n_samples=samples)
    print(f"\n{name}: {path.name}\n{evaluation_table(result)}")
    stem = path.stem
    _draw(lambda: save_figure(parity_figure(result, name), out / f"parity_{stem}.png"))
    _draw(lambda: save_figure(sigma_figure(result, name), out / f"sigma_{stem}.png"))
    return {"file": path.name, "seconds": time.perf_counter() - start, **result.as_dict()}


def _simulate(model: TrainedModel, run: Dynamics, data: Path, samples: int, out: Path) -> dict[str, Any]:
    atoms = read_frames(data / run.file)[run.index].to_atoms()
    threshold = model.calibration.threshold("max_force", 0.95) if model.calibration else None
    start = time.perf_counter()
    done = run_md(
        atoms, DropoutCalculator(model, n_samples=samples), out / run.name.replace(" ", "_"), ensemble=run.ensemble,
        temperature=run.temperature, steps=run.steps, timestep=run.timestep, record_every=10, threshold=threshold,
        overwrite=True,
    )  # fmt: skip
    seconds = time.perf_counter() - start
    print(f"\n{run.name}\n{done.summary()}")
    _draw(lambda: save_figure(md_figure(done.rows, done.flagged, threshold), done.folder / "md.png"))
    return {
        "start": f"{run.file}#{run.index}", "formula": atoms.get_chemical_formula(), "samples": samples,
        "picoseconds": run.steps * run.timestep / 1000, "milliseconds_per_step": 1e3 * seconds / run.steps,
        "drift_meV_atom_ps": done.drift.mean, "fluctuation_meV_atom": done.drift.fluctuation, "threshold_eV_A": threshold,
        "flagged_share": len(done.flagged) / len(done.rows), **_averages(done),
    }  # fmt: skip


def _averages(run: MDRun) -> dict[str, float]:
    """Return means over the run of all that was recorded."""
    names = [name for name in run.rows[0] if name not in ("step", "time_fs", "total_eV", "potential_eV", "kinetic_eV")]
    return {f"mean_{name}": float(np.mean([row[name] for row in run.rows])) for name in names}


def _draw(make: Callable[[], Path]) -> None:
    print(f"drew {make().relative_to(ROOT)}")


if __name__ == "__main__":
    main()
