"""One training step of forcedrop and of MACE, side by side.

    python benchmarks/training_step.py --mace-python PATH/python    # of an environment of its own with mace-torch

Five 3BPA molecules (27 atoms each), loss of energies and forces, gradient, optimiser, average of the weights. MACE: 64 channels,
L=0, two layers, r_max 5 Å, float32. Medians over rounds in which the programs take turns. Writes
``benchmarks/results/training_step.json``.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from systems import DATA, ISOLATED, mace_model
from turns import commands, options, serve, take_turns

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Start both workers, let them take turns, compare."""
    parser = options(__doc__, DATA, WORKERS)
    parser.add_argument("--compile", action="store_true", help="also the compiled step (compiling takes minutes)")
    arguments = parser.parse_args()
    if arguments.worker:
        serve(WORKERS[arguments.worker](arguments.data), arguments.threads)
        return
    kinds = [kind for kind in WORKERS if arguments.compile or kind != "forcedrop compiled"]
    medians = take_turns(commands(__file__, kinds, arguments), arguments)
    ratios = {
        kind: {what: round(v / medians["MACE"][what], 3) for what, v in rows.items() if what in medians["MACE"]}
        for kind, rows in medians.items()
        if "MACE" in medians and kind != "MACE"
    }
    for kind, row in medians.items():
        print(f"{kind:20}", "  ".join(f"{what}: {ms:.1f} ms" for what, ms in row.items()), ratios.get(kind, ""))
    if arguments.quick:
        return
    from common import environment, write_results

    about = environment(0) | {"threads": arguments.threads, "rounds": arguments.rounds}
    write_results("training_step", {"environment": about, "median_ms": medians, "over_mace": ratios})


def _mace(data: Path) -> dict[str, Callable[[], Any]]:
    model = mace_model("3BPA")  # first: it lets e3nn load its constants
    import torch
    from ase.io import read
    from mace import data as mace_data
    from mace import modules, tools
    from mace.tools import torch_geometric

    images = read(data, ":40")
    keys = mace_data.KeySpecification(info_keys={"energy": "energy"}, arrays_keys={"forces": "forces"})
    table = tools.AtomicNumberTable(sorted(ISOLATED))
    configurations = []
    for image in images:
        image.info["energy"], image.arrays["forces"] = image.get_potential_energy(), image.get_forces()
        image.pbc, image.cell, image.calc = False, None, None
        configurations.append(mace_data.config_from_atoms(image, key_specification=keys))
    graphs = [mace_data.AtomicData.from_config(c, z_table=table, cutoff=5.0) for c in configurations]
    loader = torch_geometric.dataloader.DataLoader(graphs, batch_size=5, shuffle=False)
    batches = [batch.to_dict() for batch in loader]
    raw = list(loader)
    loss_function = modules.WeightedEnergyForcesLoss(energy_weight=1.0, forces_weight=100.0)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-4, amsgrad=True)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    count = [0]

    def step() -> None:
        index = count[0] % len(batches)
        count[0] += 1
        optimiser.zero_grad(set_to_none=True)
        loss = loss_function(pred=model(batches[index], training=True), ref=raw[index])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimiser.step()
        average.update_parameters(model)

    return {"training step": step}


def _forcedrop(data: Path, dropout: bool = False, compiled: bool = False) -> dict[str, Callable[[], Any]]:
    from itertools import cycle

    from ase.data import chemical_symbols
    from race import DROPOUT

    from forcedrop.training import load_config, parse_config
    from forcedrop.training.data import prepare_data
    from forcedrop.training.run import build_trainer

    recipe = load_config(ROOT / "examples" / "configs" / "3bpa.yaml").model_dump(mode="json", exclude_unset=True)
    recipe["data"] = {"train": [str(data)], "isolated_atoms": {chemical_symbols[z]: e for z, e in ISOLATED.items()}}
    if dropout:
        recipe["dropout"] = DROPOUT
    config = parse_config({**recipe, "device": "cpu"} | ({"compile": True} if compiled else {}))
    trainer = build_trainer(config, prepare_data(config))
    batches = cycle(list(trainer.batches()))

    def step() -> None:
        trainer.progress.step = 1  # not the first of an epoch: what is done every 50 steps is not part of a step
        trainer.run_step(next(batches))

    return {"training step": step}


WORKERS: dict[str, Callable[[Path], dict[str, Callable[[], Any]]]] = {
    "forcedrop": _forcedrop,
    "forcedrop dropout": lambda data: _forcedrop(data, dropout=True),
    "forcedrop compiled": lambda data: _forcedrop(data, compiled=True),
    "MACE": _mace,
}

if __name__ == "__main__":
    main()
