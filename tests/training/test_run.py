"""Training from files to a model: resuming, being killed, diverging, and what is left on disk."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ase import Atoms

from forcedrop.evaluation import predict_frames
from forcedrop.model import TrainedModel, load_model, save_model
from forcedrop.structures import BadFrames, Frame, read_frames, write_frames
from forcedrop.training import ConfigError, TrainingDiverged, TrainingInterrupted, parse_config, train
from forcedrop.training.loop import Trainer
from tests.conftest import SMALL, emt_frames, settings


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_model(path / "run" / "model.pt").potential.state_dict()


def log(path: Path) -> list[dict[str, str]]:
    with (path / "run" / "log.csv").open() as stream:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(stream)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_frames(tmp_path / "train.h5", emt_frames(24))
    return tmp_path


def test_it_learns_and_says_what_it_did(trained_folder: Path) -> None:
    rows = log(trained_folder)
    assert [r["epoch"] for r in rows] == [str(e + 1) for e in range(46)]
    assert set(rows[0]) & {"stage", "val_z2"} == set()
    force_rms = 1e3 * np.sqrt(np.mean([f.forces**2 for f in emt_frames(40)]))
    assert float(rows[-1]["val_forces_meV_A"]) < 0.3 * force_rms
    assert float(rows[-1]["val_stress_meV_A3"]) < float(rows[0]["val_stress_meV_A3"])
    model = load_model(trained_folder / "run" / "model.pt")
    assert model.calibration is not None
    assert model.calibration.n_frames == 4
    assert model.uncertainty.items() >= {"method": "exact_dropout", "functions": 16, "seed": 0, "frames": 20}.items()
    assert model.potential.n_functions == model.calibration.n_samples == 16
    assert model.potential.centred
    assert model.provenance["training_set"]["frames"] == 32
    assert model.provenance["training_set"]["shortest_distance"]["Cu-Cu"] < 2.6
    split = json.loads((trained_folder / "run" / "split.json").read_text())
    assert sorted(len(v) for v in split.values()) == [4, 4, 32]
    assert len({source for part in split.values() for source in part}) == 40
    assert list((trained_folder / "run" / "tensorboard").iterdir())


class _StopAt:
    """Raise a signal after so many steps, as a user would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
        run_step, count = Trainer.run_step, [0]

        def counted(trainer: Trainer, batch: object, stop: object) -> None:
            count[0] += 1
            if count[0] == step:
                os.kill(os.getpid(), number)
            run_step(trainer, batch, stop)

        monkeypatch.setattr(Trainer, "run_step", counted)


@pytest.mark.parametrize(("step", "number", "masks"), [(8, signal.SIGINT, False), (37, signal.SIGTERM, True)])
def test_resume_gives_the_numbers_of_an_uninterrupted_training(
    folder: Path, tmp_path_factory, monkeypatch, step: int, number: signal.Signals, masks: bool
) -> None:
    """Stopped within an epoch (of 9 x 5 steps), without dropout and with every site."""
    other = tmp_path_factory.mktemp("whole")
    dropped = {"dropout": {"edge": 0.3, "message": 0.1, "update": 0.1, "readout": 0.3}} if masks else {}
    write_frames(other / "train.h5", emt_frames(24))
    train(parse_config(settings(other, **dropped)))
    with monkeypatch.context() as patch:
        _StopAt(patch, step, number)
        with pytest.raises(TrainingInterrupted, match=f"stopped by {number.name}"):
            train(parse_config(settings(folder, **dropped)))
    assert not (folder / "run" / "model.pt").exists()
    torch.rand(7)
    train(parse_config(settings(folder, **dropped)), resume=True)
    assert log(folder) == log(other)
    for name, value in weights(other).items():
        assert torch.equal(value, weights(folder)[name]), name


def test_kill_leaves_a_resumable_checkpoint(folder: Path) -> None:
    config = settings(folder, epochs=500, checkpoint_seconds=0)
    (folder / "t.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "forcedrop", "train", str(folder / "t.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "run" / "log.csv").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    state = torch.load(folder / "run" / "last.pt", weights_only=True)
    assert state["trainer"]["progress"]["epoch"] + state["trainer"]["progress"]["step"] > 0
    with pytest.raises(ConfigError, match=r"other settings; these differ: epochs"):
        train(parse_config(settings(folder, checkpoint_seconds=0)), resume=True)


