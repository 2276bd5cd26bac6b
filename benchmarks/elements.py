r"""Many elements: what sharing weights among them costs, and that 89 fit into memory.

    python benchmarks/elements.py share      # seven metals by EMT: one set of weights for each, or 5, 3, 1 shared ones
    python benchmarks/elements.py memory     # 89 elements: minutes and peak memory of fit, bank and call
    # both add to results/elements.json

*share*: random alloys of Al, Ni, Cu, Pd, Ag, Pt and Au (fcc, 32 atoms, strained and rattled, forces by ASE's EMT), 160 frames to
learn, 20 to validate, 30 to calibrate, 60 alike and 60 rattled twice as much to judge on. One network a seed; its functions are
found with 7 sets of weights (exact: one for each element) and with fewer, which combine to an element's by what the network
learned about it. *memory*: random structures of 89 elements, labels from a Lennard-Jones potential; the network is not trained,
for only sizes count.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from common import environment, read_results, write_results

from forcedrop.derive import geometry
from forcedrop.evaluation import evaluate
from forcedrop.graph import batch_graphs
from forcedrop.model import TrainedModel, load_model
from forcedrop.potential import build
from forcedrop.report import comparison_rows, comparison_table
from forcedrop.structures import Frame, write_frames
from forcedrop.training import parse_config, train
from forcedrop.uncertainty.calibrate import calibrate
from forcedrop.uncertainty.exact_dropout import ExactDropout
from forcedrop.uncertainty.method import Labels, find_functions
from forcedrop.uncertainty.sampling import predict

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "elements"
METALS = ("Al", "Ni", "Cu", "Pd", "Ag", "Pt", "Au")
LENGTHS = {"Al": 4.0, "Ni": 3.5, "Cu": 3.6, "Pd": 3.9, "Ag": 4.1, "Pt": 3.9, "Au": 4.1}
SETS = (7, 5, 3, 1)
SEEDS = 3


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("share", "memory"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found: Any = share() if arguments.part == "share" else memory()
    write_results("elements", read_results("elements") | {arguments.part: found, "environment": environment(0)})


def alloys(n: int, rattle: float, rng: np.random.Generator) -> list[Frame]:
    """Return random alloys of a few of the metals."""
    frames = []
    for _ in range(n):
        chosen = rng.choice(METALS, size=int(rng.integers(2, 5)), replace=False)
        atoms = bulk("Cu", "fcc", a=3.9, cubic=True).repeat(2)
        atoms.symbols = rng.choice(chosen, size=len(atoms))
        length = float(np.mean([LENGTHS[s] for s in atoms.symbols]))
        strain = np.eye(3) + rng.normal(scale=0.015, size=(3, 3))
        atoms.set_cell(atoms.cell.array * length / 3.9 @ strain, scale_atoms=True)
        atoms.positions += rng.normal(scale=rattle, size=atoms.positions.shape)
        atoms.calc = EMT()
        frames.append(
            Frame.from_atoms(atoms, energy=float(atoms.get_potential_energy()), forces=atoms.get_forces(), source="emt")
        )
    return frames


def share() -> list[dict[str, Any]]:
    """Compare numbers of sets of weights."""
    rows = []
    for seed in range(SEEDS):
        rng = np.random.default_rng(seed)
        sets = {
            name: alloys(n, 0.08, rng)
            for name, n in (("train", 160), ("validation", 20), ("calibration", 30), ("alike", 60))
        }
        sets["hotter"] = alloys(60, 0.16, rng)
        folder = RUNS / str(seed)
        if not (folder / "model.pt").exists():
            folder.mkdir(parents=True, exist_ok=True)
            for name in ("train", "validation"):
                write_frames(folder / f"{name}.h5", sets[name])
            values = {
                "output": str(folder), "seed": seed, "epochs": 40, "uncertainty": {"method": "none"},
                "data": {
                    "train": [str(folder / "train.h5")], "validation": [str(folder / "validation.h5")],
                    "calibration_fraction": 0.0, "isolated_atoms": dict.fromkeys(METALS, 0.0),
                },
                "model": {"cutoff": 4.5, "cutoff_power": 2, "n_channels": 16, "n_hidden": 16, "l_message": 1},
            }  # fmt: skip
            train(parse_config(values), resume=(folder / "last.pt").exists())
        for n_sets in SETS:
            model = load_model(folder / "model.pt")
            model.potential.add_correction(model.potential.n_features, n_sets)
            labels = Labels(model.graphs(sets["train"]), model.graphs(sets["validation"]), quiet=True)
            start = time.perf_counter()
            find_functions(model.potential, ExactDropout(rate=0.3, prior=1.0, draw=1.0), labels)
            seconds = time.perf_counter() - start
            model = replace(model, calibration=calibrate(model.potential, model.graphs(sets["calibration"])))
            found = {name: evaluate(model, sets[name], n_samples=64) for name in ("alike", "hotter")}
            own = comparison_rows({f"{n_sets} sets": found})
            rows += [row | {"seed": seed, "sets": n_sets, "seconds": round(seconds, 1)} for row in own]
            print(f"seed {seed}, {seconds:.0f} s\n{comparison_table(own)}", flush=True)
    mean = []
    for n_sets in SETS:
        for name in ("alike", "hotter"):
            own = [row for row in rows if (row["sets"], row["set"]) == (n_sets, name)]
            numbers = [key for key, value in own[0].items() if isinstance(value, float)]
            mean.append(
                {"model": f"{n_sets} sets", "set": name}
                | {key: round(float(np.mean([row[key] for row in own])), 4) for key in numbers}
            )
    print("mean over the seeds\n" + comparison_table(mean))
    return [*mean, *rows]


def memory() -> dict[str, Any]:
    """Fit, fill and call a network of 89 elements, and return seconds and peak memory."""
    rng = np.random.default_rng(0)
    elements = tuple(range(1, 90))
    potential = build("sphere", {"cutoff": 4.5}, elements).eval()
    frames = []
    for _ in range(60):
        atoms = bulk("Cu", "fcc", a=4.2, cubic=True).repeat(2)
        atoms.numbers = rng.integers(1, 90, size=len(atoms))
        atoms.positions += rng.normal(scale=0.1, size=atoms.positions.shape)
        atoms.calc = LennardJones(sigma=2.6, epsilon=0.2, rc=6.0)
        frames.append(Frame.from_atoms(atoms, energy=float(atoms.get_potential_energy()), forces=atoms.get_forces()))
    model = TrainedModel(potential)
    graphs = model.graphs(frames)
    batch = batch_graphs(graphs[:8])
    graph, vec = geometry(potential, batch)
    potential.measure(vec, graph)
    before = _peak()
    start = time.perf_counter()
    about = find_functions(
        potential, ExactDropout(frames=50, rate=0.3, prior=1.0, draw=1.0), Labels(graphs[:50], graphs[50:])
    )
    fit = time.perf_counter() - start
    start = time.perf_counter()
    predict(potential, batch_graphs(graphs[:1]), n_samples=64)
    call = time.perf_counter() - start
    bank: Any = potential.correction
    found = {
        "elements": len(elements), "sets": about["sets"], "weights": about["weights"], "fit_and_bank_seconds": round(fit, 1),
        "call_64_functions_32_atoms_seconds": round(call, 2), "peak_GiB": round(_peak(), 2), "peak_before_GiB": round(before, 2),
        "bank_MB": round(bank.bank.numel() * bank.bank.element_size() / 1e6, 2),
    }  # fmt: skip
    print(found)
    return found


def _peak() -> float:
    """Return the largest resident memory of this process so far [GiB]."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
