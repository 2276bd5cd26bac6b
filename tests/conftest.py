"""Structures and networks that the tests share. Everything here is small and made from a seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from forcedrop.derive import geometry
from forcedrop.graph import AtomicGraph, NeighbourFinder, batch_graphs, build_graph
from forcedrop.potential import DropoutRates, EnergyModel, build
from forcedrop.structures import Frame

torch.set_num_threads(1)

RATES = DropoutRates(edge=0.3, message=0.1, update=0.2, readout=0.5)
NONE = DropoutRates()
SMALL = {
    "sphere": {"cutoff": 4.0, "n_channels": 6, "n_layers": 2, "l_max": 2, "n_radial": 4, "n_hidden": 8},
    "painn": {"cutoff": 4.0, "n_channels": 6, "n_layers": 2, "n_radial": 4},
}
"""Shapes for tests, by kind of network."""


def make_potential(
    elements: tuple[int, ...] = (1, 6, 8, 14, 29),
    rates: DropoutRates = RATES,
    seed: int = 0,
    kind: str = "sphere",
    **settings: object,
) -> EnergyModel:
    """A network with random weights in float64, its norms measured on ethanol, no weight left at a special value."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        potential = build(kind, {**SMALL[kind], **settings}, elements, {z: -1.0 * z for z in elements}).double()
        with torch.no_grad():
            for name, weight in potential.named_parameters():
                if weight.requires_grad and not weight.any():
                    weight.normal_()
                assert weight.any() or not weight.requires_grad, name
    potential.eval().set_rates(rates)
    if {1, 6, 8} <= set(elements):
        graph, vec = geometry(potential, batch_of([ethanol()], potential.cutoff))
        potential.measure(vec, graph)
    return potential


def banked_potential(seed: int = 0, n: int = 8, **settings: object) -> EnergyModel:
    """The same without masks within the network, but with a regression's weights and a centred bank of functions."""
    potential = make_potential(rates=NONE, seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    shape = potential.correction.weight.shape
    bank = 0.1 * torch.randn(n, *shape, dtype=torch.float64, generator=generator)
    weight = 0.05 * torch.randn(*shape, dtype=torch.float64, generator=generator)
    potential.set_functions(weight, bank - bank.mean(0))
    return potential


SAMPLED = {"masks": make_potential, "bank": banked_potential}
"""Networks with functions: through automatic differentiation, and through the way back written out by hand."""


def ethanol(seed: int = 0) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=seed)
    return atoms


def silicon(seed: int = 0) -> Atoms:
    """A triclinic two-atom cell, smaller than the cutoff."""
    atoms = bulk("Si", a=5.43)
    atoms.set_cell(atoms.cell.array @ (np.eye(3) + np.random.default_rng(seed).normal(scale=0.05, size=(3, 3))), True)
    atoms.rattle(0.05, seed=seed)
    return atoms


def copper() -> Atoms:
    """One atom in a cell smaller than the cutoff."""
    return bulk("Cu", a=3.6)


def slab(seed: int = 0) -> Atoms:
    """Periodic along two directions, an atom outside the cell."""
    atoms = bulk("Si", a=5.43, cubic=True)
    atoms.pbc = (True, True, False)
    atoms.rattle(0.05, seed=seed)
    atoms.positions[0] -= 2 * atoms.cell[0]
    return atoms


STRUCTURES = {"ethanol": ethanol, "silicon": silicon, "copper": copper, "slab": slab}


def graph_of(atoms: Atoms, cutoff: float, dtype: torch.dtype = torch.float64, **labels: object) -> AtomicGraph:
    return build_graph(Frame.from_atoms(atoms, **labels), NeighbourFinder(cutoff), dtype)


def batch_of(images: list[Atoms], cutoff: float, dtype: torch.dtype = torch.float64):
    return batch_graphs([graph_of(atoms, cutoff, dtype) for atoms in images])


@pytest.fixture(params=list(STRUCTURES))
def structure(request: pytest.FixtureRequest) -> Atoms:
    return STRUCTURES[request.param]()


@pytest.fixture(scope="session")
def potential() -> EnergyModel:
    return make_potential()


@pytest.fixture(scope="session", params=list(SAMPLED))
def sampled_potential(request: pytest.FixtureRequest) -> EnergyModel:
    return SAMPLED[request.param]()


def emt_frames(n: int = 24, seed: int = 0, scale: float = 0.08) -> list[Frame]:
    """Rattled 4-atom copper cells with EMT labels, stress included."""
    from ase.calculators.emt import EMT

    generator = np.random.default_rng(seed)
    frames = []
    for k in range(n):
        atoms = bulk("Cu", a=3.6, cubic=True)
        atoms.set_cell(atoms.cell.array @ (np.eye(3) + generator.normal(scale=0.02, size=(3, 3))), scale_atoms=True)
        atoms.positions += generator.normal(scale=scale, size=(4, 3))
        atoms.calc = EMT()
        frames.append(
            Frame.from_atoms(
                atoms, energy=float(atoms.get_potential_energy()), forces=atoms.get_forces(), stress=atoms.get_stress(),
                source=f"emt#{k}",
            )
        )  # fmt: skip
    return frames


def settings(folder: object, **changes: object) -> dict:
    """A training file for a few seconds."""
    values = {
        "output": f"{folder}/run",
        "data": {"train": [f"{folder}/train.h5"], "isolated_atoms": {"Cu": 0.0}},
        "model": {"cutoff": 4.0, "n_channels": 6, "l_max": 2, "n_radial": 4, "n_hidden": 8},
        "optimiser": {"warmup_steps": 5},
        "epochs": 9,
        "uncertainty": {"functions": 16, "frames": 20},
        "batch_size": 4,
        "precision": "float64",
        "device": "cpu",
    }
    for key, change in changes.items():
        old = values.get(key)
        values[key] = {**old, **change} if isinstance(old, dict) and isinstance(change, dict) else change
    return values


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory: pytest.TempPathFactory):
    """A folder with train.h5 and a finished training on it in run/."""
    from forcedrop.structures import write_frames
    from forcedrop.training import parse_config, train

    folder = tmp_path_factory.mktemp("trained")
    write_frames(folder / "train.h5", emt_frames(40))
    train(parse_config(settings(folder, epochs=46)))
    return folder


@pytest.fixture(scope="session")
def trained(trained_folder):
    """A small trained and calibrated model of copper, float64."""
    from forcedrop.model import load_model

    return load_model(trained_folder / "run" / "model.pt")
