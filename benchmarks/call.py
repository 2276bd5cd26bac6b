"""One call for energy, forces and stress through the ASE calculators: forcedrop, its float64, automatic differentiation, MACE.

    python benchmarks/call.py --mace-python PATH/python    # of an environment of its own with mace-torch

3BPA (27 atoms) and silicon crystals (8, 64, 216 atoms), atoms moved a little each time; networks of the default shape, MACE: 64
channels, L = 0, float32. ``differentiated`` is the same network through automatic differentiation, which training uses. Medians
over rounds in which the programs take turns; writes ``results/call.json`` and ``call.png``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from systems import DATA, calculator, differentiated, mace_calculator, moved, structure
from turns import Measured, commands, options, serve, table, take_turns

SYSTEMS = {
    "silicon, 8": ("silicon", 1),
    "3BPA, 27": ("3BPA", 1),
    "silicon, 64": ("silicon", 2),
    "silicon, 216": ("silicon", 3),
}
NEVER = 10**9


def main() -> None:
    """Let the workers take turns, compare, write."""
    arguments = options(__doc__, DATA, WORKERS).parse_args()
    systems = dict(list(SYSTEMS.items())[:2]) if arguments.quick else SYSTEMS
    if arguments.worker:
        serve(WORKERS[arguments.worker](arguments.data, systems), arguments.threads)
        return
    median = take_turns(commands(__file__, WORKERS, arguments), arguments)
    rows = [{"atoms": name} | {f"{kind} [ms]": round(median[kind][name], 1) for kind in median} for name in systems]
    if "MACE" in median:
        for row in rows:
            row["over MACE"] = round(median["forcedrop"][row["atoms"]] / median["MACE"][row["atoms"]], 3)
    print(table(rows))
    if arguments.quick:
        return
    from common import environment, write_results

    about = environment(0) | {"threads": arguments.threads, "rounds": arguments.rounds}
    write_results("call", {"environment": about, "rows": rows})
    draw(median)


Systems = Mapping[str, tuple[str, int]]


def each_system(data: Path, systems: Systems, make: Callable[[str], Any]) -> Measured:
    """Return a call for each system with a calculator of its own."""
    return {label: moved(structure(name, data, repeat), make(name)) for label, (name, repeat) in systems.items()}


def forcedrop_worker(data: Path, systems: Systems) -> Measured:
    """Time what users get."""
    return each_system(data, systems, lambda name: calculator(name, uncertainty_every=NEVER))


def double_worker(data: Path, systems: Systems) -> Measured:
    """Time the same in float64."""
    import torch

    return each_system(data, systems, lambda name: calculator(name, uncertainty_every=NEVER, dtype=torch.float64))


def differentiated_worker(data: Path, systems: Systems) -> Measured:
    """Time automatic differentiation of a graph that is already there."""
    return {label: differentiated(name, structure(name, data, repeat)) for label, (name, repeat) in systems.items()}


def mace_worker(data: Path, systems: Systems) -> Measured:
    """Time MACE."""
    return each_system(data, systems, mace_calculator)


WORKERS = {
    "forcedrop": forcedrop_worker,
    "float64": double_worker,
    "differentiated": differentiated_worker,
    "MACE": mace_worker,
}


def draw(median: dict[str, dict[str, float]]) -> None:
    """Draw the time of a call for each system and program."""
    import matplotlib

    matplotlib.use("Agg")
    from common import RESULTS
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    for kind, times in median.items():
        ax.plot(list(SYSTEMS), [times[name] for name in SYSTEMS], "o-", label=kind)
    ax.set(yscale="log", ylabel="milliseconds a call", xlabel="system, atoms")
    ax.legend()
    figure.savefig(RESULTS / "call.png", dpi=150)


if __name__ == "__main__":
    main()
