import numpy as np

from forcedrop.evaluation import evaluate, predict_frames, with_uncertainties
from forcedrop.report import evaluation_table, format_table, results_page
from tests.conftest import emt_frames


def test_evaluation_against_a_loop(trained) -> None:
    frames = emt_frames(6, seed=4)
    result = evaluate(trained, frames, n_samples=4)
    predictions = predict_frames(trained, frames, n_samples=4)
    errors = np.concatenate([(p.mean["forces"] - f.forces).ravel() for p, f in zip(predictions, frames, strict=True)])
    np.testing.assert_allclose(result.error["forces"], errors)
    std = np.concatenate([p.std["forces"].ravel() for p in predictions])
    np.testing.assert_allclose(result.sigma["forces"], trained.calibration.scale * std)
    total = np.array([p.mean["energy"] - f.energy for p, f in zip(predictions, frames, strict=True)])
    np.testing.assert_allclose(result.error["energy"], total / 4)
    np.testing.assert_allclose(result.total_energy_rmse, np.sqrt(np.mean(total**2)))
    text = evaluation_table(result)
    assert f"{1e3 * np.sqrt(np.mean(errors**2)):.2f}" in text
    assert "calibrated σ" in text


def test_uncertainties_go_where_no_writer_drops_them(trained) -> None:
    frame = emt_frames(1)[0]
    prediction = predict_frames(trained, [frame], n_samples=4)[0]
    noted = with_uncertainties(frame, prediction, 2.0)
    np.testing.assert_allclose(noted.arrays["forces_uncertainty"], 2 * prediction.std["forces"])
    assert noted.info["energy_uncertainty"] == 2 * float(prediction.std["energy"])
    assert "forces_uncertainty" not in with_uncertainties(frame, prediction, None).arrays
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
