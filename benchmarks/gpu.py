"""What a GPU makes of it: force calls, samples, size, training steps, and how far float32 is from float64 there.

    python benchmarks/gpu.py --data FILE    # extended XYZ of 3BPA

Networks of the default shape with random weights; calls go through the ASE calculator, atoms moved a little each time, medians
after three calls; samples are functions of a bank. Every part is written as it ends: ``results/gpu.json``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from common import environment, write_results
from systems import DATA, ISOLATED, calculator, moved, structure

ONE = 10**9  # σ never: one pass
SILICON = (1, 3, 6, 10, 16)
"""Cells along each axis: 8 to 32 768 atoms."""
STEPS = {
    "as it is": {},
    "TF32": {"tf32": True},
    "compiled": {"compile": True},
    "compiled, TF32": {"compile": True, "tf32": True},
}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cpu", action="store_true", help="on the CPU instead, to try the script: writes nothing")
    parser.add_argument(
        "--no-compile", action="store_true", help="without the compiled steps, which take minutes to compile"
    )
    arguments = parser.parse_args()
    device = "cpu" if arguments.cpu else "cuda"
    sizes = SILICON[:2] if arguments.cpu else SILICON
    results: dict[str, Any] = {"environment": environment(0), "device": device, "calls": [], "steps": []}

    def note(part: str, row: dict[str, Any]) -> None:
        print(part, row, flush=True)
        results[part].append(row)
        if not arguments.cpu:
            write_results("gpu", results)

    for name, repeat in [("3BPA", 1), *(("silicon", n) for n in sizes)]:
        note("calls", calls(name, repeat, device, arguments.data))
    results["precision"] = precision(device)
    print(results["precision"], flush=True)
    for what, changes in STEPS.items():
        for batch_size in (5, 32):
            if not (arguments.no_compile and "compile" in changes):
                note("steps", step(what, {**changes, "batch_size": batch_size}, device, arguments.data))


def timed(call: Callable[[], Any], device: str, seconds: float = 3.0) -> float:
    """Return the median time of a call [ms], over at least three calls."""
    for _ in range(3):
        call()
    times: list[float] = []
    start = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - start < seconds and len(times) < 200):
        begin = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return 1e3 * statistics.median(times)


def calls(name: str, repeat: int, device: str, data: Path) -> dict[str, Any]:
    """Time one call and K samples of a structure, and note the memory of 16."""
    atoms = structure(name, data, repeat)
    row: dict[str, Any] = {"system": name, "atoms": len(atoms)}
    row["one_ms"] = timed(moved(atoms, calculator(name, data=data, device=device, uncertainty_every=ONE)), device)
    for samples in (16, 64):
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        row[f"K{samples}_ms"] = timed(
            moved(atoms, calculator(name, data=data, device=device, n_samples=samples)), device
        )
        row[f"K{samples}_over_one"] = round(row[f"K{samples}_ms"] / row["one_ms"], 2)
        if device == "cuda":
            row[f"K{samples}_GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in row.items()}


def precision(device: str) -> dict[str, float]:
    """Return the largest difference of forces [eV/Å] of the shipped ethanol model: float32 there, float64 on the CPU."""
    from forcedrop.derive import derive
    from forcedrop.graph import NeighbourFinder, batch_graphs, build_graph
    from forcedrop.model import load_model
    from forcedrop.structures import read_frames

    folder = Path(__file__).resolve().parent.parent / "data"
    fast, exact = (load_model(folder / "ethanol.pt").potential for _ in range(2))
    fast, exact = fast.to(device), exact.double()
    worst = 0.0
    for frame in read_frames(folder / "ethanol_600K.h5")[:20]:
        small, large = (
            batch_graphs([build_graph(frame, NeighbourFinder(fast.cutoff), dtype)])
            for dtype in (torch.float32, torch.float64)
        )
        found = derive(fast, small.to(device)).forces.cpu()
        worst = max(worst, float((found - derive(exact, large).forces).abs().max()))
    return {"forces_eV_A": worst}


def step(what: str, changes: dict[str, Any], device: str, data: Path) -> dict[str, Any]:
    """Time a training step of the 3BPA recipe."""
    from ase.data import chemical_symbols

    from forcedrop.training import load_config, parse_config
    from forcedrop.training.data import prepare_data
    from forcedrop.training.run import build_trainer

    root = Path(__file__).resolve().parent.parent
    recipe = load_config(root / "examples" / "configs" / "3bpa.yaml").model_dump(mode="json", exclude_unset=True)
    recipe["data"] = {"train": [str(data)], "isolated_atoms": {chemical_symbols[z]: e for z, e in ISOLATED.items()}}
    config = parse_config({**recipe, "device": device, **changes})
    torch.set_float32_matmul_precision("high" if config.tf32 else "highest")
    start = time.perf_counter()
    trainer = build_trainer(config, prepare_data(config))
    batches = cycle(list(trainer.batches()))

    def one() -> None:
        trainer.progress.step = 1  # not the first of an epoch: what is done every 50 steps is not part of a step
        trainer.run_step(next(batches))

    one()
    begun = time.perf_counter() - start
    ms = timed(one, device)
    torch.set_float32_matmul_precision("highest")
    return {
        "step": what, "batch": config.batch_size, "ms": round(ms, 2), "ms_per_frame": round(ms / config.batch_size, 3),
        "first_step_after_s": round(begun, 1),
    }  # fmt: skip


if __name__ == "__main__":
    main()
