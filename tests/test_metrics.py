import numpy as np
import pytest
import uncertainty_toolbox as uct
from scipy.stats import norm
from sklearn.metrics import roc_auc_score, roc_curve

from forcedrop import metrics
from forcedrop.bootstrap import BlockBootstrap


@pytest.fixture
def honest() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    sigma = np.exp(generator.normal(scale=0.7, size=4000))
    return generator.normal(size=4000) * sigma, sigma


def test_likelihood_scores_against_other_programs(honest) -> None:
    error, sigma = honest
    assert metrics.nll(error, sigma) == pytest.approx(-norm.logpdf(error, 0, sigma).mean(), rel=1e-12)
    zero = np.zeros_like(error)
    assert metrics.crps(error, sigma) == pytest.approx(uct.metrics.crps_gaussian(error, sigma, zero), rel=1e-9)
    assert metrics.mean_z2(error, sigma) == pytest.approx(np.mean((error / sigma) ** 2))


def test_area_against_uncertainty_toolbox(honest) -> None:
    error, sigma = honest
    for factor in (0.5, 1.0, 1.7):
        theirs = uct.metrics_calibration.miscalibration_area(
            error, factor * sigma, np.zeros_like(error), num_bins=101, vectorized=True, prop_type="interval"
        )
        assert metrics.miscalibration_area(error, factor * sigma) == pytest.approx(theirs, abs=2e-3)


def test_area_of_a_known_factor() -> None:
    """Errors whose σ is infinitely too large all lie inside every interval: the area is ½."""
    error = np.random.default_rng(0).normal(size=1000)
    assert metrics.miscalibration_area(error, np.full(1000, 1e9)) == pytest.approx(0.5, abs=0.01)


def test_rll_has_its_two_fixed_points(honest) -> None:
    error, sigma = honest
    assert metrics.relative_log_likelihood(error, np.abs(error)) == pytest.approx(100)
    assert metrics.relative_log_likelihood(error, np.full_like(error, metrics.rmse(error))) == pytest.approx(
        0, abs=1e-9
    )
    assert 0 < metrics.relative_log_likelihood(error, sigma) < 100
    assert metrics.relative_log_likelihood(error, 0.1 * sigma) < 0


def test_auroc_against_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    score = generator.integers(0, 20, size=500).astype(float)
    positive = generator.random(500) < 0.1 + 0.02 * score
    assert metrics.auroc(positive, score) == pytest.approx(roc_auc_score(positive, score))
    assert np.isnan(metrics.auroc(np.ones(5, bool), np.arange(5.0)))


def test_precision_at_k() -> None:
    positive = np.array([True, False, True, False])
    assert metrics.precision_at(positive, np.array([4.0, 3.0, 2.0, 1.0]), 2) == 0.5
    assert metrics.precision_at(positive, np.array([4.0, 1.0, 3.0, 2.0]), 2) == 1.0


def test_spearman_reaches_its_ceiling_when_honest(honest) -> None:
    error, sigma = honest
    assert metrics.spearman(error, sigma) == pytest.approx(metrics.spearman_ceiling(sigma), abs=0.04)
    assert metrics.spearman(sigma, sigma) == pytest.approx(1)


def test_ence_by_hand_and_by_size(honest) -> None:
    error, sigma = honest
    assert metrics.ence(error, sigma, bins=5) < 0.08
    assert metrics.ence(error, 2 * sigma, bins=5) == pytest.approx(0.5, abs=0.05)


def test_block_bootstrap_is_wider_when_entries_are_copies() -> None:
    values = np.random.default_rng(0).normal(size=50)
    copies, blocks = np.repeat(values, 40), np.repeat(np.arange(50), 40)
    by_block = BlockBootstrap(blocks).interval(copies)
    by_entry = BlockBootstrap(np.arange(2000)).interval(copies)
    expected = 2 * 1.96 * values.std() / np.sqrt(50)
    assert by_block[1] - by_block[0] == pytest.approx(expected, rel=0.2)
    assert by_block[1] - by_block[0] > 4 * (by_entry[1] - by_entry[0])


def test_report_says_which_way_sigma_errs(honest) -> None:
    error, sigma = honest
    blocks = np.arange(len(error))
    assert "honest" in metrics.uncertainty_report(error, sigma, blocks).sentence()
    assert "too small by a factor 2.0" in metrics.uncertainty_report(error, sigma / 2, blocks).sentence()
    assert "too large by a factor 2.98" in metrics.uncertainty_report(error, sigma * 3, blocks).sentence()


