"""Asserters for anybody's potential, mask or error bars; each says what it measured when it fails.

They take functions and arrays, not forcedrop's classes, so that other networks can be held to the same law.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from ase import Atoms
from torch import Tensor

from forcedrop.bootstrap import BlockBootstrap

Evaluate = Callable[[Atoms], tuple[np.ndarray, np.ndarray]]
"""Atoms → energies (K,) [eV] and forces (K, N, 3) [eV/Å] of K samples (one sample is K = 1)."""


def random_rotation(generator: np.random.Generator) -> np.ndarray:
    """Return a rotation or rotation-inversion, uniform over O(3), shape (3, 3)."""
    q, r = np.linalg.qr(generator.normal(size=(3, 3)))
    return np.asarray(q * np.sign(np.diag(r)))


def assert_equivariant(evaluate: Evaluate, atoms: Atoms, *, tolerance: float = 1e-9, seed: int = 0) -> None:
    """Assert that every sample's energy is invariant and its forces covariant.

    Under a rotation with inversion, a translation and a permutation of the atoms.

    Raises:
        AssertionError: with the transformation and the largest deviation [eV, eV/Å].
    """
    generator = np.random.default_rng(seed)
    energy, forces = evaluate(atoms)
    rotation = random_rotation(generator)
    rotated = atoms.copy()
    rotated.set_cell(atoms.cell.array @ rotation.T)
    rotated.positions = atoms.positions @ rotation.T
    moved = atoms.copy()
    moved.translate(generator.normal(size=3))
    order = generator.permutation(len(atoms))
    cases = {
        "rotation": (rotated, forces @ rotation.T),
        "translation": (moved, forces),
        "permutation": (atoms[order], forces[:, order]),
    }
    for name, (changed, expected) in cases.items():
        new_energy, new_forces = evaluate(changed)
        _close(f"energy under {name}", new_energy, energy, tolerance)
        _close(f"forces under {name}", new_forces, expected, tolerance)


def assert_conservative(
    evaluate: Evaluate,
    atoms: Atoms,
    *,
    step: float = 2e-5,
    tolerance: float = 1e-5,
    seed: int = 0,
    directions: int = 4,
) -> None:
    """Assert that every sample's forces are minus the gradient of its energy, by central differences.

    Along random directions of unit length in the space of all positions, ``step`` in Å.

    Raises:
        AssertionError: with the largest deviation [eV/Å].
    """
    generator = np.random.default_rng(seed)
    _, forces = evaluate(atoms)
    for _ in range(directions):
        direction = generator.normal(size=(len(atoms), 3))
        direction /= np.linalg.norm(direction)
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions += sign * step * direction
            energies.append(evaluate(moved)[0])
        slope = (energies[0] - energies[1]) / (2 * step)
        _close("force against finite difference", -(forces * direction).sum(axis=(1, 2)), slope, tolerance)


def assert_smooth(
    function: Callable[[float], np.ndarray],
    start: float,
    stop: float,
    *,
    points: int = 200,
    factor: float = 50.0,
) -> None:
    """Assert that a function of one variable has no jump between ``start`` and ``stop``.

    A jump shows as a step between neighbouring points that is ``factor`` times the median step and does not shrink when the
    interval around it is halved eight times.

    Raises:
        AssertionError: with the place and the height of the jump.
    """
    x = np.linspace(start, stop, points)
    values = np.array([np.ravel(function(float(t))) for t in x])
    steps = np.abs(np.diff(values, axis=0)).max(axis=1)
    scale = float(np.median(steps)) + 1e-14
    for k in np.flatnonzero(steps > factor * scale):
        low, high = float(x[k]), float(x[k + 1])
        f_low, f_high = values[k], values[k + 1]
        for _ in range(8):
            middle = 0.5 * (low + high)
            f_middle = np.ravel(function(middle))
            if np.abs(f_middle - f_low).max() > np.abs(f_high - f_middle).max():
                high, f_high = middle, f_middle
            else:
                low, f_low = middle, f_middle
        jump = float(np.abs(f_high - f_low).max())
        if jump > 0.1 * steps[k]:
            raise AssertionError(f"jump of {jump:.3g} between {low:.8g} and {high:.8g}")


def assert_unbiased_mask(mask: Tensor, p: float, *, sigmas: float = 5.0) -> None:
    """Assert that an inverted-dropout mask holds 0 and 1/(1−p) only and has mean 1 within ``sigmas`` standard errors.

    Raises:
        AssertionError: with the offending value or the mean.
    """
    kept = 1 / (1 - p)
    values = mask.double()
    wrong = (values != 0) & ((values - kept).abs() > 1e-6 * kept)
    if bool(wrong.any()):
        raise AssertionError(f"a mask value is {float(values[wrong][0])}, not 0 or {kept}")
    error = (p / (1 - p) / values.numel()) ** 0.5
    mean = float(values.mean())
    if abs(mean - 1) > sigmas * error + 1e-12:
        raise AssertionError(f"the mask's mean is {mean:.5f}, more than {sigmas} standard errors ({error:.2g}) from 1")


def assert_calibrated(
    error: np.ndarray,
    sigma: np.ndarray,
    blocks: np.ndarray | None = None,
    *,
    low: float = 0.9,
    high: float = 1.1,
) -> None:
    """Assert that the 95 % block-bootstrap interval of mean z² meets [``low``, ``high``].

    Args:
        error: prediction minus reference, shape (n,).
        sigma: predicted standard deviation, shape (n,).
        blocks: which frame each entry belongs to; each its own if not given.
        low: smallest acceptable mean z².
        high: largest.

    Raises:
        AssertionError: with mean z² and its interval.
    """
    z2 = np.square(np.ravel(error) / np.ravel(sigma))
    interval = BlockBootstrap(np.arange(len(z2)) if blocks is None else blocks).interval(z2)
    if interval[0] > high or interval[1] < low:
        raise AssertionError(
            f"mean z² is {z2.mean():.3f}, 95 % interval {interval[0]:.3f} … {interval[1]:.3f}, outside {low} … {high}"
        )


def _close(what: str, got: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    deviation = float(np.abs(np.asarray(got) - np.asarray(expected)).max())
    if not deviation <= tolerance:
        raise AssertionError(f"{what}: deviates by {deviation:.3g}, allowed {tolerance:.3g}")
