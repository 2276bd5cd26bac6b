r"""How wrong, and does it know? Errors and measures of error bars, on plain arrays.

``error`` is prediction minus reference, ``sigma`` the predicted standard deviation, both of one unit and shape. Entries where
both are below 1e-12 (zero by symmetry) say nothing and are left out by :func:`informative`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import erf
from scipy.stats import norm, rankdata

_TINY = 1e-12


def informative(error: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return the mask of the entries that are not zero by symmetry.

    Raises:
        ValueError: if shapes differ, a value is not finite, or σ is not positive where there is an error.
    """
    error, sigma = np.asarray(error, float), np.asarray(sigma, float)
    if error.shape != sigma.shape:
        raise ValueError(f"error and sigma must have one shape, got {error.shape} and {sigma.shape}")
    if not (np.isfinite(error).all() and np.isfinite(sigma).all()):
        raise ValueError("error and sigma must be finite")
    used = (np.abs(error) > _TINY) | (sigma > _TINY)
    if np.any(sigma[used] <= 0):
        raise ValueError(f"sigma must be positive, {int(np.sum(sigma[used] <= 0))} of {int(used.sum())} are not")
    return used


def rmse(error: np.ndarray) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(np.square(error))))


def mae(error: np.ndarray) -> float:
    """Return the mean absolute value."""
    return float(np.mean(np.abs(error)))


def nll(error: np.ndarray, sigma: np.ndarray) -> float:
    r"""Return the mean Gaussian negative log-likelihood, ½(z² + ln 2πσ²)."""
    return float(np.mean(0.5 * (np.square(error / sigma) + np.log(2 * np.pi * np.square(sigma)))))


def crps(error: np.ndarray, sigma: np.ndarray) -> float:
    r"""Return the mean continuous ranked probability score of a Gaussian, σ[z(2Φ(z)−1) + 2φ(z) − 1/√π].

    Source: Gneiting & Raftery, JASA 102, 359 (2007), eq. 21.
    """
    z = error / sigma
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return float(np.mean(sigma * (z * erf(z / np.sqrt(2)) + 2 * density - 1 / np.sqrt(np.pi))))


def relative_log_likelihood(error: np.ndarray, sigma: np.ndarray) -> float:
    r"""Return the RLL in percent: 100 when σ = \|error\| everywhere, 0 when no better than one constant σ, the RMSE.

    100·(NLL_constant − NLL) / (NLL_constant − NLL_oracle). Source: Kellner & Ceriotti, Mach. Learn. Sci. Technol. 5, 035006
    (2024). Errors of 0 have no oracle and are left out.
    """
    used = np.abs(error) > _TINY
    error, sigma = error[used], sigma[used]
    constant = nll(error, np.full_like(error, rmse(error)))
    oracle = nll(error, np.abs(error))
    return 100 * (constant - nll(error, sigma)) / (constant - oracle) if constant > oracle else 0.0


def mean_z2(error: np.ndarray, sigma: np.ndarray) -> float:
    """Return the mean squared z-score: 1 when honest, above when σ is too small."""
    return float(np.mean(np.square(error / sigma)))


