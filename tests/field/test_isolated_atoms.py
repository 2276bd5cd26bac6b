"""An atom alone is an isolated atom, in a box or not; what is given for one is checked."""

from pathlib import Path

import pytest
from ase import Atoms
from ase.build import bulk

from forcedrop.structures import Frame, is_isolated_atom, isolated_energies, write_frames
from forcedrop.training import parse_config
from forcedrop.training.data import prepare_data
from tests.conftest import emt_frames, settings


def single(symbol: str, energy: float, box: float = 14.0, source: str = "a.xyz#0", **info: str) -> Frame:
    return Frame.from_atoms(Atoms(symbol, cell=[box] * 3, pbc=box > 0), energy=energy, source=source, info=info)


def test_what_is_alone() -> None:
    assert is_isolated_atom(single("Cu", -1.0))
    assert is_isolated_atom(single("Cu", -1.0, 0.0))
    assert not is_isolated_atom(single("Cu", -1.0, 4.0))
    assert is_isolated_atom(single("Cu", -1.0, 4.0), cutoff=3.9)
    assert not is_isolated_atom(single("Cu", -1.0, 4.0), cutoff=4.1)
    assert is_isolated_atom(single("Cu", -1.0, 4.0, config_type="IsolatedAtom"))
    assert not is_isolated_atom(Frame.from_atoms(bulk("Cu")))
    assert not is_isolated_atom(Frame.from_atoms(bulk("Cu", cubic=True), info={"config_type": "IsolatedAtom"}))


def test_singles_in_boxes_among_the_training_frames(tmp_path: Path) -> None:
    write_frames(tmp_path / "train.h5", [single("Cu", -50.0), *emt_frames(20)])
    values = settings(tmp_path)
    del values["data"]["isolated_atoms"]
    data = prepare_data(parse_config(values))
    assert data.isolated == {29: -50.0}
    assert data.isolated_origin == "from single-atom frames"
    assert sum(len(part) for part in (data.split.train, data.split.validation, data.split.calibration)) == 20
    assert all(len(frame) == 4 for frame in data.split.train)


def test_a_file_of_boxes(tmp_path: Path) -> None:
    write_frames(tmp_path / "atoms.xyz", [single("Cu", -50.0), single("Al", -30.0)])
    assert isolated_energies(emt_frames(2), tmp_path / "atoms.xyz")[0] == {29: -50.0}


@pytest.mark.parametrize(("given", "message"), [
    ({"Cu": float("nan")}, "that of Cu must be a number, got nan"), ({29: float("-inf")}, "that of 29 must be a number"),
    ({"cu": -1.0}, "'cu' is no chemical symbol and no atomic number"), ({0: -1.0}, "0 is no chemical"),
    ({29: -1.0, "Cu": -2.0}, "Cu is given twice"), ({"Cu": "x"}, "must be a number, got 'x'"), ({"Al": -1.0}, "lack Cu"),
])  # fmt: skip
def test_what_cannot_be_given(given: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        isolated_energies(emt_frames(2), given)


def test_symbols_and_numbers() -> None:
    frames = [*emt_frames(1), single("Al", -1.0)]
    assert isolated_energies(
        frames,
        {29: -1, "Al": -2.0},
    )[0] == {29: -1.0, 13: -2.0}
    assert isolated_energies(frames, {"29": -1, "13": -2.0})[0] == {29: -1.0, 13: -2.0}


def test_two_energies_of_one_atom() -> None:
    frames = [single("Cu", -50.0), single("Cu", -49.0, source="a.xyz#7"), *emt_frames(1)]
    with pytest.raises(
        ValueError, match=r"two energies of an isolated Cu: -50 eV \(a\.xyz#0\) and -49 eV \(a\.xyz#7\)"
    ):
        isolated_energies(frames)
    assert isolated_energies([frames[0], single("Cu", -50.0, source="b"), frames[2]])[0] == {29: -50.0}
