"""A model's predictions never pass for labels."""

from dataclasses import replace
from pathlib import Path

import ase.db
import ase.io
import numpy as np
import pytest
import yaml
from ase.calculators.emt import EMT

from forcedrop import DropoutCalculator, FrameStore, read_frames
from forcedrop.active import ActiveLoop
from forcedrop.active.config import parse_active_config
from forcedrop.structures import write_frames
from forcedrop.structures.predictions import MARK, PredictedLabels, mark, only_labels, predicted
from forcedrop.structures.streaming import structures_in
from forcedrop.training.data import read_labelled
from tests.conftest import emt_frames, settings
from tests.field.commands import run


@pytest.fixture(scope="module")
def dynamics(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dynamics")
    write_frames(folder / "start.xyz", emt_frames(1, seed=33))
    run("md", model, folder / "start.xyz", "--steps", 40, "--samples", 4, "--output", folder / "md")
    return folder / "md"


@pytest.mark.parametrize("name", ["md.xyz", "md.h5"])
def test_dynamics_are_refused_as_labels_by_every_command(model, dynamics, tmp_path, name: str) -> None:
    file = dynamics / name
    words = f"{file}: 5 of 5 frames hold predictions of a model (energy, forces, stress)"
    assert words in run("evaluate", model, file, code=1)
    assert words in run("compare", model, "--test", file, code=1)
    write_frames(tmp_path / "train.h5", emt_frames(16))
    assert words in run("fill", model, "--data", file, "--held-out", tmp_path / "train.h5", "--functions", 8, code=1)
    values = settings(tmp_path, epochs=1, data={"train": [str(tmp_path / "train.h5"), str(file)]})
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(values))
    out = run("train", tmp_path / "t.yaml", code=1)
    assert words in out
    assert "predictions_as_labels: true" in out
    assert not (tmp_path / "run").exists()


def test_a_loop_refuses_them_where_it_would_learn_from_them(dynamics, tmp_path) -> None:
    start = {"files": [str(dynamics / "md.h5")]}
    with pytest.raises(PredictedLabels, match="5 of 5 frames"):
        loop(tmp_path / "a", start=start).describe()
    assert "5 frames, 0 of them labelled already" in loop(tmp_path / "b", start={**start, "relabel": True}).describe()
    write_frames(tmp_path / "start.h5", emt_frames(12))
    files = {"start": {"files": [str(tmp_path / "start.h5")]}, "explore": {"start_files": [str(dynamics / "md.xyz")]}}
    explored = loop(tmp_path / "c", **files)
    assert explored.describe()
    assert read_labelled(explored.config.explore.start_files, explored._data(labels=False))  # to start dynamics from


def loop(folder: Path, **changes: dict) -> ActiveLoop:
    folder.mkdir()
    values = {
        "state": "state",
        "oracle": {"name": "tests.active.faulty:oracle", "settings": {"log": str(folder / "calls")}},
        "training": {"model": {"cutoff": 4.0, "n_channels": 4, "l_max": 2, "n_radial": 4, "n_hidden": 4}},
        "stop": {"labels": 19},
        "explore": {"temperatures": [600], **changes.pop("explore", {})},
        **changes,
    }
    return ActiveLoop(parse_active_config(values, folder=folder))


def test_they_can_be_asked_for(model, dynamics, tmp_path) -> None:
    out = run("evaluate", model, dynamics / "md.xyz", "--samples", 4, "--predictions-as-labels", "--output", tmp_path)
    assert "RMSE" in out
    assert predicted(FrameStore(tmp_path / "frames.h5")[0])  # and stay marked
    write_frames(tmp_path / "train.h5", emt_frames(16))
    data = {"train": [str(tmp_path / "train.h5"), str(dynamics / "md.xyz")], "predictions_as_labels": True}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(settings(tmp_path, epochs=1, data=data)))
    run("train", tmp_path / "t.yaml")