def test_zero_by_symmetry_is_left_out_and_zero_sigma_refused() -> None:
    error, sigma = np.array([0.0, 0.1, -0.1]), np.array([0.0, 0.1, 0.1])
    assert metrics.uncertainty_report(error, sigma, np.arange(3)).n == 2
    with pytest.raises(ValueError, match="sigma must be positive, 1 of 2"):
        metrics.uncertainty_report(np.array([0.0, 0.1, 0.1]), np.array([0.0, 0.0, 0.1]), np.arange(3))
    with pytest.raises(ValueError, match="finite"):
        metrics.uncertainty_report(np.array([np.nan]), np.array([1.0]), np.arange(1))
    with pytest.raises(ValueError, match="one shape"):
        metrics.uncertainty_report(np.zeros(2), np.zeros(3), np.arange(2))


def test_noise_of_labels_where_symmetry_forbids_a_force_is_left_out_but_no_fault() -> None:
    generator = np.random.default_rng(0)
    sigma = np.concatenate([np.full(500, 1.0), np.full(500, 1e-6)])
    error = sigma * generator.normal(size=1000)
    error[500:] = 1e-3 * generator.normal(size=500)  # noise of the reference method
    report = metrics.uncertainty_report(error, sigma, np.arange(1000))
    assert report.n == 500
    assert report.z2 == pytest.approx(1.0, abs=0.2)
    error[500] = 0.5  # far more than noise, and σ does not know it
    faulty = metrics.uncertainty_report(error, sigma, np.arange(1000))
    assert faulty.n == 501
    assert faulty.z2 > 1e6


def test_atom_norms_are_those_of_vectors() -> None:
    error, sigma = metrics.atom_norms(np.array([[3.0, 4, 0]]), np.array([[1.0, 2, 2]]))
    assert (error[0], sigma[0]) == (5.0, 3.0)


def test_intervals_agree_with_drawing_frames_by_hand(honest) -> None:
    """Every score of the report against recomputing it on drawn frames; bins and ranks are then drawn anew, so loosely."""
    error, sigma = honest
    blocks = np.repeat(np.arange(400), 10)
    report = metrics.uncertainty_report(error, sigma, blocks)
    generator = np.random.default_rng(7)
    drawn: dict[str, list[float]] = {name: [] for name in report.intervals}
    scores = {
        "rmse": lambda e, s: metrics.rmse(e), "mae": lambda e, s: metrics.mae(e), "sigma_rms": lambda e, s: metrics.rmse(s),
        "nll": metrics.nll, "crps": metrics.crps, "z2": metrics.mean_z2, "rll": metrics.relative_log_likelihood,
        "miscalibration_area": metrics.miscalibration_area, "ence": metrics.ence, "spearman": metrics.spearman,
    }  # fmt: skip
    for _ in range(300):
        entries = (generator.integers(0, 400, size=400)[:, None] * 10 + np.arange(10)).ravel()
        for name, values in drawn.items():
            values.append(scores[name](error[entries], sigma[entries]))
    for name, values in drawn.items():
        low, high = np.percentile(values, [2.5, 97.5])
        assert report.intervals[name] == pytest.approx((low, high), abs=0.25 * (high - low)), name
        assert low <= getattr(report, name) <= high or name in (
            "miscalibration_area",
            "ence",
        )  # these are biased upwards


def test_interval_of_detection_agrees_with_drawing_frames_by_hand(honest) -> None:
    error, sigma = honest
    blocks = np.repeat(np.arange(400), 10)
    found = metrics.detection(np.abs(error), sigma, 0.05, blocks)
    bad = np.abs(error) > found["threshold"]
    assert found["auroc"] == pytest.approx(roc_auc_score(bad, sigma))
    generator = np.random.default_rng(7)
    drawn = []
    for _ in range(300):
        entries = (generator.integers(0, 400, size=400)[:, None] * 10 + np.arange(10)).ravel()
        drawn.append(roc_auc_score(bad[entries], sigma[entries]))
    low, high = np.percentile(drawn, [2.5, 97.5])
    assert found["auroc_interval"] == pytest.approx((low, high), abs=0.25 * (high - low))


def test_roc_curve_against_scikit_learn() -> None:
    generator = np.random.default_rng(0)
    score = generator.integers(0, 20, size=500).astype(float)
    positive = generator.random(500) < 0.1 + 0.02 * score
    false, true = metrics.roc_curve(positive, score)
    expected = roc_curve(positive, score, drop_intermediate=False)
    assert false == pytest.approx(expected[0])
    assert true == pytest.approx(expected[1])
    assert np.trapezoid(true, false) == pytest.approx(metrics.auroc(positive, score))
