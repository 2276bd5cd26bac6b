from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from forcedrop.structures import BadFrames, Frame, check_frames

GOOD = Frame.from_atoms(Atoms("CO", positions=[[0, 0, 0], [1.13, 0, 0]], cell=[8, 9, 10], pbc=True), source="f.xyz#3",
                        energy=-5.0, forces=np.zeros((2, 3)), stress=np.zeros(6))  # fmt: skip
NAN = np.array([[0, 0, 0], [np.nan, 0, 0]])
CASES = {
    "forces shape": (replace(GOOD, forces=np.zeros((3, 3))), r"forces: shape must be \(2, 3\), got \(3, 3\)"),
    "stress shape": (replace(GOOD, stress=np.zeros(9)), r"stress: shape must be \(6,\), got \(9,\)"),
    "nan position": (replace(GOOD, pos=NAN), "pos: NaN or infinite at atom 1"),
    "infinite force": (
        replace(GOOD, forces=np.where(np.isnan(NAN), np.inf, NAN)),
        "forces: NaN or infinite at atom 1",
    ),
    "nan energy": (replace(GOOD, energy=float("nan")), "energy: NaN or infinite"),
    "no atoms": (replace(GOOD, z=np.zeros(0, int), pos=np.zeros((0, 3)), forces=None), "there are no atoms"),
    "element": (replace(GOOD, z=np.array([6, 14])), "atom 1 is Si; the model knows C, O"),
    "no element": (replace(GOOD, z=np.array([6, 0])), "atom 1 has atomic number 0"),
    "no cell": (
        replace(GOOD, cell=np.diag([8.0, 0, 10])),
        "cell: periodic along b, but the cell has no vector b",
    ),
    "flat cell": (replace(GOOD, cell=np.array([[8, 0, 0], [0, 9, 0], [8, 9, 0.0]])), "lie in one plane"),
    "close": (replace(GOOD, pos=np.array([[0, 0, 0], [0.2, 0, 0]])), r"atoms 0 and 1 are 0\.200 Å apart"),
    "close images": (replace(GOOD, cell=np.diag([0.25, 9, 10.0])), r"are 0\.250 Å apart|0\.\d+ Å apart"),
}


def test_good_frame() -> None:
    assert check_frames([GOOD], elements=[6, 8]) == []


@pytest.mark.parametrize("name", list(CASES))
def test_each_problem_is_named(name: str) -> None:
    frame, message = CASES[name]
    problems = check_frames([GOOD, frame], elements=[6, 8])
    assert len(problems) == 1
    assert problems[0].source == "f.xyz#3"
    with pytest.raises(BadFrames, match=message):
        raise BadFrames(problems)


def test_distances_against_brute_force() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        atoms = Atoms("C8", positions=generator.uniform(0, 2, size=(8, 3)), cell=[2, 2.2, 2.4], pbc=True)
        closest = atoms.get_all_distances(mic=True)[np.triu_indices(8, 1)].min()
        assert bool(check_frames([Frame.from_atoms(atoms)], min_distance=0.4)) == (closest < 0.4)


def test_mixed_units_across_files() -> None:
    ev = [replace(GOOD, energy=-3000.0 + 0.1 * k, source=f"a.xyz#{k}") for k in range(3)]
    kcal = [replace(f, energy=f.energy * 23.0605, source=f"b.xyz#{k}") for k, f in enumerate(ev)]
    problems = check_frames(ev + kcal)
    assert len(problems) == 1
    assert problems[0].source == "b.xyz"
    assert "kcal/mol" in problems[0].message
    other_method = [replace(f, energy=f.energy * 1.01, source=f"c.xyz#{k}") for k, f in enumerate(ev)]
    assert check_frames(ev + other_method) == []


def test_long_lists_are_shortened() -> None:
    frame = CASES["nan energy"][0]
    error = BadFrames(check_frames([replace(frame, source=f"f#{k}") for k in range(30)]))
    assert "30 bad frames" in str(error)
    assert "and 20 more" in str(error)
    assert len(error.problems) == 30