def test_structures_of_dynamics_are_read_where_labels_do_not_matter(model, dynamics, tmp_path) -> None:
    run("md", model, dynamics / "md.xyz", "--index", -1, "--steps", 1, "--samples", 4, "--output", tmp_path / "md")
    run("predict", model, dynamics / "md.xyz", "--samples", 4, "--output", tmp_path / "p.xyz")
    assert "5 of them hold predictions" in run("info", dynamics / "md.xyz")
    run("flag", model, dynamics / "md.xyz", "--threshold", 0, "--samples", 4, "--output", tmp_path / "f.xyz")
    for atoms in ase.io.read(tmp_path / "f.xyz", ":"):
        assert "energy" not in (atoms.calc.results if atoms.calc else {})
        assert "forcedrop_energy" in atoms.info
    values = settings(tmp_path, data={"train": [str(tmp_path / "f.xyz")]})
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(values))
    run("train", tmp_path / "t.yaml", code=1)  # flagged frames have no labels


def test_other_programs_still_find_energies_and_forces(dynamics) -> None:
    images = ase.io.read(dynamics / "md.xyz", ":")
    stored = FrameStore(dynamics / "md.h5")
    for atoms, frame in zip(images, stored, strict=True):
        assert atoms.get_potential_energy() == pytest.approx(frame.energy, abs=1e-9)
        np.testing.assert_allclose(atoms.get_forces(), frame.forces, atol=1e-7)


def test_frames_that_were_labelled_anew_are_labels(dynamics, tmp_path) -> None:
    images = ase.io.read(dynamics / "md.xyz", ":")
    for atoms in images:
        atoms.calc = EMT()
        atoms.get_potential_energy(), atoms.get_forces()
    ase.io.write(tmp_path / "labelled.xyz", images)
    assert all(MARK in atoms.info for atoms in ase.io.read(tmp_path / "labelled.xyz", ":"))
    frames = read_frames(tmp_path / "labelled.xyz")
    assert [f.energy for f in frames] == pytest.approx([a.get_potential_energy() for a in images])
    # of forces alone that are still the model's, too
    only = [replace(f, forces=old.forces) for f, old in zip(frames, FrameStore(dynamics / "md.h5"), strict=True)]
    assert predicted(only[-1]) == ("forces",)
    with pytest.raises(PredictedLabels, match=r"\(forces\)"):
        only_labels(only)


def test_evaluated_frames_keep_their_reference_labels(model, tmp_path) -> None:
    write_frames(tmp_path / "in.xyz", emt_frames(5, seed=2))
    run("evaluate", model, tmp_path / "in.xyz", "--samples", 4, "--write", tmp_path / "w.xyz", "--output", tmp_path)
    for name in ("w.xyz", "frames.h5"):
        labels = [f.energy for f in read_frames(tmp_path / name)]
        assert labels == pytest.approx([f.energy for f in emt_frames(5, seed=2)], abs=1e-6)


