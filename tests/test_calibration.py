import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from forcedrop.calibration import Calibration, fit_scale, frame_criteria
from forcedrop.metrics import nll


def test_scale_maximises_the_likelihood() -> None:
    generator = np.random.default_rng(0)
    std = np.exp(generator.normal(size=500))
    error = 1.7 * std * generator.standard_t(4, size=500)
    best = minimize_scalar(lambda s: nll(error, s * std), bounds=(0.1, 10), method="bounded", options={"xatol": 1e-9}).x
    assert fit_scale(error, std) == pytest.approx(best, rel=1e-5)


def test_scale_guards() -> None:
    assert fit_scale(np.array([0.0, 1.0]), np.array([0.0, 2.0])) == 0.5
    with pytest.raises(ValueError, match="1 of 2 spreads are 0"):
        fit_scale(np.array([1.0, 1.0]), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="no error and no spread"):
        fit_scale(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match="differ in number"):
        fit_scale(np.zeros(3), np.zeros(2))


def test_apply_scales_about_the_mean() -> None:
    samples = np.random.default_rng(0).normal(size=(5, 3))
    scaled = Calibration(2.0).apply(samples)
    np.testing.assert_allclose(scaled.mean(0), samples.mean(0))
    np.testing.assert_allclose(scaled.std(0), 2 * samples.std(0))


def test_criteria() -> None:
    got = frame_criteria(np.array([[3.0, 4.0, 0.0], [0.0, 0.0, 1.0]]), 0.6)
    assert got == {"max_force": 5.0, "mean_force": 3.0, "energy_per_atom": 0.3}


def test_thresholds() -> None:
    calibration = Calibration(1.0, levels={"max_force": [0.0, 1.0, 2.0]})
    assert calibration.threshold("max_force", 0.75) == 1.5
    for criterion, quantile, message in (
        ("force", 0.5, "unknown criterion 'force'"),
        ("max_force", 1.5, r"must lie in \[0, 1\], got 1.5"),
        ("mean_force", 0.5, "no levels of mean_force"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration.threshold(criterion, quantile)
    assert Calibration.from_dict(calibration.to_dict()) == calibration
