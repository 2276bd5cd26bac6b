from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch

from forcedrop.evaluation import compare, evaluate, predict_frames, with_uncertainties
from forcedrop.report import comparison_rows, comparison_table, evaluation_table, format_table, results_page
from forcedrop.training import Committee, TrainedModel
from tests.conftest import emt_frames, make_potential


def factors(model, prediction) -> np.ndarray:
    """The atoms' factors by the formula in ``forcedrop.calibration``."""
    c = model.calibration.curve
    mean_square = (prediction.std["forces"] ** 2).mean(1)
    return c.scale * (1 + mean_square / c.reference**2) ** (c.exponent / 2)


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


def test_page_needs_nothing_else(tmp_path) -> None:
    from matplotlib.figure import Figure

    from forcedrop.report import save_figure

    picture = save_figure(Figure(), tmp_path / "p.png")
    page = results_page(tmp_path / "r.html", "A < B", [("One", "text & more", [picture])]).read_text()
    assert "A &lt; B" in page
    assert "data:image/png;base64," in page
    assert "http" not in page


def test_comparison_calibrates_all_alike_and_leaves_the_models_alone(trained) -> None:
    other = replace(trained, potential=deepcopy(trained.potential))
    with torch.no_grad():
        other.potential.output.weight *= 1.1
    models = {"one": trained, "two together": Committee([trained, other])}
    held, sets = emt_frames(6, seed=20), {"near": emt_frames(4, seed=21), "far": emt_frames(4, seed=22, scale=0.3)}
    before = trained.calibration
    found = compare(models, sets, held, n_samples=4)
    assert trained.calibration is before
    assert models["two together"].calibration is None
    again = compare(models, {"held": held}, held)["two together"]["held"]
    assert np.mean((again.error["forces"] / again.sigma["forces"]) ** 2) == pytest.approx(1.0)
    mean = np.mean([m.potential_forces for m in map(Plain, (trained, other))], axis=0)
    expected = mean - np.concatenate([f.forces for f in sets["near"]])
    np.testing.assert_allclose(found["two together"]["near"].error["forces"], expected.ravel(), atol=1e-9)
    rows = comparison_rows(found)
    assert [(row["model"], row["set"]) for row in rows] == [(m, s) for m in models for s in sets]
    error = found["one"]["far"].error["forces"]
    assert rows[1]["forces_rmse_meV_A"] == pytest.approx(1e3 * np.sqrt(np.mean(error**2)), abs=1e-4)
    text = comparison_table(rows)
    assert "two together" in text
    assert f"{rows[1]['forces_rmse_meV_A']:.3g}" in text


class Plain:
    """Forces of the plain network on the near set."""

    def __init__(self, model) -> None:
        predictions = predict_frames(replace(model, calibration=None), emt_frames(4, seed=21), n_samples=2)
        self.potential_forces = np.concatenate([p.plain["forces"] for p in predictions])


def test_a_committee_of_one_or_of_strangers_is_refused(trained) -> None:
    with pytest.raises(ValueError, match="at least two models, got 1"):
        Committee([trained])
    with pytest.raises(ValueError, match="same elements"):
        Committee([trained, TrainedModel(make_potential())])