@pytest.mark.parametrize("suffix", [".xyz", ".xyz.gz", ".traj", ".db", ".json", ".h5"])
def test_predict_writes_what_the_model_says_and_marks_it(model, trained, tmp_path, suffix: str) -> None:
    frames = [replace(f, energy=None, forces=None, stress=None) for f in emt_frames(7, seed=4)]
    frames[3] = replace(frames[3], info={"name": "fourth"})
    write_frames(tmp_path / "in.xyz", frames)
    out = tmp_path / f"out{suffix}"
    assert "wrote 7 frames" in run("predict", model, tmp_path / "in.xyz", "--samples", 4, "--output", out)
    with pytest.raises(PredictedLabels):
        read_frames(out)
    kept = read_frames(out, predictions="keep")
    assert len(kept) == 7
    for frame, got in zip(frames, kept, strict=True):
        atoms = frame.to_atoms()
        atoms.calc = DropoutCalculator(trained, n_samples=4)
        assert got.energy == pytest.approx(atoms.get_potential_energy(), abs=1e-6)
        assert got.info.get("name") == frame.info.get("name")
        np.testing.assert_allclose(got.forces, atoms.get_forces(), atol=1e-6)
        np.testing.assert_allclose(got.stress, atoms.get_stress(), atol=1e-6)
        sigma = float(atoms.calc.get_property("energy_uncertainty", atoms))
        assert got.info["energy_uncertainty"] == pytest.approx(sigma, rel=1e-5)
    if suffix in (".xyz", ".h5"):
        sigma = atoms.calc.get_property("forces_uncertainty", atoms)
        np.testing.assert_allclose(kept[-1].arrays["forces_uncertainty"], sigma, atol=1e-6)
    if suffix == ".db":
        with ase.db.connect(out) as database:
            row = next(database.select(limit=1))
            assert np.shape(row.data["forces_uncertainty"]) == (4, 3)
            assert row.energy == pytest.approx(kept[0].energy)
    if suffix == ".traj":
        assert np.shape(ase.io.read(out, 0).info["forces_uncertainty"]) == (4, 3)


def test_predict_holds_a_block_at_a_time(trained, tmp_path) -> None:
    from forcedrop.evaluation import predicted_frames

    taken = 0

    def frames():
        nonlocal taken
        for frame in emt_frames(40, seed=9):
            taken += 1
            yield frame

    found = predicted_frames(trained, frames(), n_samples=8, most_atoms=16)
    next(found)
    assert taken == 5  # a block of four, and the one that was too many
    assert len(list(found)) == 39


@pytest.mark.parametrize("suffix", [".xyz", ".traj", ".db", ".h5", ".json"])
def test_structures_in_drops_labels_and_keeps_the_rest(tmp_path, suffix: str) -> None:
    frames = [replace(f, info={"k": k}) for k, f in enumerate(emt_frames(5))]
    write_frames(tmp_path / f"a{suffix}", frames)
    found = list(structures_in(tmp_path / f"a{suffix}"))
    assert [f.info["k"] for f in found] == list(range(5))
    assert [f.source for f in found] == [f"{tmp_path}/a{suffix}#{k}" for k in range(5)]
    assert all((f.energy, f.forces, f.stress) == (None, None, None) for f in found)
    np.testing.assert_allclose(found[2].pos, frames[2].pos, atol=1e-7)


def test_a_file_that_breaks_off_is_named_with_the_frame(model, tmp_path) -> None:
    write_frames(tmp_path / "a.xyz", emt_frames(4))
    text = (tmp_path / "a.xyz").read_text()
    (tmp_path / "b.xyz").write_text(text[: text.rindex("\nCu")])
    out = run("predict", model, tmp_path / "b.xyz", "--output", tmp_path / "p.xyz", code=1)
    assert "b.xyz" in out
    assert len(out.strip().splitlines()) == 1


def test_files_of_before_are_recognised() -> None:
    frame = emt_frames(1)[0]
    of_md = replace(frame, info={"potential_eV": frame.energy, "energy_uncertainty": 0.01})
    assert predicted(of_md) == ("energy", "forces", "stress")
    assert predicted(replace(of_md, energy=frame.energy + 0.01)) == ()  # labelled since
    assert predicted(replace(frame, info={"energy_std": 0.01})) == ("energy", "forces", "stress")
    flagged = {"forcedrop_energy": frame.energy, "energy_std": 0.01}
    assert predicted(replace(frame, info=flagged)) == ("energy", "forces", "stress")
    assert predicted(replace(frame, info={**flagged, "forcedrop_energy": frame.energy + 1e-4})) == ()
    assert predicted(frame) == ()


def test_a_unit_does_not_hide_predictions() -> None:
    frame = mark(emt_frames(1)[0])
    hartree = replace(frame, energy=frame.energy * 27.211386024367243)
    assert "energy" in predicted(hartree)
