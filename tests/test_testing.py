"""The asserters must be able to fail."""

import numpy as np
import pytest
import torch
from ase import Atoms

from forcedrop import testing
from forcedrop.dropout import feature_mask
from tests.conftest import ethanol


def pair_potential(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Springs between all pairs, two samples of different stiffness."""
    vec = atoms.positions[None] - atoms.positions[:, None]
    k = np.array([1.0, 2.0])
    energy = 0.25 * k * (vec**2).sum()
    return energy, k[:, None, None] * vec.sum(1)[None]


def test_a_good_potential_passes() -> None:
    testing.assert_equivariant(pair_potential, ethanol())
    testing.assert_conservative(pair_potential, ethanol())


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("rotation", lambda atoms: atoms.positions[:, 0] ** 2),
        ("translation", lambda atoms: np.linalg.norm(atoms.positions, axis=1)),
        ("permutation", lambda atoms: np.arange(len(atoms)) * (atoms.positions - atoms.positions.mean(0)).std(1) * 0
         + np.linalg.norm(atoms.positions - atoms.positions.mean(0), axis=1) * np.arange(len(atoms))),
    ],
)  # fmt: skip
def test_each_broken_symmetry_is_caught(name: str, wrong) -> None:
    def evaluate(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        energy, forces = pair_potential(atoms)
        return energy + wrong(atoms).sum(), forces

    with pytest.raises(AssertionError, match=f"energy under {name}: deviates by"):
        testing.assert_equivariant(evaluate, ethanol())


def test_wrong_forces_are_caught() -> None:
    def evaluate(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        energy, forces = pair_potential(atoms)
        forces[1, 0, 0] += 0.1
        return energy, forces

    with pytest.raises(AssertionError, match="finite difference"):
        testing.assert_conservative(evaluate, ethanol())


def test_a_jump_is_caught_and_a_kink_is_not() -> None:
    testing.assert_smooth(lambda x: np.array([abs(x), np.sin(9 * x)]), -1, 1)
    testing.assert_smooth(lambda x: np.array([max(0.0, x) ** 3]), -1, 1)
    with pytest.raises(AssertionError, match=r"jump of 0\.\d+ between 0\.2999"):
        testing.assert_smooth(lambda x: np.array([x + 0.9 * (x > 0.3)]), -1, 1)


def test_masks() -> None:
    mask = feature_mask(0.3, 1000, seed=0, samples=10, site="a")
    testing.assert_unbiased_mask(mask, 0.3)
    with pytest.raises(AssertionError, match="not 0 or"):
        testing.assert_unbiased_mask((mask > 0).float(), 0.3)
    with pytest.raises(AssertionError, match="mask's mean"):
        testing.assert_unbiased_mask(torch.full((1000,), 1 / 0.7), 0.3)


def test_calibration() -> None:
    generator = np.random.default_rng(0)
    sigma = np.exp(generator.normal(size=3000))
    error = sigma * generator.normal(size=3000)
    testing.assert_calibrated(error, sigma)
    for factor in (0.7, 1.5):
        with pytest.raises(AssertionError, match="mean z² is"):
            testing.assert_calibrated(error, factor * sigma)
