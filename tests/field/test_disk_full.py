"""A disk that becomes full, or a labels' store that is damaged: one line, nothing lost, and going on with room.

`benchmarks/disk_full.py` does the same with true file systems of 40 sizes.
"""

import errno
from pathlib import Path

import pytest
from typer.testing import CliRunner

from forcedrop.active.state import State
from forcedrop.cli import app
from forcedrop.files import load_tensors
from forcedrop.md import run_md
from forcedrop.structures import FrameStore, read_frames, write_frames
from tests.active.test_loop import loop
from tests.conftest import emt_frames
from tests.disks import Disk, failing


def md(folder: Path, model: Path, *more: str) -> tuple[int, str]:
    command = ["md", str(model), str(folder / "start.h5"), "--steps", "6", "--record-every", "1", "--ensemble", "nvt"]
    found = CliRunner().invoke(app, [*command, "--samples", "4", "--output", str(folder / "out"), *more])
    assert found.exception is None or isinstance(found.exception, SystemExit)
    return found.exit_code, found.output


@pytest.mark.parametrize("room", [0, 100, 5_000, 20_000, 60_000, 200_000])
def test_dynamics(trained_folder, tmp_path: Path, room: int) -> None:
    model = trained_folder / "run" / "model.pt"
    write_frames(tmp_path / "start.h5", emt_frames(1))
    with failing(Disk(room=room)):
        code, said = md(tmp_path, model)
    lines = [line for line in said.splitlines() if line.startswith("error")]
    assert code == 1
    assert len(lines) == 1
    assert lines[0].startswith(f"error: the disk is full: cannot write {tmp_path / 'out'}")
    assert not list(tmp_path.rglob("*.part"))
    out = tmp_path / "out"
    if (out / "restart.pt").exists():
        load_tensors(out / "restart.pt")
        rows = (out / "md.csv").read_text().splitlines()
        assert len(FrameStore(out / "md.h5")) == len(read_frames(out / "md.xyz")) == len(rows) - 1
    code, _ = md(tmp_path, model, "--resume")
    assert code == 0
    (tmp_path / "peace").mkdir()
    write_frames(tmp_path / "peace" / "start.h5", emt_frames(1))
    md(tmp_path / "peace", model)
    for name in ("md.csv", "md.xyz"):
        assert (out / name).read_bytes() == (tmp_path / "peace" / "out" / name).read_bytes()
    assert FrameStore(out / "md.h5").content_hash() == FrameStore(tmp_path / "peace" / "out" / "md.h5").content_hash()


WORDS = {
    errno.EIO: "the disk failed",
    errno.EACCES: "permission denied",
    errno.EDQUOT: "the quota of the disk is used up",
}


@pytest.mark.parametrize("code", WORDS)
def test_other_errors(trained_folder, tmp_path: Path, code: int) -> None:
    write_frames(tmp_path / "start.h5", emt_frames(1))
    with failing(Disk(after=12, code=code)):
        status, said = md(tmp_path, trained_folder / "run" / "model.pt")
    assert status == 1
    assert f"error: {WORDS[code]}" in said
    assert str(tmp_path / "out") in said
    assert "Traceback" not in said
    assert not list(tmp_path.rglob("*.part"))


def test_a_frame_is_in_all_files_or_in_none(trained, tmp_path: Path) -> None:
    """Whatever call fails, rows and frames agree afterwards, without a resumption."""
    from forcedrop.calculator import DropoutCalculator

    atoms = emt_frames(1)[0].to_atoms()
    for after in (20, 21, 22, 23, 24, 25, 26, 27):
        folder = tmp_path / str(after)
        with failing(Disk(after=after)), pytest.raises(OSError, match="the disk is full"):
            run_md(atoms.copy(), DropoutCalculator(trained, 2), folder, steps=9, record_every=1)
        rows = (folder / "md.csv").read_text().splitlines()
        count = len(rows) - 1 if rows else 0
        assert len(FrameStore(folder / "md.h5")) == count
        assert (folder / "md.xyz").read_text().count("Lattice") == count


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a loop that is over, and the hash of its labels."""
    folder = tmp_path_factory.mktemp("loop")
    found = loop(folder, stop={"labels": 16})
    found.run()
    return folder, FrameStore(found.state.store).content_hash()


@pytest.mark.parametrize("how", ["one bit", "cut", "no bytes", "gone"])
def test_damaged_labels_are_made_anew(stopped: tuple[Path, str], how: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder, wanted = stopped
    state = State(folder / "state")
    data = state.store.read_bytes()
    at = data.index(b"OHDR", 100) + 8
    damaged = {"one bit": data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], "cut": data[:1000], "no bytes": b""}
    if how == "gone":
        state.store.unlink()
    else:
        state.store.write_bytes(damaged[how])
        with pytest.raises(ValueError, match=r"labels\.h5"):
            state.frames()
    loop(folder, stop={"labels": 16}).run()
    assert FrameStore(state.store).content_hash() == wanted
    said = capsys.readouterr()
    assert "made anew" in said.out + said.err
    assert "labels.h5" in said.out + said.err


@pytest.mark.slow
@pytest.mark.parametrize("room", [3_000, 30_000, 200_000, 400_000, 800_000])
def test_a_loop(stopped: tuple[Path, str], tmp_path: Path, room: int) -> None:
    with failing(Disk(room=room)), pytest.raises(OSError, match=f"the disk is full: cannot write {tmp_path}"):
        loop(tmp_path, stop={"labels": 16}).run()
    assert not list(tmp_path.rglob("*.part"))
    again = loop(tmp_path, stop={"labels": 16})
    again.run()
    assert len(again.state.frames()) == len(State(stopped[0] / "state").frames())
    load_tensors(again.state.folder / "model.pt")
