"""What the shipped model, which has seen ethanol at 300 K and nothing else, says where it has no data: nothing that cannot be."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.optimize import BFGSLineSearch

from forcedrop import DropoutCalculator
from forcedrop.structures import read_frames

DATA = Path(__file__).resolve().parents[2] / "data"


@pytest.fixture(scope="module")
def calculator() -> DropoutCalculator:
    return DropoutCalculator(DATA / "ethanol.pt", n_samples=8)


def energy(calculator: DropoutCalculator, atoms: Atoms) -> float:
    atoms.calc = calculator
    return float(atoms.get_potential_energy())


def test_an_atom_alone_has_its_own_energy(calculator: DropoutCalculator) -> None:
    for frame in read_frames(DATA / "ethanol_atoms.h5"):
        assert energy(calculator, frame.to_atoms()) == pytest.approx(frame.energy, abs=1e-12)
        assert calculator.results["energy_uncertainty"] == 0.0


def test_a_molecule_pulled_apart_is_its_atoms(calculator: DropoutCalculator) -> None:
    atoms = molecule("CH3CH2OH")
    alone = sum(energy(calculator, Atoms(symbol)) for symbol in atoms.symbols)
    atoms.positions *= 5.0
    assert energy(calculator, atoms) == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize("pair", ["HH", "CH", "OH", "CC", "CO", "OO"])
def test_two_atoms_have_a_wall_and_let_go(calculator: DropoutCalculator, pair: str) -> None:
    distances = np.linspace(0.2, 4.0, 77)
    energies = np.array([energy(calculator, Atoms(pair, positions=[[0, 0, 0], [0, 0, r]])) for r in distances])
    least = int(energies.argmin())
    assert 0.6 < distances[least] < 2.0
    assert (np.diff(energies[: least + 1]) < 0).all()
    assert energies[0] - energies[least] > 20
    assert energies[-1] == pytest.approx(sum(energy(calculator, Atoms(symbol)) for symbol in pair), abs=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_line_search_does_not_fall_into_the_core(calculator: DropoutCalculator, seed: int) -> None:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=seed)
    atoms.calc = calculator
    assert BFGSLineSearch(atoms, logfile=None).run(fmax=0.01, steps=200)
    assert atoms.get_potential_energy() == pytest.approx(-309.957, abs=0.01)
    distances = atoms.get_all_distances()
    assert distances[distances > 0].min() > 0.9


def test_forces_are_the_same_far_away(calculator: DropoutCalculator, tmp_path: Path) -> None:
    atoms = molecule("CH3CH2OH")
    atoms.calc = calculator
    near = atoms.get_forces()
    for far in (1e2, 1e4, 1e6):
        moved = atoms.copy()
        moved.positions += far
        moved.calc = calculator
        np.testing.assert_allclose(moved.get_forces(), near, atol=1e-5)