def block_bootstrap(
    values: np.ndarray, blocks: np.ndarray, *, level: float = 0.95, draws: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of a mean when whole blocks (frames) are drawn, whose entries are correlated."""
    _, index = np.unique(blocks, return_inverse=True)
    totals, counts = np.bincount(index, values), np.bincount(index)
    generator = np.random.default_rng(seed)
    pick = generator.integers(0, len(counts), size=(draws, len(counts)))
    means = totals[pick].sum(1) / counts[pick].sum(1)
    tail = 50 * (1 - level)
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def calibration_curve(error: np.ndarray, sigma: np.ndarray, points: int = 101) -> tuple[np.ndarray, np.ndarray]:
    """Return nominal shares 0 … 1 and the shares of the errors inside the central Gaussian interval of each."""
    nominal = np.linspace(0, 1, points)
    z = np.sort(np.abs(error / sigma).ravel())
    bound = norm.ppf(0.5 + nominal / 2)
    return nominal, np.searchsorted(z, bound, side="right") / z.size


def miscalibration_area(error: np.ndarray, sigma: np.ndarray) -> float:
    """Return the area between the calibration curve and the diagonal, 0 when honest, at most ½.

    Source: Kuleshov, Fenner & Ermon, ICML 2018; central intervals as in ``uncertainty-toolbox``.
    """
    nominal, observed = calibration_curve(error, sigma)
    return float(np.trapezoid(np.abs(observed - nominal), nominal))


def ence(error: np.ndarray, sigma: np.ndarray, bins: int = 20) -> float:
    r"""Return the expected normalised calibration error over ``bins`` equally filled bins of σ: mean \|RMV − RMSE\|/RMV.

    Source: Levi et al., Sensors 22, 5540 (2022), eq. 8.
    """
    order = np.argsort(sigma.ravel(), kind="stable")
    terms = []
    for part in np.array_split(order, min(bins, order.size)):
        rmv = rmse(sigma.ravel()[part])
        terms.append(abs(rmv - rmse(error.ravel()[part])) / rmv)
    return float(np.mean(terms))


def auroc(positive: np.ndarray, score: np.ndarray) -> float:
    """Return the probability that a positive has the higher score (ties count half); nan if one class is empty.

    The Mann-Whitney statistic, from ranks.
    """
    positive = np.asarray(positive, bool)
    n = int(positive.sum())
    m = positive.size - n
    if n == 0 or m == 0:
        return float("nan")
    return float((rankdata(score)[positive].sum() - n * (n + 1) / 2) / (n * m))


def precision_at(positive: np.ndarray, score: np.ndarray, k: int) -> float:
    """Return the share of positives among the ``k`` highest scores."""
    top = np.argsort(-score, kind="stable")[:k]
    return float(np.mean(np.asarray(positive, bool)[top]))


def spearman(error: np.ndarray, sigma: np.ndarray) -> float:
    r"""Return the rank correlation of \|error\| with σ; nan if one of them is constant."""
    if np.ptp(np.abs(error)) == 0 or np.ptp(sigma) == 0:
        return float("nan")
    return float(np.corrcoef(rankdata(np.abs(error)), rankdata(sigma))[0, 1])


def spearman_ceiling(sigma: np.ndarray, draws: int = 20, seed: int = 0) -> float:
    """Return the rank correlation that honest Gaussian errors with this very σ would have, on average."""
    generator = np.random.default_rng(seed)
    return float(np.mean([spearman(generator.normal(size=sigma.shape) * sigma, sigma) for _ in range(draws)]))


def atom_norms(error: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the per-atom force error, the norm of the vector, and its σ, √tr Σ, each (N,), from components (N, 3)."""
    return np.linalg.norm(error, axis=1), np.linalg.norm(sigma, axis=1)


@dataclass(frozen=True)
class UncertaintyReport:
    """Error and honesty of one property; likelihood measures in its own unit."""

    rmse: float
    mae: float
    sigma_rms: float
    nll: float
    crps: float
    rll: float
    z2: float
    z2_interval: tuple[float, float]
    miscalibration_area: float
    ence: float
    spearman: float
    spearman_ceiling: float
    n: int

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def sentence(self) -> str:
        """Say in words whether σ is honest here."""
        low, high = self.z2_interval
        factor = np.sqrt(self.z2)
        if low > 1.1:
            return f"σ is too small by a factor {factor:.2f} on this set"
        if high < 0.9:
            return f"σ is too large by a factor {1 / factor:.2f} on this set"
        return "σ is honest on this set, as far as its size tells"


def uncertainty_report(error: np.ndarray, sigma: np.ndarray, blocks: np.ndarray) -> UncertaintyReport:
    """Return all measures of one property.

    Args:
        error: prediction minus reference, shape (n,).
        sigma: predicted standard deviation, shape (n,).
        blocks: which frame each entry belongs to, shape (n,).

    Raises:
        ValueError: see :func:`informative`; also if nothing is left.
    """
    used = informative(error, sigma)
    if not used.any():
        raise ValueError("all errors and sigmas are 0: nothing to report")
    error, sigma, blocks = np.asarray(error)[used], np.asarray(sigma)[used], np.asarray(blocks)[used]
    return UncertaintyReport(
        rmse=rmse(error),
        mae=mae(error),
        sigma_rms=rmse(sigma),
        nll=nll(error, sigma),
        crps=crps(error, sigma),
        rll=relative_log_likelihood(error, sigma),
        z2=mean_z2(error, sigma),
        z2_interval=block_bootstrap(np.square(error / sigma), blocks),
        miscalibration_area=miscalibration_area(error, sigma),
        ence=ence(error, sigma),
        spearman=spearman(error, sigma),
        spearman_ceiling=spearman_ceiling(sigma),
        n=int(used.sum()),
    )
