r"""How wrong, and does it know? Errors and measures of error bars, on plain arrays.

``error`` is prediction minus reference, ``sigma`` the predicted standard deviation, both of one unit and shape. Entries that are
zero by symmetry say nothing about a network and are left out by :func:`informative`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.special import erf
from scipy.stats import norm, rankdata

from forcedrop.bootstrap import BlockBootstrap, Interval

_TINY = 1e-12
POINTS = 101
"""Of a calibration curve."""
BINS = 20
"""Of σ in ENCE."""


def informative(error: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return the mask of the entries that are not zero by symmetry.

    A force that symmetry forbids has no spread but for rounding, and an error that is the noise of the reference method: entries
    with σ below 1 % of its root mean square *and* an error below 10 % of its own are left out, or both below 1e-12. A larger
    error with such a σ is a fault and stays.

    Raises:
        ValueError: if shapes differ, a value is not finite, or σ is not positive where there is an error.
    """
    error, sigma = np.asarray(error, float), np.asarray(sigma, float)
    if error.shape != sigma.shape:
        raise ValueError(f"error and sigma must have one shape, got {error.shape} and {sigma.shape}")
    if not (np.isfinite(error).all() and np.isfinite(sigma).all()):
        raise ValueError("error and sigma must be finite")
    if not error.size:
        return np.zeros(error.shape, bool)
    used = (np.abs(error) > max(_TINY, 0.1 * rmse(error))) | (sigma > max(_TINY, 0.01 * rmse(sigma)))
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
    return float(np.mean(nll_terms(error, sigma)))


