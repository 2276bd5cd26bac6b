import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

from forcedrop.active.state import (
    Journal,
    State,
    frame_key,
    read_json,
    write_json,
)
from forcedrop.structures import Frame, FrameStore, read_frames, write_frames
from tests.conftest import emt_frames, ethanol


def test_key() -> None:
    frame = emt_frames(1)[0]
    key = frame_key(frame)

    def changed(**values: object) -> str:
        return frame_key(Frame(**{**vars(frame), **values}))

    assert changed(energy=None, forces=None, info={"a": 1}, source="elsewhere") == key
    assert changed(pos=frame.pos + 1e-9) == key
    assert changed(pos=np.where(frame.pos == 0, -0.0, frame.pos)) == key
    assert changed(pos=frame.pos + 1e-5) != key
    assert changed(cell=frame.cell * 1.001) != key
    assert changed(z=frame.z + 1) != key
    assert changed(pbc=~frame.pbc) != key
    flat = Frame.from_atoms(bulk("Cu"))
    assert frame_key(Frame(**{**vars(flat), "pos": -flat.pos})) == frame_key(flat)  # −0


def test_key_survives_the_store(tmp_path) -> None:
    frames = [Frame.from_atoms(ethanol(k)) for k in range(3)]
    write_frames(tmp_path / "f.h5", frames)
    assert [frame_key(f) for f in read_frames(tmp_path / "f.h5")] == [frame_key(f) for f in frames]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    monkeypatch.setattr("forcedrop.files.os.replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_json(tmp_path / "a.json", {"x": 2})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    assert read_json(tmp_path / "b.json") is None


def keep_writing(folder: Path) -> None:
    for k in range(10**6):
        write_json(folder / "a.json", {"k": [k] * 2000})


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_reader_never_sees_half_a_file(tmp_path) -> None:
    write_json(tmp_path / "a.json", {"k": [0] * 2000})
    for _ in range(5):
        writer = multiprocessing.get_context("fork").Process(target=keep_writing, args=(tmp_path,))
        writer.start()
        until = time.monotonic() + 0.2
        try:
            while time.monotonic() < until:
                assert len(set(read_json(tmp_path / "a.json")["k"])) == 1
        finally:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        assert len(read_json(tmp_path / "a.json")["k"]) == 2000
    State(tmp_path).clean()
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_appending_twice_is_appending_once(tmp_path) -> None:
    state, frames = State(tmp_path), emt_frames(6)
    assert state.frames() == []
    assert state.append([]) == 0
    assert state.append(frames[:4]) == 4
    assert state.append(frames[2:]) == 6
    assert state.append([*frames, frames[0]]) == 6
    assert [f.energy for f in state.frames()] == [f.energy for f in frames]
    with FrameStore(state.store) as store:
        assert store.provenance["what"] == "active learning"


def test_journal_with_a_torn_line(tmp_path) -> None:
    journal = Journal(tmp_path / "j")
    assert journal.read() == []
    journal.note(event="label", key="a")
    with (tmp_path / "j").open("a") as stream:
        stream.write('{"event": "lab')
    journal.note(event="label", key="b")
    assert [line["key"] for line in journal.read()] == ["a", "b"]


def test_stages_and_rounds(tmp_path) -> None:
    state = State(tmp_path)
    assert state.rounds() == []
    assert state.result(1, "pick") is None
    state.finish(1, "pick", {"picked": 3})
    write_json(state.round(1) / "labels" / "k.json", {"key": "k", "attempts": []})
    (state.round(1) / "labels" / ".k.json.12.part").write_text("{")
    assert state.result(1, "pick") == {"picked": 3}
    assert state.rounds() == [1]
    assert list(state.records(1)) == ["k"]
    assert state.tried() == {"k"}
