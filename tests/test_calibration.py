import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from forcedrop.calibration import Calibration, fit_growth, fit_scale, frame_criteria, growth
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


def samples_of(n_atoms: int, seed: int = 0, k: int = 6) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    energies = generator.normal(size=(k, n_atoms))
    return {
        "energy": energies.sum(1),
        "energies": energies,
        "forces": generator.normal(size=(k, n_atoms, 3)) * np.exp(generator.normal(size=(1, n_atoms, 1))),
        "stress": generator.normal(size=(k, 6)),
    }


def test_one_factor_scales_every_property_about_its_mean() -> None:
    samples = samples_of(3)
    scaled = Calibration(2.0).apply(samples)
    for name, values in samples.items():
        np.testing.assert_allclose(scaled[name].mean(0), values.mean(0), atol=1e-12)
        np.testing.assert_allclose(scaled[name].std(0), 2 * values.std(0))
    np.testing.assert_allclose(Calibration(2.0).sigma(samples)["forces"], 2 * samples["forces"].std(0, ddof=1))


def test_growth_is_each_atoms_own_for_forces_and_common_for_the_rest() -> None:
    samples, calibration = samples_of(4), Calibration(2.0, exponent=1.0, reference=0.7)
    scaled = calibration.apply(samples)
    std = samples["forces"].std(0, ddof=1)
    factor = 2.0 * np.sqrt(1 + (std**2).mean(1) / 0.7**2)
    np.testing.assert_allclose(scaled["forces"].std(0, ddof=1), factor[:, None] * std)
    np.testing.assert_allclose(scaled["energy"], scaled["energies"].sum(1))
    common = np.sqrt((factor**2).mean())
    for name in ("energy", "energies", "stress"):
        np.testing.assert_allclose(scaled[name].std(0), common * samples[name].std(0))
    twice = {  # two far copies: the same samples, side by side
        "energy": 2 * samples["energy"],
        "energies": np.tile(samples["energies"], 2),
        "forces": np.tile(samples["forces"], (1, 2, 1)),
        "stress": samples["stress"],
    }
    one, two = calibration.sigma(samples), calibration.sigma(twice)
    assert two["energy"] == pytest.approx(2 * one["energy"])
    np.testing.assert_allclose(two["forces"], np.tile(one["forces"], (2, 1)))


def test_a_perfect_crystal_keeps_its_energy_error_bar() -> None:
    samples = samples_of(2)
    samples["forces"][:] = 0.0
    assert Calibration(3.0, 1.0, 0.1).sigma(samples)["energy"] == pytest.approx(3 * samples["energy"].std(ddof=1))


def test_growth_is_found_where_it_is(honest_growth) -> None:
    error, std = honest_growth(gamma=1.0)
    scale, gamma, reference = fit_growth(error, std)
    assert reference == pytest.approx(np.exp(np.log(np.sqrt((std**2).mean(1))).mean()))
    assert gamma == pytest.approx(1.0, abs=0.1)
    assert scale == pytest.approx(2.0, rel=0.1)
    assert fit_growth(*honest_growth(gamma=0.0))[1] < 0.05
    sigma = scale * std * growth(std, reference, gamma)[:, None]
    best = nll(error, sigma)
    for other in (gamma - 0.3, gamma + 0.3):
        shape = std * growth(std, reference, other)[:, None]
        assert nll(error, fit_scale(error, shape) * shape) > best


@pytest.fixture
def honest_growth():
    """Errors that are Gaussian with σ = 2 s (1 + s²/s0²)^(γ/2), s0 the geometric mean of the atoms' spreads."""

    def make(gamma: float) -> tuple[np.ndarray, np.ndarray]:
        generator = np.random.default_rng(1)
        std = np.exp(generator.normal(scale=0.6, size=(4000, 1))) * generator.uniform(0.5, 1.5, size=(4000, 3))
        local = np.sqrt((std**2).mean(1, keepdims=True))
        relative = local / np.exp(np.log(local).mean())
        return generator.normal(size=std.shape) * 2 * std * (1 + relative**2) ** (gamma / 2), std

    return make


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
