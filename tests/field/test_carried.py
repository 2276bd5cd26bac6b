"""What a structure carries besides its geometry survives reading and writing."""

from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixedPlane, FixScaled, FixSymmetry, Hookean

from forcedrop.structures import Frame, read_frames, write_frames


def carrying() -> Atoms:
    atoms = molecule("CH3CH2OH", cell=[9.0, 9.0, 9.0], pbc=True)
    n = len(atoms)
    atoms.set_tags(np.arange(n) % 3)
    masses = atoms.get_masses()
    masses[-1] = 2.014
    atoms.set_masses(masses)
    atoms.set_velocities(np.random.default_rng(0).normal(size=(n, 3)))
    atoms.set_initial_charges(np.linspace(-0.5, 0.5, n))
    atoms.set_initial_magnetic_moments(np.linspace(0, 1, n))
    return atoms


def same_carried(a: Atoms, b: Atoms) -> None:
    np.testing.assert_array_equal(a.get_tags(), b.get_tags())
    assert a.get_tags().dtype.kind == "i"
    np.testing.assert_allclose(a.get_masses(), b.get_masses(), atol=1e-7)
    np.testing.assert_allclose(a.get_momenta(), b.get_momenta(), atol=1e-7)
    np.testing.assert_allclose(a.get_initial_charges(), b.get_initial_charges(), atol=1e-7)
    np.testing.assert_allclose(a.get_initial_magnetic_moments(), b.get_initial_magnetic_moments(), atol=1e-7)


def movement(atoms: Atoms) -> np.ndarray:
    """What constraints leave of a displacement of every atom."""
    moved = atoms.copy()
    moved.set_positions(moved.positions + np.random.default_rng(1).normal(scale=0.1, size=(len(atoms), 3)))
    return moved.positions - atoms.positions


CONSTRAINTS = {
    "fixed": [FixAtoms([0, 3])],
    "directions": [FixCartesian([1, 2], [True, False, False]), FixAtoms([0])],
    "plane": [FixedPlane(4, (0, 0, 1)), FixAtoms([0])],
    "scaled": [FixScaled([2], [True, True, False])],
    "bonds": [FixBondLengths([(0, 1)])],
    "spring": [Hookean(0, 1, 5.0, rt=2.0)],
}


@pytest.mark.parametrize("kind", list(CONSTRAINTS))
@pytest.mark.parametrize("name", ["a.xyz", "a.h5"])
def test_constraints_are_written_and_read(tmp_path: Path, kind: str, name: str) -> None:
    atoms = carrying()
    atoms.set_constraint(CONSTRAINTS[kind])
    write_frames(tmp_path / name, [Frame.from_atoms(atoms), Frame.from_atoms(molecule("H2O"))])
    first, second = read_frames(tmp_path / name)
    assert second.constraints == []
    assert second.arrays == {}
    for frame in (first, Frame.from_atoms(first.to_atoms())):
        again = frame.to_atoms()
        np.testing.assert_allclose(movement(again), movement(atoms), atol=1e-7)
        same_carried(again, atoms)
    assert kind == "spring" or (movement(first.to_atoms()) == 0).any() or kind in ("bonds", "plane", "scaled")


@pytest.mark.parametrize("name", ["a.traj", "a.db", "a.extxyz"])
def test_what_ase_wrote_is_read(tmp_path: Path, name: str) -> None:
    atoms = carrying()
    atoms.set_constraint(FixAtoms([0, 3]))
    ase.io.write(tmp_path / name, atoms)
    frame = read_frames(tmp_path / name)[0]
    assert frame.constraints == [{"name": "FixAtoms", "kwargs": {"indices": [0, 3]}}]
    same_carried(frame.to_atoms(), atoms)


def test_a_column_of_three_directions_becomes_one_constraint(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(
        "3\nProperties=species:S:1:pos:R:3:move_mask:L:3\n"
        "O 0 0 0 F F F\nH 1 0 0 T T F\nH 0 1 0 T T T\n", encoding="utf-8"
    )  # fmt: skip
    assert read_frames(tmp_path / "a.xyz")[0].constraints == [
        {"name": "FixAtoms", "kwargs": {"indices": [0]}},
        {"name": "FixCartesian", "kwargs": {"a": [1], "mask": [False, False, True]}},
    ]


def test_selective_dynamics_of_vasp(tmp_path: Path) -> None:
    atoms = molecule("H2O", cell=[8, 8, 8], pbc=True)
    atoms.set_constraint([FixAtoms([0]), FixScaled([1], [True, False, False])])
    ase.io.write(tmp_path / "POSCAR", atoms, format="vasp")
    frame = read_frames(tmp_path / "POSCAR")[0]
    np.testing.assert_allclose(movement(frame.to_atoms())[:2], movement(atoms)[:2], atol=1e-7)


def test_computed_charges_and_moments_survive(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text(
        "2\nProperties=species:S:1:pos:R:3:magmoms:R:1:charges:R:1 energy=-1.0\nFe 0 0 0 2.2 0.1\nO 1.6 0 0 0.3 -0.1\n",
        encoding="utf-8",
    )
    write_frames(tmp_path / "b.h5", read_frames(tmp_path / "a.xyz"))
    write_frames(tmp_path / "c.xyz", read_frames(tmp_path / "b.h5"))
    atoms = ase.io.read(tmp_path / "c.xyz")
    np.testing.assert_allclose(atoms.get_magnetic_moments(), [2.2, 0.3])
    np.testing.assert_allclose(atoms.get_charges(), [0.1, -0.1])
    assert atoms.get_potential_energy() == -1.0


def test_a_constraint_without_words_is_said() -> None:
    atoms = bulk("Cu", cubic=True)
    atoms.set_constraint([FixSymmetry(atoms), FixAtoms([0])])
    with pytest.warns(UserWarning, match="FixSymmetry cannot be written down"):
        frame = Frame.from_atoms(atoms)
    assert [c["name"] for c in frame.constraints] == ["FixAtoms"]


def test_a_constraint_that_is_none() -> None:
    frame = Frame.from_atoms(molecule("H2O"), constraints=[{"name": "dict2constraint", "kwargs": {}}])
    with pytest.raises(ValueError, match="no constraint that ASE knows"):
        frame.to_atoms()
