r"""From the raw spread of the samples to σ, the standard deviation expected against the reference method.

The *samples* are scaled about their mean, the force on an atom by a factor :math:`f_i = c(s_i)\,e_{Z_i}`: a curve c of the root
mean square spread :math:`s_i` of its force components (:class:`Growth`) and, where it pays, a factor of the element. Where a
network knows little, errors grow faster than spreads do, and that shows already among the frames that it was calibrated on.
Energies and stress take the root mean square of a structure's factors: shares of single atoms in an energy are no more than a
convention, and cancel, so they must not be scaled apart. Where held-out frames ask for more, a factor of their own besides:
functions that all fit the energies of the training set alike may say too little about others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
from ase.data import chemical_symbols

CRITERIA = {"max_force": "eV/Å", "mean_force": "eV/Å", "energy_per_atom": "eV"}
"""What frames are ranked by, and its unit: largest atomic force σ, mean atomic force σ, energy σ per atom.

The *atomic force σ* is that of the force on an atom as a vector, √tr Σ: the norm of the σ of its three components. Where σ of a
component is meant, it is called that.
"""
MEANING = {
    "max_force": "largest atomic force σ, the norm of its components' σ",
    "mean_force": "mean of the atomic force σ",
    "energy_per_atom": "σ of the energy over the number of atoms",
}
"""The criteria in words."""


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


def local_spread(forces_std: np.ndarray) -> np.ndarray:
    """Return each atom's root mean square spread of its force components, shape (…, N), from spreads (…, N, 3)."""
    mean: np.ndarray = np.sqrt(np.mean(np.square(forces_std), axis=-1))
    return mean


@dataclass(frozen=True)
class Growth:
    r"""The factor :math:`a\,(1 + s^2/s_0^2)^{\gamma/2}`, s at most 30 s₀; γ = 0 is one factor for all.

    Attributes:
        scale: a.
        exponent: γ, in [0, 2].
        reference: :math:`s_0` [eV/Å].
    """

    scale: float
    exponent: float = 0.0
    reference: float = 1.0

    def factor(self, spread: np.ndarray) -> np.ndarray:
        """Return the factors."""
        relative = np.minimum(np.square(spread / self.reference), FARTHEST**2)
        factor: np.ndarray = self.scale * (1 + relative) ** (self.exponent / 2)
        return factor

    def sentence(self) -> str:
        """Say the formula."""
        if not self.exponent:
            return f"σ = {self.scale:.2f} × spread"
        return f"σ = {self.scale:.2f} × spread × (1 + (spread/{self.reference:.2g} eV/Å)²)^{self.exponent / 2:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    @classmethod
    def fit(cls, error: np.ndarray, std: np.ndarray) -> Self:
        r"""Maximise the Gaussian likelihood of force errors.

        :math:`s_0` is the geometric mean of the atoms' spreads; for each γ the best a is known (:func:`fit_scale`), so one number
        is searched for.

        Args:
            error: force errors, shape (n, 3), one row an atom.
            std: their spreads.

        Raises:
            ValueError: see :func:`fit_scale`.
        """
        from scipy.optimize import minimize_scalar  # half a second, and only who fits needs it

        fit_scale(error, std)  # says what is wrong with the numbers
        used = local_spread(std) > 1e-12
        error, std = error[used], std[used]
        local = local_spread(std)
        reference = float(np.exp(np.mean(np.log(local))))

        def at(gamma: float) -> tuple[float, float]:
            shape = std * cls(1.0, gamma, reference).factor(local)[:, None]
            scale = fit_scale(error, shape)
            return scale, _score(error, scale * shape)

        found = minimize_scalar(
            lambda gamma: at(gamma)[1], bounds=(0.0, LARGEST_EXPONENT), method="bounded", options={"xatol": 1e-3}
        )
        gamma = float(found.x) if found.fun < at(0.0)[1] else 0.0
        return cls(at(gamma)[0], gamma, reference)


