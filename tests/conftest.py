"""Structures and networks that the tests share. Everything here is small and made from a seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from forcedrop.graph import AtomicGraph, NeighbourFinder, batch_graphs, build_graph, pair_vectors
from forcedrop.potential import DropoutRates, Potential, PotentialConfig
from forcedrop.structures import Frame

torch.set_num_threads(1)

RATES = DropoutRates(edge=0.1, message=0.1, update=0.2, readout=0.5)
FEATURES_ONLY = DropoutRates(edge=0.0, message=0.1, update=0.2, readout=0.5)


def make_potential(
    elements: tuple[int, ...] = (1, 6, 8, 14, 29),
    rates: DropoutRates = RATES,
    seed: int = 0,
    **settings: object,
) -> Potential:
    """A network with random weights in float64, its norms measured on ethanol, no weight left at a special value."""
    shape = {
        "cutoff": 4.0,
        "n_channels": 6,
        "n_layers": 2,
        "l_max": 2,
        "n_radial": 4,
        "n_hidden": 8,
        **settings,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = PotentialConfig(elements=elements, dropout=rates, **shape)  # type: ignore[arg-type]
        potential = Potential(config, {z: -1.0 * z for z in elements}).double()
        with torch.no_grad():
            potential.species_bias.normal_()
            potential.hidden_bias.normal_()
    if {1, 6, 8} <= set(elements):
        batch = batch_of([ethanol()], potential.config.cutoff)
        potential.measure_norms(batch, pair_vectors(batch, 2 * potential.config.cutoff))
    return potential.eval()


def posterior_potential(seed: int = 0, **settings: object) -> Potential:
    """The same without dropout sites, with a refit and a posterior of what the energy is read from."""
    potential = make_potential(rates=DropoutRates(), seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    n = potential.n_readout
    potential.refit = 0.05 * torch.randn(n, dtype=torch.float64, generator=generator)
    potential.posterior = 0.02 * torch.randn(n, n, dtype=torch.float64, generator=generator)
    return potential


SAMPLED = {"masks": make_potential, "posterior": posterior_potential}
"""Networks with something to sample: through automatic differentiation, and through the way back written out by hand."""


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
def potential() -> Potential:
    return make_potential()


@pytest.fixture(scope="session", params=list(SAMPLED))
def sampled_potential(request: pytest.FixtureRequest) -> Potential:
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
        "stage_one": {"epochs": 6},
        "dropout": {"update": 0.1, "readout": 0.3, "bank": 4},
        "stage_two": {"epochs": 3, "samples": 2},
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
    train(parse_config(settings(folder, stage_one={"epochs": 40}, stage_two={"epochs": 6})))
    return folder


@pytest.fixture(scope="session")
def trained(trained_folder):
    """A small trained and calibrated model of copper, float64."""
    from forcedrop.training import load_model

    return load_model(trained_folder / "run" / "model.pt")
