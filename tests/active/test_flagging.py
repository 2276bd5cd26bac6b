import csv

import numpy as np
import pytest

from forcedrop.active import flag
from forcedrop.model import TrainedModel
from forcedrop.report import ranking_csv
from forcedrop.structures import BadFrames, Frame, read_frames, write_frames
from forcedrop.uncertainty.calibration import frame_criteria
from forcedrop.uncertainty.sampling import predict
from tests.conftest import batch_of, emt_frames, ethanol


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return [*emt_frames(6, seed=11), *emt_frames(3, seed=12, scale=0.35)]


@pytest.mark.parametrize("criterion", ["max_force", "mean_force", "energy_per_atom"])
def test_ranking_against_a_loop(trained, frames, criterion: str) -> None:
    flags = flag(trained, frames, criterion=criterion, threshold=0.0, n_samples=4)
    values = []
    for frame in frames:
        out = predict(trained.potential, batch_of([frame.to_atoms()], 4.0), n_samples=4)
        samples = {name: x.numpy() for name, x in out.samples._asdict().items()}
        sigma = trained.calibration.sigma(
            {**samples, "energy": samples["energy"][:, 0], "stress": samples["stress"][:, 0]}, frame.z
        )
        values.append(frame_criteria(sigma["forces"], float(sigma["energy"]))[criterion])
    np.testing.assert_allclose(flags.values, values, rtol=1e-8)
    assert flags.ranking.tolist() == np.argsort(-np.array(values)).tolist()


def test_far_frames_are_flagged_and_near_ones_are_not(trained, frames) -> None:
    flags = flag(trained, frames, quantile=1.0, n_samples=4)
    assert flags.threshold == trained.calibration.threshold("max_force", 1.0)
    assert {frame.source for frame in flags.flagged} >= {"emt#0", "emt#1", "emt#2"}
    assert set(flags.ranking[:3]) == {6, 7, 8}


@pytest.mark.parametrize("name", ["f.xyz", "f.h5"])
def test_nothing_is_dropped_on_writing(trained, frames, tmp_path, name: str) -> None:
    flags = flag(trained, frames, threshold=0.0, n_samples=4)
    write_frames(tmp_path / name, flags.flagged)
    for frame, written in zip(flags.flagged, read_frames(tmp_path / name), strict=True):
        assert written.info["origin"] == frame.info["origin"]
        np.testing.assert_allclose(written.arrays["forces_uncertainty"], frame.arrays["forces_uncertainty"], atol=1e-7)
        np.testing.assert_allclose(written.arrays["forcedrop_forces"], frame.arrays["forcedrop_forces"], atol=1e-7)
        np.testing.assert_allclose(written.forces, frame.forces, atol=1e-7)
        assert written.energy == pytest.approx(frame.energy)
        np.testing.assert_allclose(written.info["stress_uncertainty"], frame.info["stress_uncertainty"], rtol=1e-6)
        assert written.info["sigma_max_force"] == pytest.approx(frame.info["sigma_max_force"], rel=1e-6)


def test_ranking_file(trained, frames, tmp_path) -> None:
    flags = flag(trained, frames, n_samples=4)
    with ranking_csv(flags, tmp_path / "r.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert [int(r["frame"]) for r in rows] == flags.ranking.tolist()
    assert sum(int(r["flagged"]) for r in rows) == len(flags.flagged)


def test_mistakes(trained, frames) -> None:
    with pytest.raises(ValueError, match="unknown criterion 'sigma'; known are max_force"):
        flag(trained, frames, criterion="sigma")
    with pytest.raises(ValueError, match="not both"):
        flag(trained, frames, threshold=1.0, quantile=0.5)
    with pytest.raises(ValueError, match="must not be negative"):
        flag(trained, frames, threshold=-1.0)
    with pytest.raises(ValueError, match="needs a calibrated model"):
        flag(TrainedModel(trained.potential), frames)
    with pytest.raises(BadFrames, match="atom 0 is C; the model knows Cu"):
        flag(trained, [Frame.from_atoms(ethanol())])