def test_a_second_training_does_not_overwrite_the_first(trained_folder: Path) -> None:
    with pytest.raises(ConfigError, match="exists; --resume goes on with the training"):
        train(parse_config(settings(trained_folder)))


def test_changed_data_are_noticed(folder: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        _StopAt(patch, 3, signal.SIGINT)
        with pytest.raises(TrainingInterrupted):
            train(parse_config(settings(folder)))
    write_frames(folder / "train.h5", emt_frames(24, seed=5))
    with pytest.raises(ConfigError, match="training data changed"):
        train(parse_config(settings(folder)), resume=True)


def test_divergence_names_the_frames_and_keeps_the_checkpoint(folder: Path, monkeypatch) -> None:
    run_step, count = Trainer.run_step, [0]

    def poisoned(trainer: Trainer, batch: object, stop: object) -> None:
        count[0] += 1
        if count[0] == 7:
            batch.forces[2] = float("nan")
        run_step(trainer, batch, stop)

    monkeypatch.setattr(Trainer, "run_step", poisoned)
    with pytest.raises(TrainingDiverged, match=r"loss is nan.*epoch 2, step 2, in a batch of .*train\.h5#\d+"):
        train(parse_config(settings(folder)))
    state = torch.load(folder / "run" / "last.pt", weights_only=True)
    assert all(torch.isfinite(v).all() for v in state["trainer"]["weights"].values())


def test_bad_frames_stop_before_training_or_are_skipped(folder: Path) -> None:
    bad = replace(emt_frames(1)[0], energy=float("nan"))
    write_frames(folder / "bad.xyz", [bad])
    data = {"train": [f"{folder}/train.h5", f"{folder}/bad.xyz"]}
    with pytest.raises(BadFrames, match=r"bad\.xyz#0: energy: NaN"):
        train(parse_config(settings(folder, data=data)))
    assert not (folder / "run").exists()
    short = {"epochs": 1}
    model = train(parse_config(settings(folder, data={**data, "skip_bad": True}, **short)))
    assert model.provenance["training_set"]["frames"] == 24 - 2 - 2  # a tenth to validate, a tenth to calibrate


@pytest.mark.parametrize("kind", ["sphere", "painn"])
@pytest.mark.parametrize("method", ["exact_dropout", "posterior", "heads", "masks", "none"])
def test_every_method_gives_error_bars_to_every_kind_or_none(folder: Path, method: str, kind: str) -> None:
    values = settings(folder, epochs=1)
    values["model"] = {**SMALL[kind], "kind": kind}
    values["uncertainty"] = {"method": method} | ({} if method == "none" else {"functions": 6, "seed": 3})
    values["dropout"] = {"update": 0.1} if method == "masks" else {}
    model = train(parse_config(values))
    assert (model.uncertainty["method"], model.potential.kind) == (method, kind)
    assert model.provenance["training_rates"]["update"] == values["dropout"].get("update", 0.0)
    if method == "none":
        assert (model.calibration, model.potential.n_functions) == (None, 0)
        return
    assert (model.n_functions, model.seed) == (6, 3)
    assert model.calibration.n_samples == (64 if method == "masks" else 6)
    for p in predict_frames(model, emt_frames(2, seed=9)):
        assert (p.sigma["forces"] > 0).all()
        if method != "masks":
            np.testing.assert_allclose(p.mean["forces"], p.plain["forces"], atol=1e-9)


def test_masks_of_training_are_gone_once_functions_are_found(folder: Path) -> None:
    """Dropout in training and exact dropout of the plain network afterwards: two things."""
    model = train(parse_config(settings(folder, epochs=1, dropout={"edge": 0.3, "readout": 0.2})))
    assert not any(site.p for site in model.potential.inner_sites.values())
    assert model.potential.centred
    assert model.provenance["training_rates"] == {"edge": 0.3, "message": 0.0, "update": 0.0, "readout": 0.2}


def test_a_network_without_features_asks_for_another_method_before_anything_is_lost(folder: Path, monkeypatch) -> None:
    from forcedrop.potential.painn import PaiNN

    read = PaiNN.read
    monkeypatch.setattr(PaiNN, "add_correction", lambda self, n: None)
    monkeypatch.setattr(PaiNN, "read", lambda self, vec, graph: (read(self, vec, graph)[0], None))
    values = settings(folder, epochs=1)
    values["model"] = {**SMALL["painn"], "kind": "painn"}
    with pytest.raises(
        ValueError, match=r"'painn' has no features .* use `uncertainty.method: masks` or a deep ensemble"
    ):
        train(parse_config(values))
    assert load_model(folder / "run" / "model.pt").uncertainty == {"method": "none"}  # the weights are there


def test_frames_train_on_the_labels_they_have(folder: Path) -> None:
    mixed = [
        replace(
            f,
            forces=f.forces if k % 2 else None,
            stress=None if k % 3 else f.stress,
            energy=f.energy if k % 5 else None,
        )
        for k, f in enumerate(emt_frames(24))
    ]
    write_frames(folder / "train.h5", mixed)
    train(parse_config(settings(folder)))
    assert np.isfinite(float(log(folder)[-1]["val_forces_meV_A"]))


def test_isolated_atoms_are_found_among_the_frames(folder: Path) -> None:
    atom = Frame.from_atoms(Atoms("Cu"), energy=3.5)
    write_frames(folder / "train.h5", [*emt_frames(24), atom])
    short = {"epochs": 1}
    model = train(parse_config(settings(folder, data={"isolated_atoms": None}, **short)))
    assert model.potential.isolated.tolist() == [3.5]
    assert model.provenance["training_set"]["frames"] == 20


def test_a_model_that_cannot_be_calibrated_is_not_lost(folder: Path, monkeypatch) -> None:
    """Its readout is dead: the samples are all the same."""
    run_step = Trainer.run_step

    def killed(trainer: Trainer, batch: object, stop: object) -> None:
        run_step(trainer, batch, stop)
        for potential in (trainer.potential, trainer.ema.module):
            potential.output.weight.data.zero_()
            potential.layers[1].update.species.weight.data.zero_()

    monkeypatch.setattr(Trainer, "run_step", killed)
    values = settings(folder, epochs=1, dropout={"readout": 0.3})
    values["uncertainty"] = {"method": "masks", "functions": 8}
    with pytest.raises(
        ValueError, match=r"model\.pt was written, but could not be calibrated: \d+ of \d+ spreads are 0"
    ):
        train(parse_config(values))
    assert load_model(folder / "run" / "model.pt").calibration is None


def test_early_stopping(folder: Path) -> None:
    change = {"epochs": 40, "patience": 2, "optimiser": {"learning_rate": 0.3}}
    train(parse_config(settings(folder, **change)))
    rows = log(folder)
    assert len(rows) < 40
    best = int(np.argmin([float(r["val_loss"]) for r in rows]))
    assert len(rows) == best + 1 + 2


def test_own_calibration_files(folder: Path) -> None:
    write_frames(folder / "held.h5", emt_frames(7, seed=5))
    write_frames(folder / "watched.h5", emt_frames(3, seed=6))
    data = {"validation": [folder / "watched.h5"], "calibration": [folder / "held.h5"]}
    model = train(parse_config(settings(folder, data=data)))
    split = json.loads((folder / "run" / "split.json").read_text())
    assert {name: len(part) for name, part in split.items()} == {"train": 24, "validation": 3, "calibration": 7}
    assert model.calibration.n_frames == 7


def test_fine_tuning_starts_from_the_weights_of_a_model(folder: Path, trained_folder: Path) -> None:
    start = trained_folder / "run" / "model.pt"
    before = load_model(start).potential
    rate = {"learning_rate": 1e-9, "adam_learning_rate": 1e-9, "weight_decay": 0.0}
    write_frames(folder / "held.h5", emt_frames(8, seed=8))
    data = {"calibration": [folder / "held.h5"]}
    values = settings(folder, start=start, data=data, optimiser=rate, epochs=2)
    assert train(parse_config(values)).provenance["fine_tuned"] is True
    after = load_model(folder / "run" / "model.pt").potential
    for name, weight in before.named_parameters():
        if name.startswith("correction"):
            continue  # found anew: it is of other labels
        torch.testing.assert_close(after.get_parameter(name), weight, rtol=0, atol=1e-6)
    assert torch.equal(after.energy_scale, before.energy_scale)
    # and it learns from there: the first epoch is better than the last one of a training from nothing that is as long
    errors = {}
    for name, changes in (("tuned", {"start": start}), ("new", {})):
        values = settings(folder, data=data, epochs=2, output=folder / name, **changes)
        errors[name] = train(parse_config(values)).provenance["last_epoch"]["val_forces_meV_A"]
    assert errors["tuned"] < 0.7 * errors["new"]


def test_fine_tuning_goes_on_after_a_kill_without_its_start(folder: Path, trained_folder: Path, monkeypatch) -> None:
    shutil.copy(trained_folder / "run" / "model.pt", folder / "start.pt")
    write_frames(folder / "held.h5", emt_frames(8, seed=8))
    values = settings(folder, start=folder / "start.pt", data={"calibration": [folder / "held.h5"]})
    train(parse_config(values))
    expected = weights(folder)
    shutil.rmtree(folder / "run")
    with monkeypatch.context() as patch:
        _StopAt(patch, 9, signal.SIGTERM)
        with pytest.raises(TrainingInterrupted):
            train(parse_config(values))
    (folder / "start.pt").unlink()
    train(parse_config(values), resume=True)
    for name, weight in weights(folder).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0)


