"""What is held out is new, what is printed is of the file, and a few functions are no error bar."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from forcedrop import DropoutCalculator, flag
from forcedrop.active.roles import draw_roles
from forcedrop.cli import app
from forcedrop.evaluation import compare, evaluate
from forcedrop.model import TrainedModel, committee, fill, load_model, save_model
from forcedrop.structures import BadFrames, Frame, write_frames
from forcedrop.structures.compositions import basis, spanned
from forcedrop.structures.copies import copies, signatures
from forcedrop.structures.prints import Prints
from forcedrop.structures.sequences import halves, runs
from forcedrop.training import ConfigError, parse_config, train
from forcedrop.training.data import prepare_data
from tests.conftest import emt_frames, ethanol, settings


def turned(frame: Frame, seed: int, digits: int = 5) -> Frame:
    """The same structure, turned, shifted, its atoms in another order, its numbers rounded."""
    rng = np.random.default_rng(seed)
    rotation = Rotation.random(random_state=seed).as_matrix()
    order = rng.permutation(len(frame))
    atoms = Atoms(frame.z, frame.pos @ rotation.T + rng.normal(size=3), cell=frame.cell @ rotation.T, pbc=frame.pbc)[
        order
    ]
    if frame.pbc.any():
        atoms.wrap()
    moved = Frame.from_atoms(atoms, source=f"turned#{seed}", energy=frame.energy)
    forces = None if frame.forces is None else (frame.forces @ rotation.T)[order]
    return replace(moved, pos=np.round(moved.pos, digits), forces=forces)


def rattled(atoms: Atoms, n: int, scale: float, seed: int = 0) -> list[Frame]:
    rng = np.random.default_rng(seed)
    frames = []
    for k in range(n):
        moved = atoms.copy()
        moved.positions += rng.normal(scale=scale, size=moved.positions.shape)
        frames.append(Frame.from_atoms(moved, source=f"rattled#{k}"))
    return frames


def trajectory(n: int = 60, seed: int = 0) -> list[Frame]:
    """Copper cells that change slowly, with labels, as those of a trajectory do."""
    rng = np.random.default_rng(seed)
    start, step, frames = bulk("Cu", a=3.6, cubic=True), np.zeros((4, 3)), []
    for k in range(n):
        step = 0.95 * step + 0.3 * rng.normal(scale=0.08, size=(4, 3))
        atoms = start.copy()
        atoms.positions += step
        atoms.calc = EMT()
        energy = float(atoms.get_potential_energy())
        frames.append(Frame.from_atoms(atoms, energy=energy, forces=atoms.get_forces(), source=f"run#{k}"))
    return frames


def prepared(tmp_path: Path, frames: list[Frame], **data: object):
    write_frames(tmp_path / "train.h5", frames)
    return prepare_data(parse_config(settings(tmp_path, data=data)))


def numbers(frames: list[Frame]) -> list[int]:
    return [int(frame.source.rpartition("#")[2]) for frame in frames]


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output
    return re.sub(r"\s+", " ", result.output)


# copies


@pytest.mark.parametrize(
    "atoms", [ethanol(), bulk("Cu", cubic=True).repeat((2, 1, 1)), bulk("NaCl", "rocksalt", a=5.6)]
)
def test_copies_are_found_however_they_are_turned(atoms: Atoms) -> None:
    one, two = rattled(atoms, 2, 0.05)
    found = copies(
        [one, two, turned(one, 1), turned(two, 2, digits=3), turned(one, 3), *rattled(atoms, 1, 0.05, seed=7)]
    )
    assert found.tolist() == [0, 1, 0, 1, 0, 5]


def test_nearly_equal_structures_are_copies_and_small_displacements_are_none() -> None:
    base = ethanol()
    assert set(copies(rattled(base, 20, 5e-4)).tolist()) == {0}
    for atoms, scale in ((base, 0.01), (bulk("Cu", cubic=True).repeat(2), 0.01), (bulk("Si", cubic=True), 0.02)):
        assert copies(rattled(atoms, 30, scale)).tolist() == list(range(30))
    strained = []
    for k in range(60):  # a primitive cell, whose sums over shells do not feel a shear to first order
        atoms = bulk("Si")
        strain = np.eye(3) + np.random.default_rng(k).normal(scale=0.01, size=(3, 3))
        atoms.set_cell(atoms.cell.array @ strain, scale_atoms=True)
        strained.append(Frame.from_atoms(atoms))
    assert copies(strained).tolist() == list(range(60))


def test_copies_stay_on_one_side_and_count_once_where_held_out(tmp_path: Path) -> None:
    once = emt_frames(40)
    data = prepared(tmp_path, [*once, *once, *(turned(f, k) for k, f in enumerate(once))])
    roles = [data.split.train, data.split.validation, data.split.calibration]
    sides = [{number % 40 for number in numbers(part)} for part in roles]
    assert [len(part) for part in roles] == [96, 4, 4]
    assert [len(side) for side in sides] == [32, 4, 4]
    assert len(set.union(*sides)) == 40
    assert any("80 of 120 frames are copies" in note for note in data.notes)


def test_a_file_without_copies_is_split_as_before(tmp_path: Path) -> None:
    """The numbers that version 0.1 drew."""
    import torch

    data = prepared(tmp_path, emt_frames(40))
    generator = torch.Generator().manual_seed(0)
    left = list(range(40))
    for held, share in ((data.split.validation, 0.1), (data.split.calibration, 0.1 / 0.9)):
        drawn = sorted(torch.randperm(len(left), generator=generator).tolist()[: round(share * len(left))])
        assert numbers(held) == [left[k] for k in drawn]
        left = [k for k in left if k not in numbers(held)]
    assert numbers(data.split.train) == left
    assert data.notes == []


@pytest.mark.parametrize("role", ["validation", "calibration"])
def test_held_out_files_that_train_are_refused_or_skipped(tmp_path: Path, role: str) -> None:
    frames = emt_frames(24)
    write_frames(tmp_path / "other.xyz", [*emt_frames(3, seed=5), turned(frames[7], 1)])
    paths = {role: [f"{tmp_path}/other.xyz"]}
    with pytest.raises(BadFrames, match=r"other\.xyz#3: copy: the same structure as .*train\.h5#7(.|\n)*1 of 4 frames"):
        prepared(tmp_path, frames, **paths)
    data = prepared(tmp_path, frames, skip_bad=True, **paths)
    assert numbers(getattr(data.split, role)) == [0, 1, 2]
    with pytest.raises(BadFrames, match="24 of 24 frames"):
        prepared(tmp_path, frames, skip_bad=True, **{role: [f"{tmp_path}/train.h5"]})


def test_a_model_knows_again_what_trained_it(trained_folder: Path, trained: TrainedModel) -> None:
    split = json.loads((trained_folder / "run" / "split.json").read_text())
    every = emt_frames(40)
    number = {role: [int(s.rpartition("#")[2]) for s in sources] for role, sources in split.items()}
    mask = trained.trained_on([turned(frame, k) for k, frame in enumerate(every)])
    assert np.flatnonzero(mask).tolist() == sorted(number["train"])
    with pytest.warns(UserWarning, match=r"32 of 40 frames trained the model"):
        evaluate(trained, every, n_samples=8)
    fresh = emt_frames(12, seed=9)
    with pytest.raises(ValueError, match=r"1 of 12 frames to calibrate one on trained the model \(emt#"):
        compare({"one": trained}, {"test": emt_frames(4, seed=8)}, [every[number["train"][0]], *fresh[1:]], n_samples=8)
    with pytest.raises(ValueError, match="2 of 12 frames to calibrate on are to be judged on as well"):
        compare({"one": trained}, {"test": fresh[:2]}, fresh, n_samples=8)
    with pytest.raises(ValueError, match="1 of 13 frames that are held out trained the model"):
        fill(trained, every, [*fresh, every[number["train"][3]]], quiet=True)


def test_copies_count_once_where_functions_are_filled_in(trained: TrainedModel) -> None:
    train_on, held = emt_frames(40), emt_frames(8, seed=9)
    found = fill(trained, train_on, [*held, *(turned(f, k) for k, f in enumerate(held))], quiet=True)
    assert found.calibration is not None
    assert found.calibration.n_frames == 4
    assert found.provenance["validation"]["frames"] == 4
    with pytest.raises(
        ValueError, match=r"1 of 9 frames that are held out are among the training frames \(turned#5 = "
    ):
        fill(replace(trained, provenance={}), train_on, [*held, turned(train_on[3], 5)], quiet=True)


def test_copies_among_the_labels_of_a_loop_have_one_role() -> None:
    known, new = emt_frames(6), emt_frames(8, seed=3)
    held = {"train": known[:4], "validation": known[4:5], "calibration": known[5:]}
    frames = [turned(known[5], 1), *new, turned(known[4], 2), *(turned(frame, k) for k, frame in enumerate(new))]
    shares = {"validation": 0.1, "calibration": 0.1}
    roles = draw_roles(frames, held, shares, np.random.default_rng(0))
    assert (roles[0], roles[9]) == ("calibration", "validation")
    assert roles[1:9] == roles[10:]
    assert set(roles[1:9]) == {"train", "validation", "calibration"}


def test_prints_survive_the_file_and_damage_is_named() -> None:
    frames = emt_frames(6)
    prints = Prints.from_dict(json.loads(json.dumps(Prints.taken(signatures(frames[:4])).to_dict())))
    assert prints.hold(frames).tolist() == [True] * 4 + [False] * 2
    with pytest.raises(ValueError, match="prints of the training frames are damaged"):
        Prints.from_dict({"of": 4, "kinds": "AAA", "values": "!"})


# sequences


def test_trajectories_are_held_out_in_blocks(tmp_path: Path) -> None:
    frames = trajectory(100)
    (run_found,) = runs(frames, signatures(frames))
    assert run_found.in_sequence
    shuffled = [frames[k] for k in np.random.default_rng(0).permutation(100)]
    assert not runs(shuffled, signatures(shuffled))[0].in_sequence
    data = prepared(tmp_path, frames)
    for part in (data.split.validation, data.split.calibration):
        held = numbers(part)
        assert len(held) == 10
        assert {tuple(held[:5]), tuple(held[5:])} <= {tuple(range(k, k + 5)) for k in range(0, 100, 5)}
    assert any("100 frames" in note and "held out in blocks of 5" in note for note in data.notes)
    one_by_one = prepared(tmp_path, frames, split="random")
    assert max(np.diff(numbers(one_by_one.split.validation))) > 1
    assert any("held out one by one" in note for note in one_by_one.notes)
    in_blocks = prepared(tmp_path, emt_frames(40), split="blocks")
    assert numbers(in_blocks.split.validation)[0] % 4 == 0
    assert np.diff(numbers(in_blocks.split.validation)).tolist() == [1, 1, 1]


def test_halves_of_a_trajectory_are_pieces() -> None:
    frames = trajectory(40)
    assert halves(frames, signatures(frames))[0] == [*range(10), *range(20, 30)]
    frames = emt_frames(8)
    assert halves(frames, signatures(frames)) == ([0, 2, 4, 6], [1, 3, 5, 7])


# elements


def test_an_element_is_known_from_structures_to_train_on_alone(tmp_path: Path) -> None:
    silver = Frame.from_atoms(Atoms("Ag"), energy=-1.0)
    atom = Frame.from_atoms(Atoms("Cu"), energy=-2.0)
    data = prepared(tmp_path, [*emt_frames(24), atom, silver], isolated_atoms=None)
    assert (data.elements, data.isolated) == ((29,), {29: -2.0})
    assert any("an isolated atom is all there is of Ag" in note for note in data.notes)


@pytest.mark.parametrize("seed", range(6))
def test_the_only_structure_with_an_element_trains(tmp_path: Path, seed: int) -> None:
    alloy = emt_frames(1, seed=3)[0]
    write_frames(tmp_path / "train.h5", [*emt_frames(9), replace(alloy, z=np.array([47, 29, 29, 29]))])
    data = {"isolated_atoms": None, "validation_fraction": 0.3, "calibration_fraction": 0.3}
    found = prepare_data(parse_config(settings(tmp_path, data=data, seed=seed)))
    assert 9 in numbers(found.split.train)
    assert [len(found.split.validation), len(found.split.calibration)] == [3, 3]
    assert any("one structure to train on is all there is of Ag (" in note for note in found.notes)


# the number printed is the number saved


def test_validation_errors_are_those_of_the_file(trained_folder: Path, trained: TrainedModel) -> None:
    split = json.loads((trained_folder / "run" / "split.json").read_text())
    every = emt_frames(40)
    held = [every[int(source.rpartition("#")[2])] for source in split["validation"]]
    found = evaluate(trained, held, n_samples=16)
    said = trained.provenance["validation"]
    assert (said["frames"], said["functions"]) == (4, 16)
    np.testing.assert_allclose(said["forces_meV_A"], 1e3 * found.plain_rmse["forces"], rtol=1e-6)
    np.testing.assert_allclose(said["energy_meV_atom"], 1e3 * found.plain_rmse["energy"], rtol=1e-6)
    assert trained.uncertainty["refit"]
    assert abs(said["forces_meV_A"] / trained.provenance["last_epoch"]["val_forces_meV_A"] - 1) > 1e-3
    text = run("info", trained_folder / "run" / "model.pt")
    assert (
        "validation RMSE of this model (mean of 16 functions; 4 frames, by which epoch and functions were chosen): "
        in text
    )
    assert (
        f"were chosen): forces {said['forces_meV_A']:.1f} meV/Å, energy {said['energy_meV_atom']:.2f} meV/atom" in text
    )


def test_an_old_file_says_of_what_its_errors_are(tmp_path: Path, trained: TrainedModel) -> None:
    old = {name: value for name, value in trained.provenance.items() if name not in ("validation", "prints")}
    save_model(replace(trained, provenance=old), tmp_path / "old.pt")
    assert "in the last epoch of training, not of this model" in run("info", tmp_path / "old.pt")


# few functions


def test_few_functions_are_no_error_bar(trained: TrainedModel, trained_folder: Path, tmp_path: Path) -> None:
    frames = emt_frames(4, seed=9)
    for n in (2, 3):
        with pytest.warns(UserWarning, match=f"σ of {n} functions says nothing"):
            calculator = DropoutCalculator(trained, n_samples=n)
        atoms = frames[0].to_atoms()
        atoms.calc = calculator
        atoms.get_forces()
        assert "forces_std" in calculator.results
        assert not [name for name in calculator.results if name.endswith("_uncertainty")]
        with pytest.raises(ValueError, match=f"no calibrated σ of fewer than 4 functions .* asked for {n}"):
            flag(trained, frames, n_samples=n)
    with pytest.warns(UserWarning, match="σ of 5 functions says little"):
        DropoutCalculator(trained, n_samples=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DropoutCalculator(trained, n_samples=8)
    write_frames(tmp_path / "f.xyz", emt_frames(4, seed=9))
    with pytest.warns(UserWarning, match="σ of 3 functions says nothing"):
        out = run("evaluate", trained_folder / "run" / "model.pt", tmp_path / "f.xyz", "--samples", 3)
    assert "calibrated σ of 3" not in out
    out = run("evaluate", trained_folder / "run" / "model.pt", tmp_path / "f.xyz", "--samples", 16)
    assert "4 frames, calibrated σ of 16 functions" in out


def test_equal_members_are_no_ensemble(trained: TrainedModel) -> None:
    with pytest.raises(ValueError, match="members 1 and 2 of the ensemble are equal"):
        committee([trained, load_model_again(trained)])


def load_model_again(model: TrainedModel) -> TrainedModel:
    from copy import deepcopy

    return replace(model, potential=deepcopy(model.potential))


# resuming


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"data": {"isolated_atoms": {"Cu": -1.0}}}, "data.isolated_atoms"),
        ({"data": {"calibration_fraction": 0.2}}, "data.calibration_fraction"),
        ({"data": {"split": "blocks"}}, "data.split"),
        ({"loss": {"energy": 2.0}}, "loss.energy"),
        ({"batch_size": 3, "model": {"n_channels": 4}}, "model.n_channels, batch_size"),
    ],
)
def test_resume_compares_all_that_is_trained(trained_folder: Path, changes: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=f"these differ: {named}$"):
        train(parse_config(settings(trained_folder, epochs=46, **changes)), resume=True)


def test_resume_compares_what_held_out_files_hold(tmp_path: Path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(12))
    for name, seed in (("val", 5), ("cal", 6)):
        write_frames(tmp_path / f"{name}.h5", emt_frames(4, seed=seed))
    data = {"validation": [f"{tmp_path}/val.h5"], "calibration": [f"{tmp_path}/cal.h5"]}
    train(parse_config(settings(tmp_path, epochs=1, data=data)))
    train(parse_config(settings(tmp_path, epochs=1, data=data)), resume=True)
    write_frames(tmp_path / "cal.h5", emt_frames(4, seed=7))
    with pytest.raises(ConfigError, match=r"these differ: data\.calibration$"):
        train(parse_config(settings(tmp_path, epochs=1, data=data)), resume=True)


def test_fine_tuning_refuses_to_calibrate_on_what_trained_the_start(tmp_path: Path, trained_folder: Path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(40)[::-1])
    model = load_model(trained_folder / "run" / "model.pt")
    del model.provenance[
        "calibration_prints"
    ]  # which frames calibrated it is not known: they cannot be kept apart again
    start = str(tmp_path / "start.pt")
    save_model(model, start)
    with pytest.raises(ConfigError, match=r"`start`: \d of 4 frames to calibrate on trained .*start\.pt"):
        train(parse_config(settings(tmp_path, epochs=1, start=start, seed=4)))


# atomic energies that the data do not determine


def test_compositions_span_their_combinations() -> None:
    frames = [Frame.from_atoms(molecule(name), energy=-1.0) for name in ("H2O", "H2O", "CO2", "H2O2")]
    assert basis(frames) == [{"H": 2, "O": 1}, {"C": 1, "O": 2}, {"H": 2, "O": 2}]
    two = basis(frames[:3])
    assert spanned(np.array([1, 1, 1, 1, 8, 8]), two)
    assert spanned(np.array([1, 1, 6, 8, 8, 8]), two)
    assert not spanned(molecule("CO").numbers, two)
    assert not spanned(np.array([1]), [])


def test_energies_of_other_compositions_mean_nothing_and_it_is_said(tmp_path: Path) -> None:
    alloy = [replace(frame, z=np.array([13, 29, 29, 29])) for frame in emt_frames(20)]
    write_frames(tmp_path / "train.h5", alloy)
    data = {"isolated_atoms": None}
    model = train(parse_config(settings(tmp_path, epochs=1, data=data)))
    assert model.provenance["isolated_energies"]["compositions"] == [{"Al": 1, "Cu": 3}]
    assert "energies mean something for AlCu3 and combinations of them only" in run(
        "info", tmp_path / "run" / "model.pt"
    )
    other = Frame.from_atoms(bulk("Cu", cubic=True), energy=0.0)
    with pytest.warns(UserWarning, match=r"energies of 1 of 2 frames \(Cu4\) mean nothing"):
        evaluate(model, [other, replace(emt_frames(1, seed=8)[0], z=alloy[0].z)], n_samples=8)
    calculator = DropoutCalculator(model, n_samples=8)
    atoms = alloy[0].to_atoms()
    twice = atoms.repeat((1, 1, 2))
    for known in (atoms, twice):
        known.calc = calculator
        known.get_potential_energy()
    atoms = bulk("Cu", cubic=True)
    atoms.calc = calculator
    with pytest.warns(UserWarning, match="the energy of Cu4 means nothing"):
        atoms.get_potential_energy()
    atoms.rattle(0.01)
    atoms.get_potential_energy()  # said once
    given = parse_config(settings(tmp_path, data={"isolated_atoms": {"Cu": 0.0, "Al": 0.0}}))
    assert prepare_data(given).compositions is None
