"""What a step of molecular dynamics costs: without σ, with σ now and then, with σ always; and what of it is the adapter.

    python benchmarks/md_step.py --mace-python PATH/python    # of an environment of its own with mace-torch

Velocity Verlet through ASE, 3BPA (27 atoms), 20 steps a measurement. ``network alone``: energy and forces of a graph that is
already there, 20 times; what a step costs beyond that is ASE, the adapter and the neighbour list. Networks of the default
shape, 16 samples of a bank; MACE: 64 channels, L = 0, one model, and five in its own calculator. Medians over rounds in which the
programs take turns; writes ``results/md_step.json`` and ``md_step.png``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from systems import DATA, calculator, mace_calculator, structure
from turns import Measured, commands, options, serve, table, take_turns

STEPS = 20
NEVER = 10**9


def main() -> None:
    """Let the workers take turns, compare, write."""
    arguments = options(__doc__, DATA, WORKERS).parse_args()
    if arguments.worker:
        serve(WORKERS[arguments.worker](arguments.data), arguments.threads, calls=1 if arguments.quick else 2)
        return
    median = {
        k: v / STEPS
        for rows in take_turns(commands(__file__, WORKERS, arguments), arguments).values()
        for k, v in rows.items()
    }
    plain = median["no σ"]
    rows = [
        {"what": what, "ms a step": round(ms, 2), "of a step without σ": round(ms / plain, 3)}
        for what, ms in median.items()
    ]
    print(table(rows))
    share = round(1 - median["network alone"] / plain, 3)
    print(f"beyond the network: {share:.1%} of a step without σ")
    if arguments.quick:
        return
    from common import environment, write_results

    about = environment(0) | {"threads": arguments.threads, "rounds": arguments.rounds}
    write_results("md_step", {"environment": about, "rows": rows, "beyond_the_network": share})
    draw(rows)


def forcedrop_worker(data: Path) -> Measured:
    """Time dynamics without σ, at every tenth and at every step, and the network alone."""
    import torch

    from forcedrop.derive import derive
    from forcedrop.graph import NeighbourFinder, batch_graphs, build_graph
    from forcedrop.structures import Frame

    made: dict[str, Callable[[], Any]] = {}
    for what, every in (("no σ", NEVER), ("σ at every 10th step", 10), ("σ at every step", 1)):
        made[what] = dynamics(structure("3BPA", data), calculator("3BPA", uncertainty_every=every))
    potential = calculator("3BPA").potential
    graph = build_graph(Frame.from_atoms(structure("3BPA", data)), NeighbourFinder(potential.cutoff), torch.float32)
    batch = batch_graphs([graph])
    made["network alone"] = lambda: [derive(potential, batch) for _ in range(STEPS)]
    return made


def mace_worker(data: Path) -> Measured:
    """Time dynamics with one MACE model and with a committee of five."""
    return {f"MACE, {n}": dynamics(structure("3BPA", data), mace_calculator("3BPA", n)) for n in (1, 5)}


WORKERS = {"forcedrop": forcedrop_worker, "MACE": mace_worker}


def dynamics(atoms: Any, calculator: Any) -> Callable[[], Any]:
    """Return a call that runs :data:`STEPS` steps of 0.05 fs: random weights bind nothing together."""
    from ase import units
    from ase.md.verlet import VelocityVerlet

    atoms.calc = calculator
    integrator = VelocityVerlet(atoms, 0.05 * units.fs)

    def call() -> None:
        atoms.set_momenta(0 * atoms.get_momenta())
        integrator.run(STEPS)

    return call


def draw(rows: list[dict[str, Any]]) -> None:
    """Draw a bar for each kind of step."""
    import matplotlib

    matplotlib.use("Agg")
    from common import RESULTS
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(7, 0.5 * len(rows) + 1), layout="constrained")
    names = [row["what"] for row in rows][::-1]
    values = [row["ms a step"] for row in rows][::-1]
    bars = ax.barh(names, values, color=["C3" if name.startswith("MACE") else "C0" for name in names])
    ax.bar_label(bars, [f"{v:.1f}" for v in values], padding=3)
    ax.set_xlabel("milliseconds a step, 27 atoms")
    ax.margins(x=0.12)
    figure.savefig(RESULTS / "md_step.png", dpi=150)


if __name__ == "__main__":
    main()