def _score(error: np.ndarray, sigma: np.ndarray) -> float:
    """Return the mean Gaussian negative log-likelihood but for a constant, of what is not zero by symmetry."""
    seen = sigma > 1e-12
    return float(np.mean(0.5 * np.square(error[seen] / sigma[seen]) + np.log(sigma[seen])))


FEWEST_ATOMS = 30
"""Atoms of an element below which it has no factor of its own."""


def fit_elements(error: np.ndarray, sigma: np.ndarray, z: np.ndarray) -> dict[int, float]:
    """Return the factor that each element asks for once σ is scaled, by atomic number.

    Args:
        error: force errors, shape (n, 3).
        sigma: their σ.
        z: atomic numbers, shape (n,).
    """
    found = {}
    for number in np.unique(z):
        rows = (z == number) & (local_spread(sigma) > 1e-12)
        found[int(number)] = fit_scale(error[rows], sigma[rows]) if rows.sum() >= FEWEST_ATOMS else 1.0
    return found


COVERAGES = (0.5, 0.68, 0.8, 0.9, 0.95, 0.99)
"""For which conformal quantiles are kept."""


def conformal_quantiles(error: np.ndarray, sigma: np.ndarray, n_frames: int) -> dict[float, float]:
    r"""Return the q for which an interval of ±qσ holds a stated share of new errors, whatever their distribution.

    Of :math:`|error|/σ` on n calibration frames the smallest value that a share k/n, k = ⌈(n+1)·coverage⌉, does not exceed
    (with one value a frame, the k-th smallest); no entry where k is above n: too few frames can promise no such coverage.
    Source: split conformal prediction (Papadopoulos et al., ECML 2002; Angelopoulos & Bates, arXiv 2107.07511, sec. 1). The
    promise is for frames that are exchangeable with the calibration frames; entries of one frame depend on each other: frames
    are counted.
    """
    used = (np.abs(error) > 1e-12) | (sigma > 1e-12)
    ratio = np.sort(np.abs(error[used]) / np.maximum(sigma[used], 1e-12), axis=None)
    found = {}
    for coverage in COVERAGES:
        k = math.ceil((n_frames + 1) * coverage - 1e-9)  # 0.68 · 75 is 51 and a little in floating point
        if k <= n_frames and len(ratio):
            found[coverage] = float(ratio[-(-k * len(ratio) // n_frames) - 1])
    return found


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
        curve: from an atom's spread to its factor, fitted on forces (the many), or one factor from energies where there are no
            forces.
        elements: a further factor by atomic number; 1 for those that are not there.
        own: a further factor of a property (``energy``, which is that of the atoms' energies too, or ``stress``), where held-out
            frames ask for another than that of the forces.
        scales: the factor that each property on its own would ask for, by name, once the samples are scaled by ``curve`` and
            ``elements`` (1 is honest).
        quantiles: conformal quantiles by property (``energy``, ``forces`` by component, ``atoms`` for force vectors in units of
            √tr Σ, ``stress``), then by coverage.
        n_frames: frames it was fitted on.
        n_samples: samples K they were predicted with.
        levels: sorted σ of the calibration frames by criterion, from which thresholds are taken.
    """

    curve: Growth
    elements: dict[int, float] = field(default_factory=dict)
    own: dict[str, float] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    quantiles: dict[str, dict[float, float]] = field(default_factory=dict)
    n_frames: int = 0
    n_samples: int = 0
    levels: dict[str, list[float]] = field(default_factory=dict)

    def factors(self, spread: np.ndarray, z: np.ndarray) -> np.ndarray:
        """Return each atom's factor from its :func:`local_spread` and its atomic number, both of shape (N,)."""
        return self.curve.factor(spread) * np.array([self.elements.get(int(number), 1.0) for number in z])

    def apply(
        self, samples: Mapping[str, np.ndarray], z: np.ndarray, mean: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Scale the samples of one structure about their mean.

        Samples that are fewer than in calibration are scaled a little more, see :func:`few_samples`.

        Args:
            samples: by property, sample axis first: ``energy`` (B,), ``energies`` (B, N), ``forces`` (K, N, 3), ``stress``
                (K, 6); the forces must be there.
            z: atomic numbers, shape (N,).
            mean: of all functions there are, by property; the samples' own by default.

        Returns:
            The same properties: forces by each atom's factor, all else by the root mean square of the factors, and by the
            property's own where it has one.
        """
        factor = self.factors(local_spread(samples["forces"].std(axis=0, ddof=1)), z)
        common = float(np.sqrt(np.mean(np.square(factor))))
        scaled = {}
        for name, x in samples.items():
            own = self.own.get("energy" if name == "energies" else name, 1.0)
            f: Any = factor[:, None] if name == "forces" else common * own
            if self.n_samples:
                f = f * np.sqrt(few_samples(len(x)) / few_samples(self.n_samples))
            centre = x.mean(axis=0) if mean is None else np.asarray(mean[name])
            scaled[name] = centre + f * (x - centre)
        return scaled

    def sigma(self, samples: Mapping[str, np.ndarray], z: np.ndarray) -> dict[str, np.ndarray]:
        """Return the calibrated standard deviations (ddof 1) of one structure by property, from its samples."""
        return deviations(self.apply(samples, z))

    def quantile(self, name: str, coverage: float) -> float:
        """Return q: ±q·σ holds a share ``coverage`` of the errors of a property, see :func:`conformal_quantiles`.

        Raises:
            ValueError: for a property or a coverage that this calibration holds no quantile of.
        """
        known = self.quantiles.get(name, {})
        if coverage not in known:
            raise ValueError(
                f"no conformal quantile of {name!r} for a coverage of {coverage}; there are "
                + ("; ".join(f"{n}: {', '.join(map(str, q))}" for n, q in self.quantiles.items()) or "none")
            )
        return known[coverage]

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
        elements = ", ".join(f"{chemical_symbols[z]} {value:.2f}" for z, value in sorted(self.elements.items()))
        own = ", ".join(f"{name} × {value:.2f}" for name, value in self.own.items())
        return (
            self.curve.sentence()
            + (f", by element × ({elements})" if elements else "")
            + (f"; of its own {own}" if own else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a checkpoint."""
        return {**asdict(self), "curve": self.curve.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`."""
        return cls(**{**values, "curve": Growth(**values["curve"])})


def deviations(samples: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the standard deviations (ddof 1) over the samples, the first axis, by property."""
    return {name: x.std(axis=0, ddof=1) for name, x in samples.items()}


FEWEST = 4
"""Functions below which there is no calibrated σ: the mean square of error over spread is infinite."""
FEW = 8
"""Functions below which σ says little."""


def few_samples(k: int) -> float:
    r"""Return (K−1)/(K−3), the mean of σ²/s² when s² is the variance of K Gaussian samples, K at least 4.

    An error over a spread of few samples follows a Student distribution of K−1 degrees of freedom, whose variance this is: at
    K = 16 errors squared are on average 1.15 of the spread squared even when every sample is right.
    """
    k = max(k, FEWEST)
    return (k - 1) / (k - 3)


def difference_sigma(first: np.ndarray, second: np.ndarray) -> float:
    """Return σ of the difference of two structures' energies from their calibrated samples (K,), of the same draws.

    Sample k is one potential, so what it has wrong about both structures alike drops out.

    Raises:
        ValueError: if the numbers of samples differ.
    """
    if first.shape != second.shape:
        raise ValueError(f"samples of the same draws are needed, got {len(first)} and {len(second)}")
    return float((first - second).std(ddof=1))


def force_covariance(forces: np.ndarray) -> np.ndarray:
    """Return each atom's covariance of force components [eV²/Å²], shape (N, 3, 3), from samples (K, N, 3); ddof 1.

    Its rank is at most K − 1, and its entries are as uncertain as those of K vectors: see ``docs/error_bars.md``.
    """
    deviation = forces - forces.mean(axis=0)
    return np.einsum("kni,knj->nij", deviation, deviation) / (len(forces) - 1)
