"""What K samples cost: against one call, against a loop over the samples, against committees.

    python benchmarks/sampling.py --mace-python PATH/python    # of an environment of its own with mace-torch

Forces through the ASE calculators, atoms moved a little each time: 3BPA (27 atoms) and silicon (216, periodic, with stress);
networks of the default shape with random weights and a bank of 64 random functions. K samples are K functions of the bank and
the plain network, their mean: K + 1 ways back. ``16 calls``: the plain network called once for each sample; ``committee of 5``:
five networks. MACE: 64 channels, L = 0, one model, and five in its own calculator. Also the accuracy of the shipped ethanol
model in float32, against float64 and automatic differentiation. Medians over rounds in which the programs take turns; writes
``results/sampling.json`` and ``sampling.png``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from systems import DATA, calculator, mace_calculator, moved, structure
from turns import Measured, commands, options, serve, table, take_turns

SAMPLES = (4, 8, 16, 32, 64)
SYSTEMS = ("3BPA", "silicon")
ONE = 10**9  # σ never: one pass


def main() -> None:
    """Let the workers take turns, compare, write."""
    arguments = options(__doc__, DATA).parse_args()
    if arguments.worker:
        kind, name = arguments.worker.split("/")
        samples = SAMPLES[:3] if arguments.quick else SAMPLES
        serve(WORKERS[kind](name, arguments.data, samples), arguments.threads, calls=3)
        return
    found: dict[str, Any] = {}
    for name in SYSTEMS[:1] if arguments.quick else SYSTEMS:
        found_ms = take_turns(commands(__file__, [f"{kind}/{name}" for kind in WORKERS], arguments), arguments)
        median = {k: v for rows in found_ms.values() for k, v in rows.items()}
        one = median["one call"]
        rows = [
            {"system": name, "what": what, "ms": round(ms, 1), "of one call": round(ms / one, 2)}
            | {f"of {other}": round(ms / median[other], 3) for other in ("16 calls", "MACE, 5") if other in median}
            for what, ms in median.items()
        ]
        print(table(rows), flush=True)
        found[name] = rows
    accuracy = precision(1 if arguments.quick else 20)
    print(accuracy)
    if arguments.quick:
        return
    from common import environment, write_results

    about = environment(0) | {"threads": arguments.threads, "rounds": arguments.rounds}
    write_results("sampling", {"environment": about, "rows": found, "accuracy": accuracy})
    draw(found)


def forcedrop_worker(name: str, data: Path, samples: Sequence[int]) -> Measured:
    """Time one call, K samples, a loop over 16 and five networks."""
    atoms = structure(name, data)
    single = calculator(name, uncertainty_every=ONE)
    measured = {"one call": moved(atoms, single), "16 calls": moved(atoms, [single.copy() for _ in range(16)])}
    measured["committee of 5"] = moved(atoms, [calculator(name, seed, uncertainty_every=ONE) for seed in range(5)])
    return measured | {f"K = {k}": moved(atoms, calculator(name, n_samples=k)) for k in samples}


def mace_worker(name: str, data: Path, samples: Sequence[int]) -> Measured:
    """Time one MACE model and a committee of five."""
    atoms = structure(name, data)
    return {f"MACE, {n}": moved(atoms, mace_calculator(name, n)) for n in (1, 5)}


WORKERS = {"forcedrop": forcedrop_worker, "MACE": mace_worker}


def precision(n_frames: int) -> dict[str, float]:
    """Return the largest force error [eV/Å] of the fast path in float32: of the plain network, and of any of 16 samples."""
    import torch

    from forcedrop.derive import derive, derive_functions, derive_pairs, geometry
    from forcedrop.dropout import frozen
    from forcedrop.graph import NeighbourFinder, batch_graphs, build_graph
    from forcedrop.model import load_model
    from forcedrop.structures import read_frames

    folder = Path(__file__).resolve().parent.parent / "data"
    fast, exact = (load_model(folder / "ethanol.pt").potential.eval() for _ in range(2))
    exact.double()
    errors: dict[str, list[float]] = {"plain": [], "samples": []}
    for frame in read_frames(folder / "ethanol_600K.h5")[:n_frames]:
        small, large = (
            batch_graphs([build_graph(frame, NeighbourFinder(fast.cutoff), dtype)])
            for dtype in (torch.float32, torch.float64)
        )
        graph, vec = geometry(exact, large)
        plain = derive_pairs(exact, graph, vec, large.volume).forces.detach()
        errors["plain"].append(float((derive(fast, small).forces - plain).abs().max()))
        got = derive_functions(fast, small, range(16))[1].forces
        for k in range(16):
            with frozen(exact, 0, k):
                own = derive_pairs(exact, graph, vec, large.volume).forces.detach()
            errors["samples"].append(float((got[k] - own).abs().max()))
    return {f"{name}_eV_A": float(f"{max(values):.2g}") for name, values in errors.items()}


def draw(found: dict[str, Any]) -> None:
    """Draw the cost of K samples over one call, with what a user would do instead."""
    import matplotlib

    matplotlib.use("Agg")
    from common import RESULTS
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(found), figsize=(9, 3.8), layout="constrained")
    for ax, (name, rows) in zip(axes, found.items(), strict=True):
        cost = {row["what"]: row["of one call"] for row in rows}
        ax.plot(SAMPLES, [cost[f"K = {k}"] for k in SAMPLES], "o-", label="K samples at once")
        ax.plot(SAMPLES, SAMPLES, ":", color="0.5", label="one call a sample")
        for what, colour in (("committee of 5", "C1"), ("MACE, 5", "C3"), ("MACE, 1", "C2")):
            if what in cost:
                ax.axhline(cost[what], color=colour, lw=1, label=what)
        atoms = {"3BPA": "3BPA, 27 atoms", "silicon": "silicon, 216 atoms"}[name]
        ax.set(xscale="log", yscale="log", xlabel="samples K", ylabel="time over one call", title=atoms)
        ax.set_xticks(SAMPLES, [str(k) for k in SAMPLES])
        ax.minorticks_off()
        ax.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes[0].legend(fontsize=8)
    figure.savefig(RESULTS / "sampling.png", dpi=150)


if __name__ == "__main__":
    main()
