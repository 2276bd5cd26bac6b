from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from forcedrop.evaluation import compare, evaluate, predict_frames, with_uncertainties
from forcedrop.model import TrainedModel, committee
from forcedrop.potential import DropoutRates
from forcedrop.report import comparison_rows, comparison_table, evaluation_table, format_table
from forcedrop.uncertainty.calibrate import calibrate
from forcedrop.uncertainty.calibration import Calibration, Growth, few_samples
from forcedrop.uncertainty.sampling import predict
from tests.conftest import batch_of, emt_frames, make_potential


def factors(model, prediction) -> np.ndarray:
    """The atoms' factors by the formula in ``forcedrop.uncertainty.calibration``."""
    c = model.calibration.curve
    mean_square = (prediction.std["forces"] ** 2).mean(1)
    few = np.sqrt(3.0 / few_samples(model.calibration.n_samples))  # of four samples
    return few * c.scale * (1 + mean_square / c.reference**2) ** (c.exponent / 2)


def test_evaluation_against_a_loop(trained) -> None:
    frames = emt_frames(6, seed=4)
    result = evaluate(trained, frames, n_samples=4)
    predictions = predict_frames(trained, frames, n_samples=4)
    errors = np.concatenate([(p.mean["forces"] - f.forces).ravel() for p, f in zip(predictions, frames, strict=True)])
    np.testing.assert_allclose(result.error["forces"], errors)
    for p in predictions:
        np.testing.assert_allclose(p.sigma["forces"], p.std["forces"] * factors(trained, p)[:, None])
    np.testing.assert_allclose(result.sigma["forces"], np.concatenate([p.sigma["forces"].ravel() for p in predictions]))
    total = np.array([p.mean["energy"] - f.energy for p, f in zip(predictions, frames, strict=True)])
    np.testing.assert_allclose(result.error["energy"], total / 4)
    np.testing.assert_allclose(result.total_energy_rmse, np.sqrt(np.mean(total**2)))
    text = evaluation_table(result)
    assert f"{1e3 * np.sqrt(np.mean(errors**2)):.2f}" in text
    assert "calibrated σ" in text


def test_evaluation_by_element_difference_and_coverage_against_loops(trained) -> None:
    frames = emt_frames(7, seed=4)
    z = np.array([29, 13, 29, 13])
    frames = [replace(f, z=z) for f in frames[:5]] + [replace(frames[5], z=np.array([29, 29, 29, 13])), frames[6]]
    potential = make_potential(elements=(13, 29), rates=DropoutRates(edge=0.3, update=0.2, readout=0.5))
    quantiles = {name: {0.5: 0.7, 0.9: 1.6} for name in ("energy", "forces", "atoms")}
    calibration = Calibration(Growth(1.5), {13: 2.0}, quantiles=quantiles)
    model = TrainedModel(potential, calibration)
    result = evaluate(model, frames, n_samples=4)
    predictions = predict_frames(model, frames, n_samples=4)
    error = np.concatenate([p.mean["forces"] - f.forces for p, f in zip(predictions, frames, strict=True)])
    sigma = np.concatenate([p.sigma["forces"] for p in predictions])
    numbers = np.concatenate([f.z for f in frames])
    for symbol, number in (("Al", 13), ("Cu", 29)):
        report = result.by_element()[symbol]
        own = numbers == number
        assert report.rmse == pytest.approx(np.sqrt(np.mean(error[own] ** 2)))
        assert report.z2 == pytest.approx(np.mean((error[own] / sigma[own]) ** 2))
    # frames 0 and 1, 2 and 3; not 4 and 5, which are of other atoms; 6 is alone
    differences = []
    for a, b in ((0, 1), (2, 3)):
        raw = [predict(potential, batch_of([frames[k].to_atoms()], 4.0), n_samples=4).samples for k in (a, b)]
        scaled = []
        for k, samples in zip((a, b), raw, strict=True):
            forces = samples.forces.detach().numpy()
            factor = 1.5 * np.where(frames[k].z == 13, 2.0, 1.0)
            common = np.sqrt(np.mean(factor**2))
            np.testing.assert_allclose(
                predictions[k].sigma["forces"], factor[:, None] * forces.std(0, ddof=1), rtol=1e-6
            )
            energy = samples.energy[:, 0].detach().numpy()
            scaled.append(energy.mean() + common * (energy - energy.mean()))
        differences.append((scaled[0] - scaled[1]).std(ddof=1))
    np.testing.assert_allclose(result.sigma["difference"], differences, rtol=1e-5)
    expected = [predictions[a].mean["energy"] - predictions[b].mean["energy"] for a, b in ((0, 1), (2, 3))]
    labels = [frames[a].energy - frames[b].energy for a, b in ((0, 1), (2, 3))]
    np.testing.assert_allclose(result.error["difference"], np.array(expected) - labels)
    inside = np.mean(np.abs(error) <= 1.6 * sigma)
    assert result.coverage["forces"][0.9] == pytest.approx(inside)
    vectors = np.linalg.norm(error, axis=1) <= 0.7 * np.linalg.norm(sigma, axis=1)
    assert result.coverage["atoms"][0.5] == pytest.approx(np.mean(vectors))
    text = evaluation_table(result)
    for word in ("energy difference", "Al", "inside conformal intervals of", "force vector"):
        assert word in text
    by_frame = result.by_frame()
    assert by_frame.n == 7
    assert by_frame.rmse == pytest.approx(np.sqrt(np.mean(error**2)))


