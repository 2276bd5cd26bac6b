r"""From the raw spread of the samples to σ, the standard deviation expected against the reference method.

The *samples* are scaled about their mean, the force on an atom by

.. math:: f_i = a\,(1 + s_i^2 / s_0^2)^{\gamma/2},

with :math:`s_i` the root mean square spread of its force components. Where a network knows little, errors grow faster than
spreads do, and that shows already among the frames that it was calibrated on: a and γ are fitted by likelihood on frames that
neither trained nor stopped the model; γ = 0 is one factor for all. Energies and stress take the root mean square of a structure's
factors: shares of single atoms in an energy are no more than a convention, and cancel, so they must not be scaled apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from scipy.optimize import minimize_scalar

CRITERIA = ("max_force", "mean_force", "energy_per_atom")
"""What frames are ranked by: largest atomic force σ, mean atomic force σ [eV/Å], energy σ per atom [eV]."""


def fit_scale(error: np.ndarray, std: np.ndarray) -> float:
    r"""Return the factor s that maximises the Gaussian likelihood of ``error`` under σ = s·``std``: s² = mean (error/std)².

    Source: Levi et al., Sensors 22, 5540 (2022), eq. 10. Entries where both are below 1e-12 are left out (zero by symmetry).

    Raises:
        ValueError: if shapes differ, nothing is left, or a ``std`` of 0 meets an error.
    """
    error, std = np.ravel(error), np.ravel(std)
    if error.shape != std.shape:
        raise ValueError(f"errors and spreads differ in number: {error.size} and {std.size}")
    used = (np.abs(error) > 1e-12) | (std > 1e-12)
    if not used.any():
        raise ValueError("no error and no spread to fit a scale factor to")
    if np.any(std[used] <= 0):
        raise ValueError(f"{int(np.sum(std[used] <= 0))} of {int(used.sum())} spreads are 0 where the error is not")
    return float(np.sqrt(np.mean((error[used] / std[used]) ** 2)))


LARGEST_EXPONENT = 2.0
"""Of γ: beyond, a few frames decide."""


FARTHEST = 30.0
"""Spreads above so many s₀ grow no further: there is nothing left to say but "unknown"."""


def growth(forces_std: np.ndarray, reference: float, exponent: float) -> np.ndarray:
    r"""Return :math:`(1 + s_i^2/s_0^2)^{\gamma/2}` for each atom, shape (…, N), from spreads (…, N, 3); s at most 30 s₀."""
    mean_square = np.mean(np.square(forces_std), axis=-1)
    return (1 + np.minimum(mean_square / reference**2, FARTHEST**2)) ** (exponent / 2)


def fit_growth(error: np.ndarray, std: np.ndarray) -> tuple[float, float, float]:
    r"""Return a, γ and :math:`s_0` that maximise the Gaussian likelihood of force errors, σ being :math:`f_i` times ``std``.

    :math:`s_0` is the geometric mean of the atoms' spreads, γ lies in [0, 2]; for each γ the best a is known
    (:func:`fit_scale`), so one number is searched for.

    Args:
        error: force errors, shape (n, 3), one row an atom.
        std: their spreads.

    Raises:
        ValueError: see :func:`fit_scale`.
    """
    fit_scale(error, std)  # says what is wrong with the numbers
    used = np.mean(np.square(std), axis=1) > 1e-24
    error, std = error[used], std[used]
    reference = float(np.exp(np.mean(0.5 * np.log(np.mean(np.square(std), axis=1)))))

    def spread(gamma: float) -> np.ndarray:
        return std * growth(std, reference, gamma)[:, None]

    def score(gamma: float) -> float:
        sigma = fit_scale(error, spread(gamma)) * spread(gamma)
        seen = sigma > 1e-12
        return float(np.mean(0.5 * np.square(error[seen] / sigma[seen]) + np.log(sigma[seen])))

    found = minimize_scalar(score, bounds=(0.0, LARGEST_EXPONENT), method="bounded", options={"xatol": 1e-3})
    gamma = float(found.x) if found.fun < score(0.0) else 0.0
    return fit_scale(error, spread(gamma)), gamma, reference


def frame_criteria(forces_sigma: np.ndarray, energy_sigma: float) -> dict[str, float]:
    """Return the values by which a frame is ranked, from σ of its forces (N, 3) [eV/Å] and energy [eV]."""
    atomic = np.sqrt(np.sum(np.square(forces_sigma), axis=1))
    return {
        "max_force": float(atomic.max()),
        "mean_force": float(atomic.mean()),
        "energy_per_atom": float(energy_sigma) / len(atomic),
    }


@dataclass(frozen=True)
class Calibration:
    """What ships inside a model.

    Attributes:
        scale: a, the factor on small spreads, fitted on forces (the many), or on energies where there are no forces.
        exponent: γ.
        reference: :math:`s_0` [eV/Å].
        scales: the factor that each property on its own would ask for, by name, once the samples are scaled by this calibration
            (1 is honest); a diagnosis, not applied.
        n_frames: frames it was fitted on.
        n_samples: samples K they were predicted with.
        levels: sorted σ of the calibration frames by criterion, from which thresholds are taken.
    """

    scale: float
    exponent: float = 0.0
    reference: float = 1.0
    scales: dict[str, float] = field(default_factory=dict)
    n_frames: int = 0
    n_samples: int = 0
    levels: dict[str, list[float]] = field(default_factory=dict)

    def factors(self, forces: np.ndarray) -> np.ndarray:
        """Return each atom's factor, shape (N,), from the samples of the forces (K, N, 3) [eV/Å]."""
        return self.scale * growth(forces.std(axis=0, ddof=1), self.reference, self.exponent)

    def apply(self, samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Scale the samples of one structure about their mean.

        Args:
            samples: by property, sample axis first: ``energy`` (K,), ``energies`` (K, N), ``forces`` (K, N, 3), ``stress``
                (K, 6); the forces must be there.

        Returns:
            The same properties: forces by each atom's factor, all else by the root mean square of the factors.
        """
        factor = self.factors(samples["forces"])
        common = np.sqrt(np.mean(np.square(factor)))

        def scaled(x: np.ndarray, f: Any) -> np.ndarray:
            mean = x.mean(axis=0)
            return mean + f * (x - mean)

        return {name: scaled(x, factor[:, None] if name == "forces" else common) for name, x in samples.items()}

    def sigma(self, samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the calibrated standard deviations (ddof 1) of one structure by property, from its samples."""
        return {name: x.std(axis=0, ddof=1) for name, x in self.apply(samples).items()}

    def threshold(self, criterion: str, quantile: float) -> float:
        """Return the σ below which a share ``quantile`` of the calibration frames lies.

        Raises:
            ValueError: for an unknown criterion, a quantile outside [0, 1], or a calibration without levels.
        """
        if criterion not in CRITERIA:
            raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
        if not 0 <= quantile <= 1:
            raise ValueError(f"the quantile must lie in [0, 1], got {quantile}")
        if not self.levels.get(criterion):
            raise ValueError(f"this calibration holds no levels of {criterion}")
        return float(np.quantile(self.levels[criterion], quantile))

    def sentence(self) -> str:
        """Say how σ comes from the spread."""
        if not self.exponent:
            return f"σ = {self.scale:.2f} × spread"
        return f"σ = {self.scale:.2f} × spread × (1 + (spread/{self.reference:.2g} eV/Å)²)^{self.exponent / 2:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`."""
        return cls(**values)