def test_fine_tuning_calibrates_on_what_calibrated_before(folder: Path, trained_folder: Path) -> None:
    """The frames of the old training with new ones among them, drawn by another seed: none of those that trained calibrates."""
    old = read_frames(trained_folder / "train.h5")
    write_frames(folder / "more.h5", [*emt_frames(6, seed=11), *old])
    start = trained_folder / "run" / "model.pt"
    values = settings(folder, start=start, data={"train": [folder / "more.h5"]}, epochs=1, seed=5)
    train(parse_config(values))
    again, before = (json.loads((path / "run" / "split.json").read_text()) for path in (folder, trained_folder))
    places = {f"more.h5#{int(source.rpartition('#')[2]) + 6}" for source in before["calibration"]}
    assert len(places) == 4
    assert {Path(source).name for source in again["calibration"]} == places


def test_fine_tuning_warns_of_frames_that_may_have_trained(folder: Path, trained: TrainedModel) -> None:
    """Of a model from before models knew what trained them; see tests/field/test_statistics.py for the others."""
    old = {name: value for name, value in trained.provenance.items() if not name.endswith("prints")}
    save_model(replace(trained, provenance=old), folder / "old.pt")
    values = settings(folder, start=folder / "old.pt", epochs=1)
    with pytest.warns(UserWarning, match=r"σ will be too small; give `data.calibration`"):
        train(parse_config(values))


