import numpy as np
import pytest
from ase import Atoms

from forcedrop.active.config import StopSection
from forcedrop.active.judging import judge, stop_reason, verdict
from forcedrop.active.state import frame_key
from forcedrop.evaluation import evaluate, predict_frames
from forcedrop.structures import Frame
from tests.conftest import emt_frames


def test_numbers_against_the_evaluation(trained) -> None:
    fresh = emt_frames(5, seed=21)
    found, frames = judge(trained, fresh)
    forces = evaluate(trained, fresh).reports()["forces"]
    assert found["force_rmse"] == forces.rmse
    assert (found["z2"], found["z2_low"], found["z2_high"]) == (forces.z2, *forces.intervals["z2"])
    predictions = predict_frames(trained, fresh)
    for frame, p in zip(fresh, predictions, strict=True):
        own = found["each"][frame_key(frame)]
        wrong = p.mean["forces"] - frame.forces
        assert own["error_max_force"] == pytest.approx(np.sqrt((wrong**2).sum(1)).max())
        assert own["sigma_max_force"] == pytest.approx(np.sqrt((p.sigma["forces"] ** 2).sum(1)).max())
        assert own["error_energy"] == pytest.approx(float(p.mean["energy"]) - frame.energy)
    for frame, noted, p in zip(fresh, frames, predictions, strict=True):
        np.testing.assert_array_equal(noted.forces, frame.forces)
        np.testing.assert_allclose(noted.arrays["forcedrop_forces"], p.mean["forces"], atol=1e-12)
        np.testing.assert_allclose(noted.arrays["forces_uncertainty"], p.sigma["forces"], atol=1e-12)
        assert noted.info["sigma_max_force"] == found["each"][frame_key(frame)]["sigma_max_force"]
    assert judge(trained, []) == ({"frames": 0, "each": {}}, [])
    whole = np.sqrt(np.mean([own["error_force_rms"] ** 2 for own in found["each"].values()]))
    assert whole == pytest.approx(found["force_rmse"])


def test_verdicts() -> None:
    stop = StopSection(labels=100, force_rmse=0.1, z2=(0.5, 2.0))

    def of(**values: object) -> str:
        return verdict({"frames": 10, "force_rmse": 0.05, "z2": 1.0, **values}, stop)

    assert of() == "good"
    assert of(force_rmse=0.2) == "error too large"
    assert of(z2=2.1) == "σ too small"
    assert of(z2=0.4, force_rmse=0.2) == "error too large, σ too large"
    assert of(frames=2) == "too few labels to judge"
    assert verdict({"frames": 0, "each": {}}, stop) == "too few labels to judge"


def test_stopping() -> None:
    stop = StopSection(labels=100, force_rmse=0.1, rounds=3)
    good, bad = ({"candidates": 9, "picked": 5, "labelled": 5, "verdict": v} for v in ("good", "σ too small"))
    lost, empty = ({"candidates": 9, "picked": n, "labelled": 0, "verdict": "…"} for n in (5, 0))
    assert stop_reason([], 30, stop) is None
    assert stop_reason([good, bad], 30, stop) is None
    assert "agree with σ and are under 0.1" in str(stop_reason([bad, good], 30, stop))
    assert "budget of 100" in str(stop_reason([bad], 100, stop))
    assert "nothing that the model is unsure of" in str(stop_reason([empty], 30, stop))
    assert "no new frame to label" in str(stop_reason([{**empty, "candidates": 0}], 30, stop))
    assert stop_reason([lost], 30, stop) is None
    assert "no label of the last two rounds" in str(stop_reason([lost, lost], 30, stop))
    assert "3 rounds" in str(stop_reason([bad] * 3, 30, stop))
    assert stop_reason([good], 30, StopSection(labels=100)) is None  # no wanted error: the budget alone


def test_an_atom_that_is_alone_does_not_spoil_the_rest(trained) -> None:
    """Its force is 0, and so is σ: there is nothing to compare, but neither the loop nor an evaluation may end there."""
    fresh = []
    for frame in emt_frames(4, seed=5):
        atoms = frame.to_atoms()
        atoms.pbc = False
        fresh.append(Frame.from_atoms(atoms, energy=frame.energy, forces=frame.forces))
    alone = [
        Frame.from_atoms(
            f.to_atoms() + Atoms("Cu", [[0, 0, 40.0]]), energy=f.energy, forces=np.vstack([f.forces, [[0.0, 0.1, 0.2]]])
        )
        for f in fresh
    ]
    expected, _ = judge(trained, fresh)
    with pytest.warns(UserWarning, match="4 atoms have no neighbour within 3.2 Å"):
        found, _ = judge(trained, alone)
    assert found["force_rmse"] == pytest.approx(expected["force_rmse"], rel=1e-9)
    assert found["z2"] == pytest.approx(expected["z2"], rel=1e-9)
    assert evaluate(trained, fresh).by_element().keys() == {"Cu"}
    pair = Frame.from_atoms(
        Atoms("Cu2", [[0, 0, 0], [0, 0, 3.5]]), energy=0.1, forces=np.array([[0, 0, 0.1], [0, 0, -0.1]])
    )
    with pytest.warns(UserWarning, match="2 atoms have no neighbour"):
        assert evaluate(trained, [pair]).reports().keys() == {"energy"}
