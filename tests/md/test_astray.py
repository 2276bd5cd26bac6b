"""One set of rules, looked at directly; what the guard and the learning loop make of them is in their own tests."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from forcedrop.md.astray import Kind, Rules, Trouble, closest_allowed, find_overlap
from forcedrop.structures import Frame

RADII = {(1, 1): 0.62, (1, 6): 1.07, (6, 6): 1.52}
RULES = Rules(sigma=1.0, closest=closest_allowed([29], share=0.6), temperature=1200.0, cutoff=4.0)


def look(squeeze: float = 1.0, sigma: float = 0.5, temperature: float = 300.0, **changes: object) -> Trouble | None:
    atoms = bulk("Cu", a=3.6 * squeeze, cubic=True)
    frame = Frame(**{**vars(Frame.from_atoms(atoms)), **changes})
    alone = RULES.alone(frame)
    return RULES.trouble(frame, sigma, temperature, alone, alone)


def test_each_rule() -> None:
    assert look() is None
    assert look(sigma=1.1) == (Kind.HIGH, "max_force σ 1.1 above 1")
    assert look(temperature=1300) == (Kind.HOT, "1300 K above 1200 K")
    assert look(squeeze=0.5).kind is Kind.OVERLAP
    for trouble in (look(sigma=np.nan), look(temperature=np.nan), look(pos=np.full((4, 3), np.nan))):
        assert trouble is not None


def test_overlap_by_hand() -> None:
    """Distances in units of the sum of the radii: 2 · 0.31 Å for H₂, 0.76 + 0.31 Å for CH."""

    def overlaps(atoms: Atoms, share: float) -> bool:
        return find_overlap(Frame.from_atoms(atoms), closest_allowed(atoms.numbers, share=share)) is not None

    for atoms, nearest in (
        (Atoms("H2", [[0, 0, 0], [0, 0, 0.31]]), 0.5),
        (Atoms("CH", [[0, 0, 0], [0, 0, 0.428]]), 0.4),
        (Atoms("H2", [[0.1, 0, 0], [4.79, 0, 0]], cell=[5, 5, 5], pbc=True), 0.5),
    ):
        assert overlaps(atoms, nearest + 0.01)
        assert not overlaps(atoms, nearest - 0.01)
    assert not overlaps(Atoms("H"), 1.0)
    assert not overlaps(molecule("CH3CH2OH"), 0.9)


def test_who_was_alone_before_is_not_lost() -> None:
    frame = Frame.from_atoms(Atoms("H3", [[0, 0, 0], [0, 0, 1.0], [0, 0, 9.0]]))
    rules = Rules(sigma=1.0, closest={}, cutoff=5.0)
    alone = rules.alone(frame)
    assert alone.tolist() == [False, False, True]
    for before, lost in ((None, False), (alone, False), (np.zeros(3, bool), True)):
        trouble = rules.trouble(frame, 0.5, 0.0, alone, before)
        assert (trouble is not None) == lost
    assert trouble == (Kind.LOST, "H2 left all others by more than 4 Å, where σ knows nothing")
    assert Rules(sigma=1.0, closest={}).alone(frame) is None


def test_distances_come_from_the_training_set() -> None:
    provenance = {"training_set": {"shortest_distance": {"H-C": 1.0, "H-H": 1.6}}}
    closest = closest_allowed([6, 1, 8], provenance, share=0.5)
    assert closest[(1, 6)] == 0.5
    assert closest[(1, 1)] == 0.8
    assert closest[(6, 8)] == pytest.approx(0.5 * (0.76 + 0.66))
    assert set(closest) == {(1, 1), (1, 6), (1, 8), (6, 6), (6, 8), (8, 8)}
    assert closest_allowed([1, 6], share=1.0) == {pair: pytest.approx(value) for pair, value in RADII.items()}