def test_fine_tuning_refuses_other_networks(folder: Path, trained_folder: Path) -> None:
    start = trained_folder / "run" / "model.pt"
    write_frames(folder / "train.h5", emt_frames(24, seed=7))
    zero = {"isolated_atoms": {"Cu": 1.0}}
    with pytest.raises(ConfigError, match=r"counts from 0 eV for an isolated Cu, `data.isolated_atoms` says 1"):
        train(parse_config(settings(folder, start=start, data=zero)))
    with pytest.raises(ConfigError, match=r"`start`: .*model.pt has other settings; these differ: n_channels"):
        train(parse_config(settings(folder, start=start, model={"n_channels": 7})))
    other = Frame.from_atoms(Atoms("Ag", cell=[3, 3, 3], pbc=True), energy=0.0, forces=np.zeros((1, 3)))
    write_frames(folder / "train.h5", [*emt_frames(24, seed=7), other])
    data = {"isolated_atoms": {"Cu": 0.0, "Ag": 0.0}}
    with pytest.raises(ConfigError, match=r"`start`: .*model.pt does not know Ag"):
        train(parse_config(settings(folder, start=start, data=data)))
    with pytest.raises(ValueError, match=r"nowhere.pt"):
        train(parse_config(settings(folder, start=folder / "nowhere.pt", data=data)))