def nll_terms(error: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return what :func:`nll` is the mean of."""
    terms: np.ndarray = 0.5 * (np.square(error / sigma) + np.log(2 * np.pi * np.square(sigma)))
    return terms


def crps(error: np.ndarray, sigma: np.ndarray) -> float:
    r"""Return the mean continuous ranked probability score of a Gaussian, σ[z(2Φ(z)−1) + 2φ(z) − 1/√π].

    Source: Gneiting & Raftery, JASA 102, 359 (2007), eq. 21.
    """
    return float(np.mean(crps_terms(error, sigma)))


def crps_terms(error: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Return what :func:`crps` is the mean of."""
    z = error / sigma
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    terms: np.ndarray = sigma * (z * erf(z / np.sqrt(2)) + 2 * density - 1 / np.sqrt(np.pi))
    return terms


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


def calibration_curve(error: np.ndarray, sigma: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """Return nominal shares 0 … 1 and the shares of the errors inside the central Gaussian interval of each."""
    nominal, bound = _central_intervals(points)
    z = np.sort(np.abs(error / sigma).ravel())
    return nominal, np.searchsorted(z, bound, side="right") / z.size


def _central_intervals(points: int) -> tuple[np.ndarray, np.ndarray]:
    """Return nominal shares 0 … 1 and the half widths, in units of σ, of the central Gaussian intervals that hold them."""
    nominal = np.linspace(0, 1, points)
    return nominal, norm.ppf(0.5 + nominal / 2)


def miscalibration_area(error: np.ndarray, sigma: np.ndarray) -> float:
    """Return the area between the calibration curve and the diagonal, 0 when honest, at most ½.

    Source: Kuleshov, Fenner & Ermon, ICML 2018; central intervals as in ``uncertainty-toolbox``.
    """
    nominal, observed = calibration_curve(error, sigma)
    return float(np.trapezoid(np.abs(observed - nominal), nominal))


def ence(error: np.ndarray, sigma: np.ndarray, bins: int = BINS) -> float:
    r"""Return the expected normalised calibration error over ``bins`` equally filled bins of σ: mean \|RMV − RMSE\|/RMV.

    Source: Levi et al., Sensors 22, 5540 (2022), eq. 8.
    """
    place = _equal_bins(sigma, bins)
    sums = np.concatenate([np.bincount(place, np.square(x).ravel()) for x in (error, sigma)])
    return float(_ence_of_sums(sums[None])[0])


def _equal_bins(sigma: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each entry, equally filled in the order of σ, flat."""
    order = np.argsort(sigma.ravel(), kind="stable")
    place = np.empty(order.size, dtype=int)
    for number, part in enumerate(np.array_split(order, min(bins, order.size))):
        place[part] = number
    return place


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


def detection(error: np.ndarray, sigma: np.ndarray, share: float, blocks: np.ndarray) -> dict[str, Any]:
    """Return how well σ finds the worst: AUROC with its interval, and precision among as many.

    Args:
        error: sizes of errors, not negative, shape (n,).
        sigma: shape (n,).
        share: how many count as the worst.
        blocks: which frame each entry belongs to.

    Returns:
        ``threshold`` of the error above which an entry is among the worst, ``share``, ``auroc``, ``auroc_interval``,
        ``precision``. The interval is that of the mean placements of worst among others and others among worst (DeLong, DeLong &
        Clarke-Pearson, Biometrics 44, 837 (1988)), by blocks.
    """
    threshold = float(np.quantile(error, 1 - share))
    bad = error > threshold
    found = {"threshold": threshold, "share": share, "auroc": auroc(bad, sigma)}
    if bad.all() or not bad.any():
        return {**found, "auroc_interval": (float("nan"), float("nan")), "precision": float("nan")}
    rank = rankdata(sigma)
    within = np.where(bad, _rank_within(sigma, bad), _rank_within(sigma, ~bad))
    placement = (rank - within) / np.where(bad, (~bad).sum(), bad.sum())  # share of the other class below
    columns = np.stack([placement * bad, bad, (1 - placement) * ~bad, ~bad], axis=1)
    bootstrap = BlockBootstrap(blocks)
    interval = bootstrap.interval(columns, lambda m: m[:, 0] / m[:, 1] + m[:, 2] / m[:, 3] - found["auroc"])
    return {**found, "auroc_interval": interval, "precision": precision_at(bad, sigma, int(bad.sum()))}


def _rank_within(score: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Return ranks among the chosen, 0 elsewhere."""
    ranks = np.zeros(len(score))
    ranks[chosen] = rankdata(score[chosen])
    return ranks


def roc_curve(positive: np.ndarray, score: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the false and true positive rates of all thresholds, from (0, 0) to (1, 1); equal scores are one step."""
    order = np.argsort(-score, kind="stable")
    positive = np.asarray(positive, bool)[order]
    last = np.append(np.diff(score[order]) != 0, True)
    false, true = np.cumsum(~positive)[last], np.cumsum(positive)[last]
    return np.append(0.0, false / max(false[-1], 1)), np.append(0.0, true / max(true[-1], 1))


@dataclass(frozen=True)
class UncertaintyReport:
    """Error and honesty of one property; likelihood measures in its own unit.

    Attributes:
        intervals: of 95 %, by the name of the score, drawn by frame; all but ``spearman_ceiling`` and ``n`` have one.
    """

    rmse: float
    mae: float
    sigma_rms: float
    nll: float
    crps: float
    rll: float
    z2: float
    miscalibration_area: float
    ence: float
    spearman: float
    spearman_ceiling: float
    n: int
    intervals: dict[str, Interval]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def sentence(self) -> str:
        """Say in words whether σ is honest here."""
        low, high = self.intervals["z2"]
        factor = np.sqrt(self.z2)
        if low > 1.1:
            return f"σ is too small by a factor {factor:.2f} on this set"
        if high < 0.9:
            return f"σ is too large by a factor {1 / factor:.2f} on this set"
        return "σ is honest on this set, as far as its size tells"


def uncertainty_report(error: np.ndarray, sigma: np.ndarray, blocks: np.ndarray) -> UncertaintyReport:
    """Return all measures of one property: RMSE and MAE of all entries, the rest of the :func:`informative` ones.

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
    every, whole = np.asarray(error, float), BlockBootstrap(blocks)
    of_errors = {
        "rmse": whole.interval(np.square(every), lambda m: np.sqrt(m[:, 0])),
        "mae": whole.interval(np.abs(every)),
    }
    error, sigma, blocks = every[used], np.asarray(sigma)[used], np.asarray(blocks)[used]
    return UncertaintyReport(
        rmse=rmse(every),
        mae=mae(every),
        sigma_rms=rmse(sigma),
        nll=nll(error, sigma),
        crps=crps(error, sigma),
        rll=relative_log_likelihood(error, sigma),
        z2=mean_z2(error, sigma),
        miscalibration_area=miscalibration_area(error, sigma),
        ence=ence(error, sigma),
        spearman=spearman(error, sigma),
        spearman_ceiling=spearman_ceiling(sigma),
        n=int(used.sum()),
        intervals=of_errors | _intervals(error, sigma, BlockBootstrap(blocks)),
    )


def _intervals(error: np.ndarray, sigma: np.ndarray, bootstrap: BlockBootstrap) -> dict[str, Interval]:
    """Return the interval of every score as a function of means; bins and ranks are those of the whole set."""
    square, z2 = np.square(error), np.square(error / sigma)
    own = nll_terms(error, sigma)
    found = {
        "sigma_rms": bootstrap.interval(np.square(sigma), lambda m: np.sqrt(m[:, 0])),
        "nll": bootstrap.interval(own),
        "crps": bootstrap.interval(crps_terms(error, sigma)),
        "z2": bootstrap.interval(z2),
    }
    seen = np.abs(error) > _TINY
    logs = np.log(np.where(seen, square, 1.0))
    columns = np.stack([own, square, logs], axis=1)
    found["rll"] = bootstrap.interval(columns, _rll_of_means, seen) if seen.any() else (0.0, 0.0)
    nominal, bounds = _central_intervals(POINTS)
    bins = np.searchsorted(bounds, np.sqrt(z2))  # inside every interval from this one on
    found["miscalibration_area"] = bootstrap.of_bins(
        np.ones_like(error),
        np.minimum(bins, POINTS - 1),
        POINTS,
        lambda m: np.trapezoid(np.abs(np.cumsum(m, axis=1) - nominal), nominal, axis=1),
    )
    bins = _equal_bins(sigma, BINS)
    found["ence"] = bootstrap.of_bins(
        np.stack([square, np.square(sigma)], axis=1), bins, int(bins.max()) + 1, _ence_of_sums
    )
    if np.ptp(np.abs(error)) > 0 and np.ptp(sigma) > 0:
        one, two = (rankdata(x) / len(x) - 0.5 for x in (np.abs(error), sigma))
        found["spearman"] = bootstrap.interval(
            np.stack([one, two, one**2, two**2, one * two], axis=1), _correlation_of_means
        )
    else:
        found["spearman"] = (float("nan"), float("nan"))
    return found


def _rll_of_means(m: np.ndarray) -> np.ndarray:
    """Return the RLL from the means of NLL, squared error and its logarithm."""
    constant = 0.5 * (1 + np.log(2 * np.pi * m[:, 1]))
    oracle = 0.5 * (1 + np.log(2 * np.pi) + m[:, 2])
    return np.where(constant > oracle, 100 * (constant - m[:, 0]) / (constant - oracle), 0.0)


def _ence_of_sums(m: np.ndarray) -> np.ndarray:
    """Return the ENCE from the sums of squared errors and of squared σ in every bin; a bin that was not drawn is left out."""
    square, variance = np.split(m, 2, axis=1)
    return np.nanmean(np.abs(1 - np.sqrt(square / variance)), axis=1)


def _correlation_of_means(m: np.ndarray) -> np.ndarray:
    """Return the correlation from the means of x, y, x², y² and xy."""
    return (m[:, 4] - m[:, 0] * m[:, 1]) / np.sqrt((m[:, 2] - m[:, 0] ** 2) * (m[:, 3] - m[:, 1] ** 2))
