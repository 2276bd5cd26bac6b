"""Cost per atom and memory from 216 to tens of thousands of atoms: silicon crystals, energy, forces and stress.

    python benchmarks/scaling.py --mace-python PATH/python    # of an environment of its own with mace-torch
    python benchmarks/scaling.py --repeat 3 5 9 14 20         # other sizes: 8 × repeat³ atoms

Each size is a process of its own, so that the largest memory is its own; three calls, the median. The plain network; 16 samples
of a bank (in groups that fit 2 GiB), and the plain network by automatic differentiation of the whole graph (both up to 10 000
atoms); MACE (64 channels, L = 0; up to 2000 atoms). Writes ``results/scaling.json`` and ``scaling.png``.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from systems import calculator, differentiated, mace_calculator, moved, structure
from turns import table

REPEATS = (3, 5, 9, 14)
LARGEST = {"forcedrop": 10**9, "16 samples": 10_000, "automatic differentiation": 10_000, "MACE": 2_000}


def main() -> None:
    """Measure every size and kind, write, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mace-python", type=Path, help="interpreter of the environment with mace-torch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeat", type=int, nargs="+", default=REPEATS)
    parser.add_argument("--quick", action="store_true", help="to try the script: 8 and 64 atoms, writes nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker, arguments.repeat[0], arguments.threads)))
        return
    kinds = [kind for kind in LARGEST if kind != "MACE" or arguments.mace_python]
    rows = []
    for repeat in (1, 2) if arguments.quick else arguments.repeat:
        for kind in kinds:
            if 8 * repeat**3 > LARGEST[kind]:
                continue
            python = str(arguments.mace_python) if kind == "MACE" else sys.executable
            rest = ["--worker", kind, "--repeat", str(repeat), "--threads", str(arguments.threads)]
            done = subprocess.run([python, __file__, *rest], stdout=subprocess.PIPE, text=True, check=True)
            rows.append({"what": kind} | json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    print(table(rows))
    if arguments.quick:
        return
    from common import environment, write_results

    first, last = (
        next(row["ms_per_atom"] for row in order if row["what"] == "forcedrop") for order in (rows, rows[::-1])
    )
    about = environment(0) | {"threads": arguments.threads}
    write_results("scaling", {"environment": about, "rows": rows, "largest_over_smallest": round(last / first, 3)})
    draw(rows)


def measure(kind: str, repeat: int, threads: int) -> dict[str, Any]:
    """Return atoms, time per atom [ms] and the largest memory of this process [GiB]."""
    import torch

    torch.set_num_threads(threads)
    atoms = structure("silicon", repeat=repeat)
    call = MADE[kind](atoms)
    call()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    per_atom = round(1e3 * statistics.median(times) / len(atoms), 4)
    return {"atoms": len(atoms), "ms_per_atom": per_atom, "memory_GiB": round(memory, 2)}


MADE: dict[str, Callable[[Any], Callable[[], Any]]] = {
    "forcedrop": lambda atoms: moved(atoms, calculator("silicon", uncertainty_every=10**9)),
    "16 samples": lambda atoms: moved(atoms, calculator("silicon", n_samples=16)),
    "automatic differentiation": lambda atoms: differentiated("silicon", atoms),
    "MACE": lambda atoms: moved(atoms, mace_calculator("silicon")),
}


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw cost per atom and memory against the number of atoms."""
    import matplotlib

    matplotlib.use("Agg")
    from common import RESULTS
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for what in LARGEST:
        chosen = [row for row in rows if row["what"] == what]
        if chosen:
            atoms = [row["atoms"] for row in chosen]
            left.plot(atoms, [row["ms_per_atom"] for row in chosen], "o-", label=what)
            right.plot(atoms, [row["memory_GiB"] for row in chosen], "o-", label=what)
    left.set(xscale="log", yscale="log", xlabel="atoms", ylabel="milliseconds per atom", title="silicon, one call")
    right.set(xscale="log", yscale="log", xlabel="atoms", ylabel="memory of the process [GiB]", title="memory")
    left.legend(fontsize=8)
    figure.savefig(RESULTS / "scaling.png", dpi=150)


if __name__ == "__main__":
    main()
