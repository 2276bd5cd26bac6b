"""What labels are for: shares, and that nothing ever changes its role."""

from dataclasses import replace

import numpy as np
import pytest
from ase import Atoms

from forcedrop.active.roles import draw_roles, role_files
from forcedrop.active.state import State, frame_key
from forcedrop.structures import Frame, read_frames
from tests.conftest import emt_frames

SHARES = {"validation": 0.1, "calibration": 0.2}


def in_round(number: int, frames: list[Frame]) -> list[Frame]:
    return [replace(frame, info={"round": number}) for frame in frames]


def held(files: dict) -> dict[str, set[str]]:
    return {role: {frame_key(f) for path in paths for f in read_frames(path)} for role, paths in files.items()}


def test_shares_hold_of_all_labels_and_roles_stay(tmp_path) -> None:
    state = State(tmp_path)
    frames = emt_frames(60)
    parts = [in_round(0, frames[:30]), in_round(1, frames[30:35]), in_round(2, frames[35:])]
    before: dict[str, set[str]] = {}
    for number, (part, changed) in enumerate(zip(parts, ({}, {"calibration": 0.5}, {}), strict=True), start=1):
        state.append(part)
        files, n_train = role_files(state, number, SHARES | changed, seed=number)
        found = held(files)
        total = sum(len(keys) for keys in found.values())
        assert total == len(set().union(*found.values())) == (30, 35, 60)[number - 1]  # every label has one role
        assert n_train == len(found["train"])
        assert all(before.get(role, set()) <= keys for role, keys in found.items())
        again, _ = role_files(state, number, {"validation": 0.4, "calibration": 0.4}, seed=9)
        assert held(again) == found
        before = found
    assert len(before["validation"]) == 6
    assert len(before["calibration"]) == 12  # all five of the second round, and what is left to the share


def test_what_may_not_be_held_out() -> None:
    rng = np.random.default_rng(0)
    copper, single = emt_frames(3), Frame.from_atoms(Atoms("Cu"))
    silver = Frame.from_atoms(Atoms("AgCu", [[0, 0, 0], [0, 0, 2.5]]))
    for seed in range(5):
        rng = np.random.default_rng(seed)
        roles = draw_roles([silver, single, *copper], {}, {"validation": 0.3, "calibration": 0.3}, rng)
        assert roles[:2] == ["train", "train"]
        assert sorted(roles[2:]) == ["calibration", "train", "validation"]
    other = Frame.from_atoms(Atoms("AgCu", [[0, 0, 0], [0, 0, 2.7]]))
    assert draw_roles([other], {"train": [silver]}, {"calibration": 1.0}, rng) == ["calibration"]
    assert draw_roles(copper, {}, {"calibration": 0.0}, rng) == ["train"] * 3


def test_too_few(tmp_path) -> None:
    state = State(tmp_path)
    state.append(in_round(0, [Frame.from_atoms(Atoms("Cu"))]))
    with pytest.raises(ValueError, match="1 labels are too few to hold out"):
        role_files(state, 1, SHARES, seed=0)
