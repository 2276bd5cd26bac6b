import errno
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

from forcedrop.files import (
    WriteError,
    append_bytes,
    cut,
    load_tensors,
    make_folder,
    remove_parts,
    save_tensors,
    whole,
    whole_folder,
    write_bytes,
    write_text,
    writing,
)
from tests.disks import Disk, failing

REASONS = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "quota", errno.EIO: "the disk failed", errno.EROFS: "only be read",
           errno.EACCES: "permission denied", errno.ENAMETOOLONG: "File name too long"}  # fmt: skip


@pytest.mark.parametrize("code", REASONS)
@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_an_error_leaves_what_was_there_and_says_why(tmp_path: Path, call: str, code: int) -> None:
    write_text(tmp_path / "a.txt", "before")
    for name in ("a.txt", "new.txt"):
        with failing(Disk(after=0, code=code, only=(call,))), pytest.raises(WriteError, match=REASONS[code]) as caught:
            write_text(tmp_path / name, "after")
        assert f"cannot write {tmp_path / name}" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.errno == code
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "before"
    write_text(tmp_path / "a.txt", "after")
    assert (tmp_path / "a.txt").read_text() == "after"


@pytest.mark.parametrize("room", [0, 1, 999])
def test_a_disk_that_becomes_full_within_a_file(tmp_path: Path, room: int) -> None:
    write_bytes(tmp_path / "a", b"a" * 100)
    with failing(Disk(room=room)), pytest.raises(WriteError, match=r"the disk is full: .*make room and go on"):
        write_bytes(tmp_path / "a", b"b" * 1000)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"a" * 100]


@pytest.mark.parametrize("room", [0, 1, 9])
def test_what_is_added_is_taken_back(tmp_path: Path, room: int) -> None:
    append_bytes(tmp_path / "deep" / "a", b"one\n")
    with failing(Disk(room=room)), pytest.raises(WriteError, match="deep/a"):
        append_bytes(tmp_path / "deep" / "a", b"0123456789")
    assert (tmp_path / "deep" / "a").read_bytes() == b"one\n"
    with failing(Disk(room=room)), pytest.raises(WriteError):
        append_bytes(tmp_path / "deep" / "b", b"0123456789")
    assert not (tmp_path / "deep" / "b").exists()
    with failing(Disk(after=0, only=("fsync",), code=errno.EIO)), pytest.raises(WriteError, match="the disk failed"):
        append_bytes(tmp_path / "deep" / "a", b"0123456789", sync=True)
    append_bytes(tmp_path / "deep" / "a", b"two\n", sync=True)
    assert (tmp_path / "deep" / "a").read_bytes() == b"one\ntwo\n"


def test_a_true_limit_of_the_system(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    append_bytes(tmp_path / "a", b"a" * 3000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(WriteError, match="larger than the system allows"):
            write_bytes(tmp_path / "b", b"b" * 5000)
        with pytest.raises(WriteError, match="larger than the system allows"):
            append_bytes(tmp_path / "a", b"a" * 3000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(path.name, path.stat().st_size) for path in tmp_path.iterdir()] == [("a", 3000)]


def test_tensors_at_every_call(tmp_path: Path) -> None:
    save_tensors({"x": torch.zeros(3)}, tmp_path / "m.pt")
    failed = 0
    for after in range(20):
        try:
            with failing(Disk(after=after)):
                save_tensors({"x": torch.ones(50)}, tmp_path / "m.pt")
            break
        except WriteError as error:
            failed += 1
            assert error.filename == str(tmp_path / "m.pt")  # noqa: PT017 (of every call)
            assert load_tensors(tmp_path / "m.pt")["x"].shape in ((3,), (50,))
            assert [path.name for path in tmp_path.iterdir()] == ["m.pt"]
    assert failed >= 3
    assert load_tensors(tmp_path / "m.pt")["x"].tolist() == [1.0] * 50


def fail_within(place: Path, error: Exception) -> None:
    place.write_bytes(b"half")
    raise error


def test_a_file_that_somebody_else_writes_into_its_place(tmp_path: Path) -> None:
    target, full = tmp_path / "a.bin", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with (
        pytest.raises(WriteError, match=r"the disk is full: cannot write .*/a\.bin, make room"),
        whole(target) as place,
    ):
        fail_within(place, full)
    with pytest.raises(KeyError), whole(target) as place:
        fail_within(place, KeyError("of another kind"))
    with (
        pytest.raises(WriteError, match=r"cannot write .*/a\.bin"),
        whole(target, shared=True) as place,
        failing(Disk(room=3)),
    ):
        write_bytes(place, b"half")
    assert not list(tmp_path.iterdir())


def test_links_and_places_that_are_no_files(tmp_path: Path) -> None:
    write_text(tmp_path / "real", "1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    write_text(tmp_path / "link", "2")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "2"
    write_text("/dev/null", "nothing")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(WriteError, match="cannot write"):
        write_text(tmp_path, "a folder")
    with pytest.raises(WriteError, match="cannot write"):
        make_folder(tmp_path / "real" / "below")


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(WriteError), whole_folder(tmp_path / "run") as part, failing(Disk(room=0)):
        write_text(part / "b", "2")
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "run") as part:
        write_text(part / "a", "1")
    assert (tmp_path / "run" / "a").read_text() == "1"
    (tmp_path / "run" / ".x.part").write_text("left by a kill")
    remove_parts(tmp_path)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a"]


def test_errors_keep_their_words_on_the_way_from_another_process() -> None:
    error = WriteError(errno.ENOSPC, "No space left on device", "x/y")
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "the disk is full: cannot write x/y, make room and go on"
    with pytest.raises(WriteError, match="x/y"), writing("z"):
        raise error
    with pytest.raises(TimeoutError), writing("z"):
        raise TimeoutError("not of the system")


def test_cut(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "0123456789")
    cut(tmp_path / "a", 4)
    assert (tmp_path / "a").read_text() == "0123"
    with pytest.raises(ValueError, match=r"a ends after 4 bytes, at least 9 are wanted"):
        cut(tmp_path / "a", 9)
