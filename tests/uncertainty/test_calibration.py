import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from forcedrop.metrics import nll
from forcedrop.uncertainty.calibration import (
    Calibration,
    Growth,
    conformal_quantiles,
    difference_sigma,
    fit_elements,
    fit_scale,
    force_covariance,
    frame_criteria,
    local_spread,
)


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


Z = np.array([29, 1, 8, 6])


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
    scaled = Calibration(Growth(2.0)).apply(samples, Z[:3])
    for name, values in samples.items():
        np.testing.assert_allclose(scaled[name].mean(0), values.mean(0), atol=1e-12)
        np.testing.assert_allclose(scaled[name].std(0), 2 * values.std(0))
    np.testing.assert_allclose(
        Calibration(Growth(2.0)).sigma(samples, Z[:3])["forces"], 2 * samples["forces"].std(0, ddof=1)
    )


def test_samples_are_scaled_about_a_mean_that_is_known() -> None:
    """Of a bank the mean is that of all functions, not of the few that were computed: scaled samples stay about it."""
    samples, calibration = samples_of(3), Calibration(Growth(2.0, 1.0, 0.7), {29: 0.5}, own={"energy": 3.0})
    about = {name: x.mean(0) + 0.3 for name, x in samples.items()}
    scaled, own = calibration.apply(samples, Z[:3], about), calibration.apply(samples, Z[:3])
    for name, values in samples.items():
        deviation = values - values.mean(0)
        factor = (own[name] - values.mean(0)) / deviation
        np.testing.assert_allclose(scaled[name], about[name] + factor * (values - about[name]), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(scaled[name].std(0), own[name].std(0))  # σ is the samples' own either way
        assert np.abs(scaled[name].mean(0) - own[name].mean(0)).max() > 1e-3
    np.testing.assert_allclose(calibration.sigma(samples, Z[:3])["energy"], own["energy"].std(ddof=1))


def test_energies_and_stress_take_a_factor_of_their_own() -> None:
    samples = samples_of(4)
    before = Calibration(Growth(2.0), {1: 3.0}).sigma(samples, Z)
    after = Calibration(Growth(2.0), {1: 3.0}, own={"energy": 2.5, "stress": 0.4}).sigma(samples, Z)
    for name, factor in (("energy", 2.5), ("energies", 2.5), ("stress", 0.4), ("forces", 1.0)):
        np.testing.assert_allclose(after[name], factor * before[name])
    assert (
        "of its own energy × 2.50, stress × 0.40"
        in Calibration(Growth(1.0), own={"energy": 2.5, "stress": 0.4}).sentence()
    )


def test_a_bank_of_energies_beside_few_forces() -> None:
    """Each property is scaled for as many samples as it has."""
    samples, k = samples_of(3, k=6), 6
    samples["energy"] = np.random.default_rng(1).normal(size=40)
    sigma = Calibration(Growth(1.0), n_samples=16).sigma(samples, Z[:3])
    few = lambda n: (n - 1) / (n - 3)  # noqa: E731
    np.testing.assert_allclose(sigma["forces"], np.sqrt(few(k) / few(16)) * samples["forces"].std(0, ddof=1))
    np.testing.assert_allclose(sigma["energy"], np.sqrt(few(40) / few(16)) * samples["energy"].std(ddof=1))


def test_growth_is_each_atoms_own_for_forces_and_common_for_the_rest() -> None:
    samples, calibration = samples_of(4), Calibration(Growth(2.0, exponent=1.0, reference=0.7))
    scaled = calibration.apply(samples, Z[:4])
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
    one, two = calibration.sigma(samples, Z[:4]), calibration.sigma(twice, np.tile(Z[:4], 2))
    assert two["energy"] == pytest.approx(2 * one["energy"])
    np.testing.assert_allclose(two["forces"], np.tile(one["forces"], (2, 1)))


def test_a_perfect_crystal_keeps_its_energy_error_bar() -> None:
    samples = samples_of(2)
    samples["forces"][:] = 0.0
    assert Calibration(Growth(3.0, 1.0, 0.1)).sigma(samples, Z[:2])["energy"] == pytest.approx(
        3 * samples["energy"].std(ddof=1)
    )


def test_growth_is_found_where_it_is(honest_growth) -> None:
    error, std = honest_growth(gamma=1.0)
    found = Growth.fit(error, std)
    gamma, reference = found.exponent, found.reference
    assert reference == pytest.approx(np.exp(np.log(np.sqrt((std**2).mean(1))).mean()))
    assert gamma == pytest.approx(1.0, abs=0.1)
    assert found.scale == pytest.approx(2.0, rel=0.1)
    assert Growth.fit(*honest_growth(gamma=0.0)).exponent < 0.05
    best = nll(error, std * found.factor(local_spread(std))[:, None])
    for other in (gamma - 0.3, gamma + 0.3):
        shape = std * Growth(1.0, other, reference).factor(local_spread(std))[:, None]
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
    calibration = Calibration(Growth(1.0), levels={"max_force": [0.0, 1.0, 2.0]})
    assert calibration.threshold("max_force", 0.75) == 1.5
    for criterion, quantile, message in (
        ("force", 0.5, "unknown criterion 'force'"),
        ("max_force", 1.5, r"must lie in \[0, 1\], got 1.5"),
        ("mean_force", 0.5, "no levels of mean_force"),
    ):
        with pytest.raises(ValueError, match=message):
            calibration.threshold(criterion, quantile)
    assert Calibration.from_dict(calibration.to_dict()) == calibration


def test_elements_have_their_own_factors_and_energies_their_root_mean_square() -> None:
    samples, calibration = samples_of(4), Calibration(Growth(2.0), elements={29: 0.5, 1: 3.0})
    factor = 2 * np.array([0.5, 3.0, 1.0, 1.0])  # unknown elements: 1
    sigma = calibration.sigma(samples, Z)
    np.testing.assert_allclose(sigma["forces"], factor[:, None] * samples["forces"].std(0, ddof=1))
    assert sigma["energy"] == pytest.approx(np.sqrt((factor**2).mean()) * samples["energy"].std(ddof=1))
    assert "Cu 0.50" in calibration.sentence()


def test_factors_of_elements_are_found_where_they_are() -> None:
    generator = np.random.default_rng(0)
    z = np.repeat([1, 6, 8], [600, 600, 5])
    sigma = np.exp(generator.normal(size=(len(z), 3)))
    error = generator.normal(size=sigma.shape) * sigma * np.where(z == 1, 2.0, 0.5)[:, None]
    found = fit_elements(error, sigma, z)
    assert found == {1: pytest.approx(2.0, rel=0.05), 6: pytest.approx(0.5, rel=0.05), 8: 1.0}  # five atoms say nothing


def test_calibrations_survive_a_checkpoint() -> None:
    calibration = Calibration(
        Growth(1.3, 0.5, 0.01),
        {6: 1.1},
        {"energy": 1.7},
        {"forces": 1.2},
        {"forces": {0.9: 1.7}},
        10,
        16,
        {"max_force": [0.1]},
    )
    assert Calibration.from_dict(calibration.to_dict()) == calibration


def test_conformal_intervals_hold_what_they_state_for_any_distribution() -> None:
    """Over many draws of a calibration set new errors are inside at least as often as stated, and hardly more often."""
    generator = np.random.default_rng(0)
    inside: dict[float, list[float]] = {}
    for _ in range(2000):
        error, sigma = generator.standard_t(2, size=120), np.exp(generator.normal(size=120))
        for stated, q in conformal_quantiles(error[:100], sigma[:100], 100).items():
            inside.setdefault(stated, []).append(float(np.mean(np.abs(error[100:]) <= q * sigma[100:])))
    assert 0.99 in inside
    for stated, shares in inside.items():
        error_of_mean = np.std(shares) / np.sqrt(len(shares))
        assert stated - 4 * error_of_mean < np.mean(shares) < stated + 1 / 101 + 4 * error_of_mean


def test_too_few_frames_promise_no_high_coverage() -> None:
    error = np.random.default_rng(0).normal(size=300)
    assert max(conformal_quantiles(error, np.ones(300), n_frames=10)) == 0.9
    calibration = Calibration(Growth(1.0), quantiles={"forces": {0.5: 0.7}})
    assert calibration.quantile("forces", 0.5) == 0.7
    with pytest.raises(
        ValueError, match=r"no conformal quantile of 'forces' for a coverage of 0.9; there are forces: 0.5"
    ):
        calibration.quantile("forces", 0.9)


def test_what_two_structures_have_wrong_alike_drops_out_of_their_difference() -> None:
    common, own = np.random.default_rng(0).normal(size=(2, 50))
    assert difference_sigma(common + own, common) == pytest.approx(own.std(ddof=1))
    with pytest.raises(ValueError, match="the same draws"):
        difference_sigma(common, own[:3])


def test_few_samples_make_errors_over_spreads_larger_than_one() -> None:
    """z² of honest Gaussian samples, by drawing them: one calibration is honest for every number of samples."""
    generator = np.random.default_rng(0)
    calibration = Calibration(Growth(1.0), n_samples=1000)
    for k in (6, 16):
        samples = {"forces": generator.normal(size=(k, 40000, 3))}
        sigma = calibration.sigma(samples, np.ones(40000))["forces"]
        error = generator.normal(size=sigma.shape)
        assert np.mean((error / samples["forces"].std(0, ddof=1)) ** 2) == pytest.approx((k - 1) / (k - 3), rel=0.03)
        assert np.mean((error / sigma) ** 2) == pytest.approx(1, rel=0.03)


def test_force_covariance_is_that_of_each_atom() -> None:
    forces = np.random.default_rng(0).normal(size=(7, 4, 3))
    for atom, matrix in enumerate(force_covariance(forces)):
        np.testing.assert_allclose(matrix, np.cov(forces[:, atom].T))
