"""What a calculator is given: everything is checked in every call, and nothing ends Python."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from hypothesis import assume, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from forcedrop.calculator import DropoutCalculator
from forcedrop.model import TrainedModel
from forcedrop.structures import Frame, check_frames, read_frames, write_frames
from forcedrop.structures.cells import complete_cell
from forcedrop.structures.search import Pairs, PairSearch, tree_pairs
from tests.conftest import banked_potential, ethanol


@pytest.fixture(scope="module")
def calculator() -> DropoutCalculator:
    return DropoutCalculator(TrainedModel(banked_potential()), n_samples=8, device="cpu")


def copper(calculator: DropoutCalculator) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=1)
    atoms.calc = calculator
    return atoms


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e12])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("where", ["cell", "positions"])
def test_numbers_that_are_none(calculator: DropoutCalculator, value: float, after: bool, where: str) -> None:
    atoms = copper(calculator)
    if after:
        atoms.get_potential_energy()
    getattr(atoms, where)[1, 1] = value
    words = "cell vector b" if where == "cell" else "position of atom 1"
    for _ in range(2):
        with pytest.raises(ValueError, match=f"the {words} is"):
            atoms.get_forces()


@pytest.mark.parametrize("distance", [0.0, 1e-12, 0.01])
@pytest.mark.parametrize("image", [False, True])
def test_two_atoms_in_one_place(calculator: DropoutCalculator, distance: float, image: bool) -> None:
    atoms = copper(calculator)
    atoms.positions[2] = atoms.positions[0] + [distance, 0, 0] + image * 3 * atoms.cell[1]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"atoms 0 and 2 are 0\.0.. Å apart"):
            atoms.get_potential_energy()


NO_ELEMENTS = {119: "of atomic number 119", -1: "of atomic number -1", 0: "of atomic number 0", 2: "He"}


@pytest.mark.parametrize("number", list(NO_ELEMENTS))
def test_elements_that_are_none(calculator: DropoutCalculator, number: int) -> None:
    atoms = copper(calculator)
    atoms.numbers[3] = number
    with pytest.raises(ValueError, match=f"atom 3 is {NO_ELEMENTS[number]}.*the model knows H, C"):
        atoms.get_forces()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("length", [1e5, 2e5, 1e6, 1e8])
def test_far_apart_is_two_molecules(calculator: DropoutCalculator, axis: int, length: float) -> None:
    def energy(atoms: Atoms) -> float:
        atoms.calc = calculator
        return float(atoms.get_potential_energy())

    one, other = ethanol(0), ethanol(1)
    other.positions[:, axis] += length
    assert energy(one + other) == pytest.approx(energy(ethanol(0)) + energy(ethanol(1)), abs=1e-5)


@pytest.mark.parametrize("pbc", list(product([False, True], repeat=3)))
@pytest.mark.parametrize("cell", [[1e6, 5, 5], [5, 5, 1e6], [1e6, 1e6, 5], [1e6, 1e6, 1e6], [1e3, 1e3, 5]])
def test_huge_cells(pbc: tuple[bool, bool, bool], cell: list[float]) -> None:
    pos = np.array([[0, 0, 0], [1, 0, 0], [2, 2, 2.0]])
    pairs = PairSearch(1.5)(pos, np.diag(cell), np.array(pbc))
    assert (pairs.i.tolist(), pairs.j.tolist()) in (([0], [1]), ([1], [0]))


@pytest.mark.parametrize("side", [1e-3, 0.02, 0.1, 0.3])
def test_cells_far_below_the_cutoff(calculator: DropoutCalculator, side: float) -> None:
    atoms = Atoms("Cu", cell=[side] * 3, pbc=True, calculator=calculator)
    with pytest.raises(ValueError, match=r"crowded|high along"):
        atoms.get_potential_energy()
    assert check_frames([Frame.from_atoms(Atoms("Cu", cell=[0.2] * 3, pbc=True))])


@pytest.mark.parametrize("periodic", [[True, False, False], [True, False, True]])
def test_a_long_structure_with_a_short_cell(periodic: list[bool]) -> None:
    pos = np.array([[0, 2e5, 0], [0, 1.8, 1.8], [1.8, 0, 1.8], [1.8, 1.8, 0]])
    start = time.monotonic()
    pairs = PairSearch(4.5)(pos, np.diag([3.61] * 3), np.array(periodic))
    assert time.monotonic() - start < 2
    assert len(pairs.i) == {1: 11, 2: 24}[sum(periodic)]  # as with the atom at 1000 Å


def test_a_crowd_is_refused_before_it_fills_the_memory() -> None:
    pos = np.random.default_rng(0).uniform(size=(100_000, 3))
    with pytest.raises(ValueError, match="crowded"):
        PairSearch(5.0)(pos, np.zeros((3, 3)), np.zeros(3, bool))


def key(pairs: Pairs) -> set[tuple[int, ...]]:
    rows = zip(pairs.i.tolist(), pairs.j.tolist(), pairs.shift.tolist(), strict=True)
    return {min((i, j, *s), (j, i, *(-x for x in s))) for i, j, s in rows}


@hypothesis_settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6), n=st.integers(1, 20), scale=st.sampled_from([3.0, 6.0, 30.0]),
    offset=st.sampled_from([0.0, 1e3, 1e6]), pbc=st.tuples(*[st.booleans()] * 3),
)  # fmt: skip
def test_the_tree_and_the_grid_agree(
    seed: int, n: int, scale: float, offset: float, pbc: tuple[bool, bool, bool]
) -> None:
    draw, periodic = np.random.default_rng(seed), np.array(pbc)
    cell = scale * np.eye(3) + draw.normal(size=(3, 3))
    pos = draw.uniform(-20, 20, (n, 3)) + offset * draw.normal(size=3)
    box = complete_cell(cell, periodic)
    try:
        found = PairSearch(3.0)(pos, cell, periodic)
    except ValueError:
        assume(False)
    tree = tree_pairs(pos, box, periodic, 3.0)
    # of the cutoff the two may differ by rounding
    assert key(found) == key(tree) or np.abs(np.concatenate([found.d, tree.d]) - 3.0).min() < 1e-6
    np.testing.assert_allclose(np.linalg.norm(pos[tree.j] + tree.shift @ box - pos[tree.i], axis=1), tree.d, atol=1e-7)


def test_the_check_costs_nothing_to_speak_of(calculator: DropoutCalculator) -> None:
    atoms = molecule("CH3CH2OH")
    frame = Frame.from_atoms(atoms)
    start = time.perf_counter()
    for _ in range(100):
        calculator._checked(frame)
    assert (time.perf_counter() - start) / 100 < 5e-4


def test_too_little_memory_is_said_clearly(calculator: DropoutCalculator, monkeypatch: pytest.MonkeyPatch) -> None:
    import forcedrop.calculator

    def full(*_: object, **__: object) -> None:
        raise RuntimeError(
            "[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried ..."
        )

    monkeypatch.setattr(forcedrop.calculator, "predict", full)
    with pytest.raises(MemoryError, match=r"4 atoms need more memory than there is; try fewer atoms.*max_memory"):
        copper(calculator).get_potential_energy()


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_file_of_far_atoms_is_read(tmp_path: Path, axis: int) -> None:
    one, other = ethanol(0), ethanol(1)
    other.positions[:, axis] += 1e6
    write_frames(tmp_path / "a.xyz", [Frame.from_atoms(one + other, energy=-100.0)] * 2)
    assert len(read_frames(tmp_path / "a.xyz")[0]) == 18
