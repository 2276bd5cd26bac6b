"""What trainings of other packages did in public reports, tried with ours; see README.md of this folder."""

import copy
from dataclasses import replace
from pathlib import Path

import ase.io
import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from forcedrop.evaluation import evaluate
from forcedrop.model import TrainedModel, load_model
from forcedrop.structures import read_frames, write_frames
from forcedrop.training import ConfigError, parse_config, train
from forcedrop.training.data import prepare_data
from forcedrop.training.loop import Trainer
from forcedrop.training.run import build_trainer
from tests.conftest import banked_potential, emt_frames, settings

MASKS = {
    "dropout": {"message": 0.1, "update": 0.2, "readout": 0.5},
    "uncertainty": {"method": "masks", "functions": 64},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_frames(tmp_path / "train.h5", emt_frames(24))
    return tmp_path


def trainer(folder: Path, **changes: object) -> Trainer:
    values = settings(folder, **{k: v for k, v in changes.items() if k != "uncertainty"})
    config = parse_config({**values, **({"uncertainty": changes["uncertainty"]} if "uncertainty" in changes else {})})
    return build_trainer(config, prepare_data(config))


def raw_weights(made: Trainer) -> dict[str, torch.Tensor]:
    return copy.deepcopy(made.potential.state_dict())


def test_going_on_starts_from_the_weights_and_not_from_their_average(folder: Path) -> None:
    """atomistic-machine-learning/schnetpack#785: a resumed training went on from the moving average, and jumped."""
    made = trainer(folder)
    batches = [batch for _ in range(2) for batch in made.batches()]
    for batch in batches[:6]:
        made.run_step(batch)
    state = copy.deepcopy(made.state_dict())
    again = trainer(folder)
    again.load_state_dict(state)
    average = made.ema.module.state_dict()
    raw = raw_weights(again)
    assert any(not torch.equal(raw[name], average[name]) for name in raw)
    for name, value in raw_weights(made).items():
        assert torch.equal(raw[name], value), name
    for one in (made, again):
        one.run_step(batches[6])
    for name, value in raw_weights(made).items():
        assert torch.equal(value, again.potential.state_dict()[name]), name
        assert torch.equal(made.ema.module.state_dict()[name], again.ema.module.state_dict()[name]), name


def test_every_seed_and_every_epoch_draws_masks_of_its_own(folder: Path) -> None:
    """Lightning-AI/pytorch-lightning#20412: different seeds ended in one and the same, and each epoch drew the same numbers."""
    seen = {}
    for seed in (0, 42, 123, 999):
        made = trainer(folder, seed=seed, **MASKS)
        batch = next(iter(made.batches()))
        for epoch in range(3):
            made.progress.epoch = epoch
            seen[seed, epoch] = tuple(made._functions(batch).tolist())
    assert len(set(seen.values())) == len(seen)
    splits = set()
    for seed in (0, 42, 123, 999):
        data = prepare_data(parse_config(settings(folder, seed=seed)))
        splits.add(tuple(frame.source for frame in data.split.train))
    assert len(splits) == 4


def test_processes_that_prepare_batches_change_nothing(folder: Path) -> None:
    """Lightning-AI/pytorch-lightning#20679: with ``num_workers`` above 0 other numbers came out than with 0."""
    found = []
    for workers in (0, 2):
        values = settings(folder, epochs=3, workers=workers)
        values |= {"output": str(folder / f"run{workers}"), "uncertainty": {"method": "none"}}
        train(parse_config(values))
        found.append(load_model(folder / f"run{workers}" / "model.pt").potential.state_dict())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_a_split_hangs_on_the_seed_of_the_file_alone(folder: Path) -> None:
    """TensorAuto/OpenTau#498: the split was drawn from a global generator, another one in each process."""
    config = parse_config(settings(folder, seed=5))
    splits = []
    for seed in range(3):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        data = prepare_data(config)
        splits.append(
            [[f.source for f in part] for part in (data.split.train, data.split.validation, data.split.calibration)]
        )
    assert splits[0] == splits[1] == splits[2]
    train_set, validation, calibration = map(set, splits[0])
    assert not train_set & validation | train_set & calibration | validation & calibration


def test_isolated_atoms_in_the_training_file(tmp_path: Path) -> None:
    """ACEsuit/mace-jax#23: isolated atoms in the file of the training were not found."""
    atom = Atoms("C", positions=[[0, 0, 0]], info={"REF_energy": -150.0, "config_type": "IsolatedAtom", "Z": 6})
    images = [atom]
    for k in range(12):
        crystal = bulk("C", "diamond", a=3.56)
        crystal.rattle(0.03, seed=k)
        crystal.info |= {"REF_energy": -318.0 + 0.01 * k, "REF_stress": np.diag([0.002, 0.001, 0.003])}
        crystal.arrays["REF_forces"] = np.random.default_rng(k).normal(size=(2, 3))
        images.append(crystal)
    ase.io.write(tmp_path / "train.xyz", images, format="extxyz")
    values = settings(tmp_path)
    values["data"] = {"train": [str(tmp_path / "train.xyz")]}
    data = prepare_data(parse_config(values))
    assert data.isolated == {6: -150.0}
    assert data.isolated_origin == "from single-atom frames"
    every = [*data.split.train, *data.split.validation, *data.split.calibration]
    assert len(every) == 12
    assert all(len(f) == 2 and f.stress is not None for f in every)


def test_isolated_energies_that_cannot_be_those_of_the_labels(tmp_path: Path) -> None:
    """ACEsuit/mace#581: total energies of single atoms beside interaction energies as labels; errors of 1000s of eV."""
    write_frames(tmp_path / "train.h5", emt_frames(24))
    values = settings(tmp_path)
    values["data"] |= {"isolated_atoms": {"Cu": -2041.84}}
    said = [note for note in prepare_data(parse_config(values)).notes if "isolated" in note]
    assert len(said) == 1
    assert "warning: energies of the structures are 2042 eV per atom above those of their isolated atoms" in said[0]
    values["data"] |= {"isolated_atoms": {"Cu": 3.5}}
    assert not [note for note in prepare_data(parse_config(values)).notes if "isolated" in note]


@pytest.mark.parametrize("name", ["charge", "total_charge", "spin", "multiplicity"])
def test_charges_and_spins_that_no_network_sees(tmp_path: Path, name: str) -> None:
    """cusp-ai-oss/kUPS#236 and openmm/spice-dataset#42: charge and spin were taken for 0, or not there, whatever they were."""
    frames = [replace(frame, info={name: k % 2, "config_type": "x"}) for k, frame in enumerate(emt_frames(24))]
    write_frames(tmp_path / "train.h5", frames)
    said = prepare_data(parse_config(settings(tmp_path))).notes
    assert any(f"warning: frames of Cu4 have `{name}` 0 and 1: a network does not see" in note for note in said)
    write_frames(tmp_path / "train.h5", [replace(frame, info={name: 1}) for frame in emt_frames(24)])
    assert not [note for note in prepare_data(parse_config(settings(tmp_path))).notes if "does not see" in note]


def test_keys_that_are_not_used_are_errors(folder: Path) -> None:
    """mir-group/nequip#579: misspelt keys; here the error names the closest right one."""
    values = settings(folder)
    values["optimiser"] |= {"learning_rte": 0.1}
    values |= {"include_stress": True, "epocs": 3}
    with pytest.raises(ConfigError) as error:
        parse_config(values)
    text = str(error.value)
    assert "`optimiser.learning_rte`; did you mean `optimiser.learning_rate`?" in text
    assert "`epocs`; did you mean `epochs`?" in text
    assert "include_stress" in text


@pytest.mark.parametrize("key", ["forces_key", "energy_key", "stress_key"])
def test_a_label_that_was_asked_for_and_is_not_there(tmp_path: Path, key: str) -> None:
    """metatensor/metatrain#1159, molmod/psiflow#93: a misspelt key of the forces trained on energies alone."""
    ase.io.write(tmp_path / "train.xyz", [frame.to_atoms() for frame in emt_frames(8)], format="extxyz")
    values = settings(tmp_path)
    values["data"] = {"train": [str(tmp_path / "train.xyz")], key: "something_wrong"}
    with pytest.raises(ValueError, match=r"train\.xyz.*something_wrong.*forces"):
        prepare_data(parse_config(values))


def test_stress_errors_count_every_component_once(tmp_path: Path) -> None:
    """libAtoms/workflow#348: components off the diagonal counted twice where a stress was a matrix."""
    frames = emt_frames(6)
    model = TrainedModel(banked_potential())
    rmse = []
    for name in ("six", "matrix"):
        images = []
        for frame in frames:
            atoms = Atoms(numbers=frame.z, positions=frame.pos, cell=frame.cell, pbc=True)
            atoms.info["energy"], atoms.arrays["forces"] = frame.energy, frame.forces
            tensor = frame.stress[[0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(3, 3)
            atoms.info["REF_stress"] = frame.stress if name == "six" else tensor
            images.append(atoms)
        ase.io.write(tmp_path / f"{name}.xyz", images, format="extxyz")
        found = evaluate(model, read_frames(tmp_path / f"{name}.xyz"), n_samples=8)
        assert found.error["stress"].size == 6 * 6
        rmse.append(float(np.sqrt(np.mean(found.error["stress"] ** 2))))
    assert rmse[0] == pytest.approx(rmse[1], rel=1e-6)


def test_labels_of_each_frame_are_its_own(tmp_path: Path) -> None:
    """deepmodeling/dpdata#74: a file where some frames have a virial was taken to have one in all."""
    frames = [
        replace(frame, forces=frame.forces if k % 2 else None, stress=frame.stress if k % 3 else None)
        for k, frame in enumerate(emt_frames(12))
    ]
    write_frames(tmp_path / "train.h5", frames)
    made = trainer(tmp_path)
    for batch in made.batches():
        for number, source in enumerate(batch.source):
            k = int(source.rpartition("#")[2])
            assert bool(batch.has_forces[number]) == bool(k % 2)
            assert bool(batch.has_stress[number]) == bool(k % 3)
        made.run_step(batch)
    assert all(torch.isfinite(value).all() for value in made.potential.state_dict().values())
