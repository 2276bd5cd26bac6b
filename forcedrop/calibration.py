r"""From the raw spread of the samples to σ, the standard deviation expected against the reference method.

One factor scales the *samples about their mean*, so energy, forces and stress stay the derivatives of one another, sample by
sample. It is fitted by likelihood on frames that neither trained nor stopped the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np

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
        scale: the factor on the spread, fitted on forces (the many), or on energies where there are no forces.
        scales: the factor that each property on its own would ask for, by name; a diagnosis, not applied.
        n_frames: frames it was fitted on.
        n_samples: samples K they were predicted with.
        levels: sorted σ of the calibration frames by criterion, from which thresholds are taken.
    """

    scale: float
    scales: dict[str, float] = field(default_factory=dict)
    n_frames: int = 0
    n_samples: int = 0
    levels: dict[str, list[float]] = field(default_factory=dict)

    def apply(self, samples: np.ndarray) -> np.ndarray:
        """Scale samples about their mean; sample axis first."""
        mean = samples.mean(axis=0)
        return mean + self.scale * (samples - mean)

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

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`."""
        return cls(**values)
