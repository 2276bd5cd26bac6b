"""What the viewer is given, against the frames."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from forcedrop.report.viewer import Viewer, choose_frames
from forcedrop.structures import Frame, read_frames
from tests.conftest import emt_frames


def values(data: dict, name: str) -> np.ndarray:
    return np.array(data["properties"][name]["values"])


def noted(n: int = 5) -> list[Frame]:
    """Frames with labels, predictions and σ that are drawn at random."""
    rng = np.random.default_rng(1)
    frames = []
    for k, frame in enumerate(emt_frames(n)):
        arrays = {
            "forcedrop_forces": frame.forces + rng.normal(size=(4, 3)),
            "forces_std": rng.uniform(1, 2, (4, 3)),
            "forces_uncertainty": rng.uniform(0, 1, (4, 3)),
        }
        info = {"forcedrop_energy": frame.energy + rng.normal(), "energy_uncertainty": 0.1 * (k + 1)}
        frames.append(replace(frame, arrays=arrays, info=info))
    return frames


def test_labelled_frames_exactly() -> None:
    frames = noted()
    data = Viewer(frames).dataset()
    for structure, frame in zip(data["structures"], frames, strict=True):
        assert structure["names"] == ["Cu"] * 4
        np.testing.assert_allclose(np.array([structure[x] for x in "xyz"]).T, frame.pos, atol=1e-5)
        np.testing.assert_allclose(np.reshape(structure["cell"], (3, 3)), frame.cell, atol=1e-5)
    sigma = [np.sqrt((f.arrays["forces_uncertainty"] ** 2).sum(1)) for f in frames]
    error = [np.sqrt(((f.arrays["forcedrop_forces"] - f.forces) ** 2).sum(1)) for f in frames]
    force = [np.sqrt((f.arrays["forcedrop_forces"] ** 2).sum(1)) for f in frames]
    np.testing.assert_allclose(values(data, "atomic force σ"), np.concatenate(sigma), rtol=1e-4)
    np.testing.assert_allclose(values(data, "force error"), np.concatenate(error), rtol=1e-4)
    np.testing.assert_allclose(values(data, "force"), np.concatenate(force), rtol=1e-4)
    np.testing.assert_allclose(values(data, "largest atomic force σ"), [s.max() for s in sigma], rtol=1e-4)
    np.testing.assert_allclose(values(data, "largest force error"), [e.max() for e in error], rtol=1e-4)
    off = [(f.info["forcedrop_energy"] - f.energy) / 4 for f in frames]
    np.testing.assert_allclose(values(data, "energy error"), off, rtol=1e-4)
    np.testing.assert_allclose(values(data, "σ of energy"), [0.1, 0.2, 0.3, 0.4, 0.5])
    assert len(data["environments"]) == 20
    assert data["settings"]["pinned"] == [int(np.argmax([s.max() for s in sigma]))]
    assert data["properties"]["atomic force σ"]["units"] == "eV/Å"
    assert data["settings"]["structure"][0]["color"]["property"] == "atomic force σ"
    assert data["settings"]["structure"][0]["unitCell"] is True
    assert data["settings"]["map"]["x"]["property"] == "largest atomic force σ"
    assert data["settings"]["map"]["y"]["property"] == "largest force error"


def test_forces_of_dynamics_are_predictions(dynamics_folder: Path) -> None:
    frames = read_frames(dynamics_folder / "md.h5", predictions="keep")
    viewer = Viewer(frames, list(range(7, 7 + len(frames))), flagged={2, 3}, trajectory=True)
    data = viewer.dataset()
    np.testing.assert_allclose(values(data, "time"), 2 * np.arange(25))
    np.testing.assert_allclose(values(data, "frame"), 7 + np.arange(25))
    expected = np.concatenate([np.linalg.norm(f.forces, axis=1) for f in frames])
    np.testing.assert_allclose(values(data, "force"), expected, rtol=1e-4)
    largest = [f.info["max_force_sigma_eV_A"] for f in frames]
    np.testing.assert_allclose(values(data, "largest atomic force σ"), largest, rtol=1e-4)
    np.testing.assert_allclose(values(data, "temperature"), [f.info["temperature_K"] for f in frames], rtol=1e-4)
    assert "force error" not in data["properties"]
    words = ["flagged" if k in (2, 3) else "not flagged" for k in range(25)]
    assert data["properties"]["flag"]["values"] == words
    assert data["settings"]["map"]["joinPoints"] is True
    assert "calibrated" in viewer.legend()


def test_colours_span_all_frames_alike() -> None:
    frames = noted(40)
    sigma = np.concatenate([np.linalg.norm(f.arrays["forces_uncertainty"], axis=1) for f in frames])
    low, high = Viewer(frames).colour_range()
    assert low == 0
    assert np.quantile(sigma, 0.99) <= high < 1.1 * np.quantile(sigma, 0.99)
    assert high == pytest.approx(float(f"{high:.2g}"))
    assert Viewer(frames, threshold=7.0).colour_range() == (0.0, 7.0)
    still = [replace(f, arrays={"forces_std": np.zeros((4, 3))}) for f in frames]
    assert Viewer(still).colour_range() == (0.0, 1.0)


def test_raw_spread_is_called_so_and_missing_sigma_too() -> None:
    raw = [replace(f, arrays={"forces_std": f.arrays["forces_std"]}) for f in noted()]
    assert "not calibrated" in Viewer(raw).legend()
    bare = [*raw[:-1], replace(raw[-1], arrays={})]  # the last one has no σ
    viewer = Viewer(bare)
    assert "no σ" in viewer.legend()
    assert not any(p["target"] == "atom" for p in viewer.dataset()["properties"].values())
    assert viewer.colour_range() is None
    gone = [*raw[:-1], replace(raw[-1], arrays={"forces_std": np.full((4, 3), np.nan)})]
    assert Viewer(gone).colour_range() is None


def test_structures_without_any_label_can_be_shown() -> None:
    bare = [replace(f, energy=None, forces=None, stress=None) for f in emt_frames(2)]
    data = Viewer(bare).dataset()
    assert list(data["properties"]) == ["frame"]


def test_data_survive_the_page() -> None:
    frames = [replace(f, info={**f.info, "time_fs": 0.1}) for f in noted(2)]
    html = Viewer(frames, name="a").html()
    (text,) = re.findall(r'<script type="application/json" id="a-data">(.*?)</script>', html, flags=re.DOTALL)
    assert json.loads(text) == json.loads(json.dumps(Viewer(frames).dataset()))
    assert "<" not in text


def test_the_embedded_script_cannot_end_early() -> None:
    script = Viewer(noted(1)).script()
    assert len(script) > 1_000_000
    assert "</script" not in script
    assert "<!--" not in script


def test_frames_are_spread_and_flagged_ones_kept() -> None:
    assert choose_frames(5, 200) == [0, 1, 2, 3, 4]
    assert choose_frames(101, 5) == [0, 25, 50, 75, 100]
    assert choose_frames(101, 5, [26, 99, 50]) == [0, 25, 26, 50, 75, 99, 100]
    assert choose_frames(10, 1) == [0]
    for arguments in ((0, 5), (5, 0)):
        with pytest.raises(ValueError, match="at least one frame"):
            choose_frames(*arguments)
    with pytest.raises(ValueError, match="frame 9 must be shown, but there are 5"):
        choose_frames(5, 2, [9])


def test_guards() -> None:
    with pytest.raises(ValueError, match="at least one frame, got none"):
        Viewer([])
    with pytest.raises(ValueError, match="got 1 numbers for 2 frames"):
        Viewer(emt_frames(2), [0])
