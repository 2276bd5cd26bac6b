import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import genpareto, norm

from forcedrop.md import autocorrelation_time, band_from_calibration, rate_for_chance
from forcedrop.md.alarms import alarm_rate, tail_for_rate, tail_level
from forcedrop.uncertainty.calibration import Calibration, Growth


def autoregressive(phi: float, n: int, seed: int = 0) -> np.ndarray:
    """A stationary process of first order with standard normal marginals."""
    noise = np.random.default_rng(seed).normal(size=n + 1000)
    return lfilter([np.sqrt(1 - phi**2)], [1, -phi], noise)[1000:]


def tau(phi: float) -> float:
    return (1 + phi) / (2 * (1 - phi))


def levels(n: int) -> list[float]:
    """n quantiles of a log-normal σ, evenly spread."""
    return np.exp(0.4 * norm.ppf((np.arange(n) + 0.5) / n) - 4).tolist()


def upcrossings(series: np.ndarray, level: float) -> int:
    return int(np.sum((series[:-1] <= level) & (series[1:] > level)))


@pytest.mark.parametrize("phi", [0.0, 0.5, 0.9, 0.97])
def test_autocorrelation_time_of_an_autoregressive_process(phi: float) -> None:
    assert autocorrelation_time(autoregressive(phi, 400_000)) == pytest.approx(tau(phi), rel=0.06)


def test_autocorrelation_time_needs_a_series() -> None:
    with pytest.raises(ValueError, match="at least 10 values, got 3"):
        autocorrelation_time([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="values that differ"):
        autocorrelation_time(np.ones(50))


def test_alarms_of_independent_checks() -> None:
    for tail in (0.5, 0.01, 1e-5):
        assert alarm_rate(tail) == pytest.approx(tail * (1 - tail), rel=1e-6)
    assert alarm_rate(0.5, tau(0.8)) == pytest.approx(np.arccos(0.8) / (2 * np.pi), rel=1e-6)  # Sheppard's orthant


@pytest.mark.parametrize("phi", [0.0, 0.6, 0.95])
def test_alarms_come_as_often_as_stated(phi: float) -> None:
    rate, n = 2e-3, 400_000
    calibration = Calibration(Growth(1.0), levels={"max_force": levels(20_000)})
    band = band_from_calibration(
        calibration, flags_per_ps=rate / 0.005, stops_per_ps=rate / 0.05, interval=5.0, correlation_time=5.0 * tau(phi)
    )
    series = np.exp(0.4 * autoregressive(phi, n, seed=1) - 4)
    flags, stops = upcrossings(series, band.low), upcrossings(series, band.high)
    assert flags == pytest.approx(n * rate, rel=0.12)  # 800 of them
    assert stops == pytest.approx(n * rate / 10, rel=0.35)  # 80
    if phi > 0.9:  # what counting n/(2τ) independent checks would have given
        naive = np.exp(0.4 * norm.isf(2 * tau(phi) * rate) - 4)
        assert upcrossings(series, naive) > 4 * n * rate


def test_the_chance_of_a_whole_run() -> None:
    chance, length, phi = 0.2, 2000, 0.8
    rate = rate_for_chance(chance, length * 0.005)
    level = norm.isf(tail_for_rate(rate * 0.005, tau(phi)))
    runs = autoregressive(phi, 500 * length, seed=2).reshape(500, length)
    assert np.mean((runs > level).any(axis=1)) == pytest.approx(chance, abs=0.06)
    with pytest.raises(ValueError, match="a chance in"):
        rate_for_chance(1.0, 10.0)


def test_tail_is_undone() -> None:
    for correlation in (0.5, 20.0):
        for rate in (1e-2, 1e-6):
            assert alarm_rate(tail_for_rate(rate, correlation), correlation) == pytest.approx(rate, rel=1e-6)
    with pytest.raises(ValueError, match="must lie in"):
        tail_for_rate(0.3)


@pytest.mark.parametrize("shape", [0.0, 0.3])
def test_a_tail_is_extrapolated(shape: float) -> None:
    law = genpareto(shape, loc=0.01, scale=0.005)
    values = law.ppf((np.arange(400) + 0.5) / 400)
    inside, how = tail_level(values, 0.1)
    assert inside == pytest.approx(law.isf(0.1), rel=0.01)
    assert how == "the 90 % quantile of 400 calibration frames"
    for tail, within in ((0.005, 0.05), (1e-4, 0.25)):
        level, how = tail_level(values, tail)
        assert level == pytest.approx(law.isf(tail), rel=within)
        assert "extrapolated beyond 400 calibration frames" in how
    assert tail_level(values, 0.0249)[0] == pytest.approx(tail_level(values, 0.0251)[0], rel=0.03)


def test_bad_bands() -> None:
    calibration = Calibration(Growth(1.0), levels={"max_force": levels(50)})
    settings = {"flags_per_ps": 1.0, "stops_per_ps": 0.25, "interval": 5.0}
    band = band_from_calibration(calibration, **settings)
    assert band.low < band.high
    assert "low: 1 false alarms per ps" in band.note
    with pytest.warns(UserWarning, match=r"one check in 2e\+05, and 50 calibration frames .* in 1000.* for `high`"):
        band_from_calibration(calibration, **{**settings, "stops_per_ps": 0.001})
    for changes, message in (
        ({"stops_per_ps": 2.0}, "stops_per_ps ≤ flags_per_ps is needed"),
        ({"interval": 0.0}, "interval between checks must be positive"),
        ({"criterion": "sigma"}, "unknown criterion"),
        ({"criterion": "mean_force"}, "at least 10 calibration frames, got 0"),
        ({"flags_per_ps": 100.0}, r"must lie in \(0, 0.25\]"),
    ):
        with pytest.raises(ValueError, match=message):
            band_from_calibration(calibration, **{**settings, **changes})
    with pytest.raises(ValueError, match="this model has no calibration"):
        band_from_calibration(None, **settings)
