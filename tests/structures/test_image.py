import errno
import os
import shutil
from pathlib import Path

import h5py
import pytest

from forcedrop.files import WriteError
from forcedrop.structures import Frame, FrameStore
from forcedrop.structures.image import Image, lookup3
from tests.disks import Disk, failing
from tests.structures.test_store import frames, same


def matches(path: Path, wanted: list[Frame]) -> bool:
    found = list(FrameStore(path))
    return len(found) == len(wanted) and all(same(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_call_of_an_append(tmp_path: Path, code: int, compressed: bool) -> None:
    path, failed = tmp_path / "a.h5", 0
    for after in range(100):
        with FrameStore(path, "w", compressed=compressed) as store:
            store.append(frames()[:3])
        with FrameStore(path, "a") as store:
            try:
                with failing(Disk(after=after, code=code)):
                    store.append(frames()[3:])
                break
            except WriteError as error:
                failed += 1
                assert str(path) in str(error)  # noqa: PT017 (of every call)
            assert matches(path, frames()[:3]) or matches(path, frames())
            store.truncate(2)
            store.append(frames()[2:])
        assert matches(path, frames())
        assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]
    assert failed > 3
    assert matches(path, frames())


@pytest.mark.parametrize("room", [0, 1, 100, 3000, 20_000])
def test_a_full_disk_leaves_the_bytes_of_before(tmp_path: Path, room: int) -> None:
    path = tmp_path / "a.h5"
    with FrameStore(path, "w", compressed=False) as store:
        store.append(frames()[3:5])
        before = path.read_bytes()
        with failing(Disk(room=room)), pytest.raises(WriteError, match=r"the disk is full: .*a\.h5"):
            store.append(frames()[3:] * 600)
        assert path.read_bytes() == before
        with h5py.File(path) as file:
            assert file["committed"][0] == 2
        store.append(frames()[5:])
    assert matches(path, frames()[3:])


def test_a_kill_at_any_moment_of_an_append(tmp_path: Path) -> None:
    """What is on disk before, after and in the middle of every call is the file of before or the one of after."""
    path, seen = tmp_path / "a.h5", list[Path]()

    def copy() -> None:
        seen.append(tmp_path / f"{len(seen)}.h5")
        shutil.copy(path, seen[-1])

    with FrameStore(path, "w", compressed=False) as store:
        store.append(frames()[:4])
        with failing(Disk(watch=copy)):
            store.append(frames()[4:])
            store.truncate(5)
            store.append(frames()[5:])
    kinds = {len(FrameStore(one)) for one in seen}
    assert len(seen) > 20
    assert kinds == {4, 5, 6}
    for one in seen:
        n = len(FrameStore(one))
        assert matches(one, frames()[:n])
        with FrameStore(one, "a") as again:
            again.append(frames()[n:])
        assert matches(one, frames())
        with h5py.File(one) as file:
            assert file["committed"][0] == 6


def test_the_file_is_plain_hdf5_while_somebody_writes(tmp_path: Path) -> None:
    with FrameStore(tmp_path / "a.h5", "w", compressed=False) as store:
        for k, frame in enumerate(frames()):
            store.append([frame])
            with h5py.File(tmp_path / "a.h5") as file:
                assert file["committed"][0] == len(file["energy"]) == k + 1
        assert matches(tmp_path / "a.h5", frames())


def test_two_writers(tmp_path: Path) -> None:
    with FrameStore(tmp_path / "a.h5", "w") as first, FrameStore(tmp_path / "a.h5", "a") as second:
        first.append(frames()[:1])
        with pytest.raises(ValueError, match=r"another process writes to .*a\.h5"):
            second.append(frames()[1:])
        first.close()
        second.append(frames()[1:])
    assert matches(tmp_path / "a.h5", frames())


def test_files_that_were_never_closed_are_read(tmp_path: Path) -> None:
    """HDF5 marks a file that is open; one whose writer was killed stays so, and plain HDF5 refuses it."""
    path = tmp_path / "a.h5"
    with FrameStore(path, "w") as store:
        store.append(frames())
    data = bytearray(path.read_bytes())
    data[11] = 5
    data[44:48] = lookup3(bytes(data[:44])).to_bytes(4, "little")
    path.write_bytes(data)
    with pytest.raises(OSError, match="already open for write"):
        h5py.File(path)
    assert matches(path, frames())
    with FrameStore(path, "a") as store:
        store.append(frames()[:1])
    with h5py.File(path) as file:
        assert file["committed"][0] == 7


def test_lookup3() -> None:
    assert lookup3(b"Four score and seven years ago") == 0x17770551  # of lookup3.c


def test_an_image_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    handle = os.open(path, os.O_RDWR)
    image = Image(handle)
    image.seek(90)
    image.write(b"z" * 5000)
    image.seek(0)
    image.write(b"ab")
    image.seek(0)
    wanted = b"ab" + bytes(range(2, 90)) + b"z" * 5000
    assert image.read() == wanted
    assert path.read_bytes() == bytes(range(100))
    image.commit()
    assert path.read_bytes() == wanted
    image.truncate(50)
    image.commit()
    assert path.read_bytes() == wanted[:50]
    image.seek(0, 2)
    assert image.tell() == 50
    os.close(handle)
