import numpy as np

from forcedrop.active.audit import ROUNDS
from forcedrop.report import active_figure, rounds_table


def row(number: int, labels: int, **values: object) -> dict:
    return {**dict.fromkeys(ROUNDS), "round": number, "labels": labels, **values}


JUDGED = {
    "explored_ps": 1.5, "candidates": 40, "flagged": 12, "labelled": 9, "failed": 1, "force_rmse_eV_A": 0.1234,
    "force_sigma_eV_A": 0.1, "z2": 1.5, "z2_low": 1.0, "z2_high": 2.5, "energy_rmse_eV_atom": 0.0021, "verdict": "good",
}  # fmt: skip


def test_table() -> None:
    lines = rounds_table([row(1, 30, **JUDGED), row(2, 39)]).splitlines()
    assert len(lines) == 3
    assert "12 of 40" in lines[1]
    assert "1.00 … 2.50" in lines[1]
    assert lines[1].split()[-1] == "good"
    assert "123.4" in lines[1]
    assert "2.10" in lines[1]
    assert lines[2].split() == ["2", "39"] + ["–"] * 10


def test_figure() -> None:
    figure = active_figure([row(1, 30, **JUDGED), row(2, 39, **{**JUDGED, "force_rmse_eV_A": 0.05}), row(3, 48)])
    error, honest, labels = figure.axes
    np.testing.assert_allclose(error.lines[0].get_ydata(), [123.4, 50.0])
    np.testing.assert_allclose(error.lines[1].get_ydata(), [100.0, 100.0])
    bars = honest.containers[0].lines[2][0].get_segments()[0]
    np.testing.assert_allclose(bars[:, 1], [1.0, 2.5])
    np.testing.assert_allclose(labels.lines[0].get_ydata(), [30, 39, 48])
    assert len(active_figure([row(1, 30)]).axes[0].lines[0].get_xdata()) == 0