def test_copies_and_forbidden_forces_are_no_obstacle(trained) -> None:
    """Two copies of one structure have a difference of 0 ± 0; perfect copper has no forces, aluminium beside it has."""
    frames = emt_frames(2, seed=4)
    result = evaluate(trained, [frames[0], frames[0], frames[1], frames[0]], n_samples=4)
    assert len(result.error["difference"]) == 1
    z = np.array([29, 13])
    still = replace(result, atomic_number=np.repeat(z, 3), frame={"forces": np.zeros(6)})
    error, sigma = np.array([0, 0, 0, 0.1, -0.2, 0.1]), np.array([0, 0, 0, 0.1, 0.1, 0.1])
    still = replace(still, error={"forces": error}, sigma={"forces": sigma})
    assert list(still.by_element()) == ["Al"]


def test_uncertainties_go_where_no_writer_drops_them(trained) -> None:
    frame = emt_frames(1)[0]
    prediction = predict_frames(trained, [frame], n_samples=4)[0]
    noted = with_uncertainties(frame, prediction)
    np.testing.assert_array_equal(noted.arrays["forces_uncertainty"], prediction.sigma["forces"])
    np.testing.assert_array_equal(noted.arrays["forces_std"], prediction.std["forces"])
    assert noted.info["energy_uncertainty"] == float(prediction.sigma["energy"])
    raw = predict_frames(replace(trained, calibration=None), [frame], n_samples=4)[0]
    assert "forces_uncertainty" not in with_uncertainties(frame, raw).arrays
    np.testing.assert_array_equal(noted.forces, frame.forces)


def test_table_columns_line_up() -> None:
    lines = format_table([["a", "long"], ["longer", "b"]])
    assert lines == ["a       long", "longer     b"]


def test_comparison_calibrates_all_alike_and_leaves_the_models_alone(trained) -> None:
    members = [trained]
    for factor in (1.1, 0.9, 1.2):
        members.append(replace(trained, potential=deepcopy(trained.potential)))
        with torch.no_grad():
            members[-1].potential.output.weight *= factor
    models = {"one": trained, "four together": committee(members)}
    held, sets = emt_frames(6, seed=20), {"near": emt_frames(4, seed=21), "far": emt_frames(4, seed=22, scale=0.3)}
    before = trained.calibration
    found = compare(models, sets, held, n_samples=4)
    assert trained.calibration is before
    ensemble = models["four together"]
    assert ensemble.calibration is None
    same = replace(ensemble, calibration=calibrate(ensemble.potential, ensemble.graphs(held)))
    again = evaluate(same, held)
    assert np.mean((again.error["forces"] / again.sigma["forces"]) ** 2) == pytest.approx(1.0)
    mean = np.mean([m.potential_forces for m in map(Plain, members)], axis=0)
    expected = mean - np.concatenate([f.forces for f in sets["near"]])
    np.testing.assert_allclose(found["four together"]["near"].error["forces"], expected.ravel(), atol=1e-9)
    rows = comparison_rows(found)
    assert [(row["model"], row["set"]) for row in rows] == [(m, s) for m in models for s in sets]
    error = found["one"]["far"].error["forces"]
    assert rows[1]["forces_rmse_meV_A"] == pytest.approx(1e3 * np.sqrt(np.mean(error**2)), abs=1e-4)
    text = comparison_table(rows)
    assert "four together" in text
    assert [(row["samples"], row["frames"]) for row in rows] == [(4, 4)] * 4
    assert f"{rows[1]['forces_rmse_meV_A']:.3g}" in text


class Plain:
    """Forces of the plain network on the near set."""

    def __init__(self, model) -> None:
        predictions = predict_frames(replace(model, calibration=None), emt_frames(4, seed=21), n_samples=2)
        self.potential_forces = np.concatenate([p.plain["forces"] for p in predictions])


def test_a_committee_of_one_or_of_strangers_is_refused(trained) -> None:
    with pytest.raises(ValueError, match="at least two models, got 1"):
        committee([trained])
    with pytest.raises(ValueError, match="same elements"):
        committee([trained, TrainedModel(make_potential())])
