r"""Thresholds of σ from the calibration set, for a stated rate of false alarms.

**Alarms.** An alarm is an *upcrossing*: σ below the threshold at one check and above it at the next. An excursion is one
alarm, however many checks it lasts, so correlated checks need a model of how σ moves: its normal scores are taken to be an
autoregressive process of first order with the integrated autocorrelation time :math:`\tau` of the series (in checks), that is,
with :math:`\varphi = (2\tau-1)/(2\tau+1)`. The level that a share p of the frames exceeds is then crossed, for each check,

.. math:: \int_{z}^{\infty} n(x)\, \Phi\!\left(\frac{z-\varphi x}{\sqrt{1-\varphi^2}}\right) dx, \qquad z = \Phi^{-1}(1-p),

times on average, with n the standard normal density. For independent checks this is p (1 − p). To count :math:`n/(2\tau)`
independent checks instead would promise too much, by 3 to 20 times: that number is right for the error of a mean, but high
excursions are far shorter than τ.

**Assumptions.** The run visits frames like those of the calibration: at a higher temperature flags are true ones. It computes σ
from as many samples as the calibration did: fewer make σ noisier, and alarms more frequent.

**Tails.** N frames cannot tell the level that fewer than about ten of them exceed. Beyond, a generalised Pareto law is fitted
to the largest fifth, at most 100 of them, by probability-weighted moments (Hosking & Wallis, Technometrics 29, 339 (1987)); its
shape is kept in [0, ½]: from so few frames neither an end of the tail nor an infinite variance is believed. For levels that one
frame in 100, 1000 or 10⁴ exceeds, nine of ten trials with log-normal σ had at most 3, 4 or 7 times the stated alarms with 50
frames, 1.4, 1.8 or 2.5 times with 400 (and often far fewer). What was done is said in ``Band.note``. Of levels that fewer
than one frame in 20 N exceeds a warning says that they are guesses: on ethanol (``benchmarks/guarded_md.py``) one was passed 40
times as often as it should have been.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from scipy.integrate import quad
from scipy.optimize import brentq
from scipy.stats import norm

from forcedrop.md.band import Band
from forcedrop.uncertainty.calibration import CRITERIA, Calibration

WINDOW = 5.0
"""Autocorrelations are summed up to so many autocorrelation times."""
MOST = 100
"""Values that a tail is fitted to, at most."""
FARTHEST = 20
"""Times the number of frames: a level that a smaller share than one in so many exceeds is a guess."""
INDEPENDENT = 0.5
"""The integrated autocorrelation time of independent checks."""


def autocorrelation_time(series: Sequence[float] | np.ndarray) -> float:
    r"""Return the integrated autocorrelation time :math:`\frac12 + \sum_{t\ge1} \rho(t)`, in steps of the series.

    The sum ends at the first t that is at least five times the sum so far (Sokal, *Monte Carlo methods in statistical mechanics*,
    1997, sec. 3). It is ½ for independent values and (1+φ)/(2(1−φ)) for an autoregressive process of first order.

    Raises:
        ValueError: if there are fewer than 10 values, or they are all the same.
    """
    values = np.asarray(series, dtype=float).ravel()
    if len(values) < 10:
        raise ValueError(f"an autocorrelation time needs at least 10 values, got {len(values)}")
    values = values - values.mean()
    padded = np.fft.rfft(values, n=2 * len(values))
    covariance = np.fft.irfft(np.abs(padded) ** 2)[: len(values)]
    if not covariance[0] > 0:
        raise ValueError("an autocorrelation time needs values that differ")
    sums = np.cumsum(covariance / covariance[0]) - 0.5
    ended = np.flatnonzero(np.arange(len(sums)) >= WINDOW * sums)
    last = int(ended[0]) if len(ended) else len(sums) - 1
    return max(float(sums[last]), INDEPENDENT)


def alarm_rate(tail: float, correlation: float = INDEPENDENT) -> float:
    """Return the expected number of alarms for each check, see the module's page.

    Args:
        tail: share of the frames above the threshold, in (0, ½].
        correlation: integrated autocorrelation time, in checks, at least ½.

    Raises:
        ValueError: for values outside these ranges.
    """
    if not 0 < tail <= 0.5:
        raise ValueError(f"the share above a threshold must lie in (0, 0.5], got {tail}")
    if not correlation >= INDEPENDENT:
        raise ValueError(f"an autocorrelation time is at least {INDEPENDENT} checks, got {correlation}")
    phi = (2 * correlation - 1) / (2 * correlation + 1)
    z, width = norm.isf(tail), np.sqrt(1 - phi**2)
    # the integrand lives within a few widths of z, however far out that is
    rate, _ = quad(lambda x: norm.pdf(x) * norm.cdf((z - phi * x) / width), z, z + 10, points=[z + width], limit=200)
    return float(rate)


def tail_for_rate(rate: float, correlation: float = INDEPENDENT) -> float:
    """Return the share of frames above the threshold that has a rate of alarms for each check: undoes :func:`alarm_rate`.

    Raises:
        ValueError: if the rate is not positive, or above what the level of half of the frames has.
    """
    most = alarm_rate(0.5, correlation)
    if not 0 < rate <= most:
        raise ValueError(f"the rate of false alarms must lie in (0, {most:.3g}] for each check, got {rate:.3g}")
    lowest = rate / 2  # alarms come at most once for each frame above
    found = brentq(lambda u: np.log(alarm_rate(np.exp(u), correlation) / rate), np.log(lowest), np.log(0.5), xtol=1e-10)
    return float(np.exp(found))


def rate_for_chance(chance: float, picoseconds: float) -> float:
    """Return the alarms per ps for which a whole run has a chance of any: −ln(1 − chance)/length.

    Raises:
        ValueError: if the chance is not in (0, 1) or the length not positive.
    """
    if not 0 < chance < 1 or not picoseconds > 0:
        raise ValueError(
            f"a chance in (0, 1) and a positive length of the run are needed, got {chance}, {picoseconds} ps"
        )
    return float(-np.log1p(-chance) / picoseconds)


def tail_level(levels: Sequence[float] | np.ndarray, tail: float) -> tuple[float, str]:
    """Return the level that a share ``tail`` of new values exceeds, and how it was found.

    Args:
        levels: values of the calibration frames.
        tail: share, in (0, 1).

    Raises:
        ValueError: if there are fewer than 10 levels.
    """
    values = np.sort(np.asarray(levels, dtype=float))
    n = len(values)
    if n < 10:
        raise ValueError(f"a level from false alarms needs at least 10 calibration frames, got {n}")
    if tail * n >= 10:
        return float(np.quantile(values, 1 - tail)), f"the {100 * (1 - tail):.4g} % quantile of {n} calibration frames"
    m = max(min(n // 5, MOST), 5)
    start, excess = values[n - m - 1], values[n - m :] - values[n - m - 1]
    first = float(excess.mean())
    second = float(np.sum(excess * (m - 1 - np.arange(m))) / (m * (m - 1)))  # the largest weighs 0
    shape = float(np.clip(2 - first / (first - 2 * second), 0.0, 0.5)) if first > 2 * second else 0.5
    scale = first * (1 - shape)
    share = tail * n / m  # of those above `start`
    beyond = scale * (-np.log(share) if shape == 0 else (share**-shape - 1) / shape)
    how = (
        f"where one frame in {1 / tail:.3g} is expected, extrapolated beyond {n} calibration frames by a generalised "
        f"Pareto tail (shape {shape:.2f}) of the {m} largest"
    )
    return float(start + beyond), how


def band_from_calibration(
    calibration: Calibration | None,
    *,
    flags_per_ps: float,
    stops_per_ps: float,
    interval: float,
    correlation_time: float = 0.0,
    criterion: str = "max_force",
) -> Band:
    """Return the band with stated rates of false alarms; the assumptions are on the module's page.

    Args:
        calibration: of the model.
        flags_per_ps: expected false flags per ps.
        stops_per_ps: expected false stops (or roll-backs) per ps; :func:`rate_for_chance` takes the chance of a run.
        interval: time between two checks [fs].
        correlation_time: integrated autocorrelation time of σ [fs], see :func:`autocorrelation_time`; the default takes the
            checks for independent, which gives fewer alarms than stated.
        criterion: one of ``forcedrop.uncertainty.calibration.CRITERIA``.

    Warns (``UserWarning``) where so few calibration frames cannot tell the level.

    Raises:
        ValueError: without a calibration or levels, for stops more frequent than flags, or rates that no level has.
    """
    if calibration is None:
        raise ValueError(
            "false alarms are counted on the calibration set, and this model has no calibration; give σ itself"
        )
    if criterion not in CRITERIA:
        raise ValueError(f"unknown criterion {criterion!r}; known are {', '.join(CRITERIA)}")
    if not interval > 0:
        raise ValueError(f"the interval between checks must be positive, got {interval} fs")
    if not 0 < stops_per_ps <= flags_per_ps:
        raise ValueError(f"0 < stops_per_ps ≤ flags_per_ps is needed, got {stops_per_ps} and {flags_per_ps}")
    levels = calibration.levels.get(criterion, [])
    correlation = max(correlation_time / interval, INDEPENDENT)
    notes, limits = [], []
    for name, rate in (("low", flags_per_ps), ("high", stops_per_ps)):
        tail = tail_for_rate(rate * interval / 1000, correlation)
        level, how = tail_level(levels, tail)
        if tail * len(levels) * FARTHEST < 1:
            warnings.warn(
                f"{rate:.3g} false alarms per ps is one check in {1 / tail:.2g}, and {len(levels)} calibration frames cannot "
                f"tell σ of more than one in {FARTHEST * len(levels)}: there may be 100 times as many; give σ for `{name}`",
                stacklevel=2,
            )
        limits.append(level)
        notes.append(f"{name}: {rate:.3g} false alarms per ps, {how}")
    return Band(limits[0], max(limits), criterion, "; ".join(notes))
