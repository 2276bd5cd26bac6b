"""What a calibration is chosen to be, on force errors whose law is known."""

import numpy as np
import pytest
from ase import Atoms

from forcedrop.calibration import Calibration, Growth
from forcedrop.metrics import nll
from forcedrop.training.calibrate import CANDIDATES, ForceErrors, calibrate, choose, cross_validate, monotone
from tests.conftest import emt_frames, graph_of


def made(exponent: float = 0.0, elements: dict[int, float] | None = None, frames: int = 60) -> ForceErrors:
    """Errors that are Gaussian with σ = 2 s (1 + s²)^(γ/2) e_Z; spreads differ by an order of magnitude."""
    generator = np.random.default_rng(3)
    z = np.tile([1, 6, 6, 8], frames)
    std = np.exp(generator.normal(scale=0.8, size=(len(z), 1))) * np.ones(3)
    factor = 2 * (1 + std**2) ** (exponent / 2) * np.array([(elements or {}).get(int(n), 1.0) for n in z])[:, None]
    return ForceErrors(generator.normal(size=std.shape) * factor * std, std, z, np.arange(len(z)) // 4)


def test_the_simplest_that_fits_is_chosen() -> None:
    plain = choose(made())
    assert (plain.curve.exponent, plain.elements) == (0.0, {})
    assert plain.curve.scale == pytest.approx(2.0, rel=0.1)
    grown = choose(made(1.0))
    assert grown.elements == {}
    assert grown.curve.exponent == pytest.approx(1.0, abs=0.25)
    own = choose(made(1.0, {1: 0.3, 6: 1.0, 8: 3.0}))
    assert own.elements[8] / own.elements[1] == pytest.approx(10, rel=0.2)


def test_few_frames_decide_nothing() -> None:
    found = choose(made(1.0, {1: 0.3, 8: 3.0}, frames=9))
    assert (found.curve.exponent, found.elements) == (0.0, {})


def test_scores_are_those_of_frames_left_out() -> None:
    """A calibration that fits the frames it saw perfectly is judged by others."""
    seen: list[set[int]] = []

    def candidate(forces: ForceErrors) -> Calibration:
        seen.append(set(forces.frame.tolist()))
        return Calibration(Growth(2.0))

    forces = made()
    scores = cross_validate(forces, candidate)
    assert [len(own) for own in seen] == [48] * 5
    assert set.intersection(*seen) == set()
    for own, score in zip(seen, scores, strict=True):
        out = ~np.isin(forces.frame, list(own))
        assert score == pytest.approx(nll(forces.error[out], 2 * forces.std[out]))


def test_every_candidate_is_worth_its_name() -> None:
    forces = made(1.0, {1: 0.3, 6: 1.0, 8: 3.0})
    one, growing, by_element = (cross_validate(forces, candidate).mean() for candidate in CANDIDATES)
    assert by_element < growing < one
    assert cross_validate(made(1.0), monotone).mean() == pytest.approx(
        cross_validate(made(1.0), CANDIDATES[1]).mean(), abs=0.05
    )
    assert isinstance(choose(forces).curve, Growth)


@pytest.mark.parametrize(("beyond", "rel"), [(3.95, 1e-3), (30.0, 1e-9)])
def test_atoms_that_no_potential_can_know_do_not_calibrate(trained, beyond: float, rel: float) -> None:
    """An atom without neighbours has no force and no spread, whatever its label says; one at the cutoff next to none."""
    with_one, without = [], []
    for frame in emt_frames(6, seed=3):
        atoms = frame.to_atoms()
        atoms.pbc = False
        without.append(graph_of(atoms, 4.0, forces=frame.forces))
        top = atoms.positions[np.argmax(atoms.positions[:, 2])]
        atoms = atoms + Atoms("Cu", top[None] + [0, 0, beyond])
        with_one.append(graph_of(atoms, 4.0, forces=np.vstack([frame.forces, [[0.1, 0.2, 0.3]]])))
    expected = calibrate(trained, without)
    alone = Atoms("Cu", cell=[12.0] * 3, pbc=True)
    with_one.append(graph_of(alone, 4.0, energy=-0.3, stress=np.full(6, 0.01)))
    with pytest.warns(UserWarning, match=r"7 atoms of the frames to calibrate on have no neighbour within 3.2 Å"):
        found = calibrate(trained, with_one)
    assert found.scales["forces"] == pytest.approx(expected.scales["forces"], rel=rel)
    assert found.quantiles["atoms"] == pytest.approx(expected.quantiles["atoms"], rel=rel)
    assert found.curve.scale == pytest.approx(expected.curve.scale, rel=rel)
