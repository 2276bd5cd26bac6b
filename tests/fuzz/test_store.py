"""Damaged frame stores: a file ends in what was written, or in one ValueError that names it; soon, and in little memory."""

import multiprocessing
import random
import resource
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pytest

from forcedrop.structures import FrameStore, read_frames
from forcedrop.structures.image import lookup3
from tests.structures.test_store import frames, same

SECONDS, MEMORY = 10.0, 2 * 2**30


def store(folder: Path, compressed: bool) -> Path:
    """Write what is damaged afterwards: six frames in three appends."""
    path = folder / f"{'packed' if compressed else 'plain'}.h5"
    with FrameStore(path, "w", {"method": "none"}, compressed=compressed) as new:
        for low in (0, 2, 4):
            new.append(frames()[low : low + 2])
    return path


def damage_bytes(data: bytes, seed: int) -> bytes:
    """Return the bytes of a file with random damage: a pure function of its arguments."""
    rng = random.Random(seed)
    found = bytearray(data)
    kind = rng.choice(["bit", "bytes", "zeros", "cut", "insert", "delete", "swap", "head"])
    at, count = rng.randrange(len(found)), rng.choice([1, 4, 16, 256, 4096])
    if kind == "bit":
        found[at] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        found[at : at + count] = rng.randbytes(len(found[at : at + count]))
    elif kind == "zeros":
        found[at : at + count] = bytes(len(found[at : at + count]))
    elif kind == "cut":
        del found[at:]
    elif kind == "insert":
        found[at:at] = rng.randbytes(count)
    elif kind == "delete":
        del found[at : at + count]
    elif kind == "swap":
        there = rng.randrange(len(found))
        found[at : at + count], found[there : there + count] = found[there : there + count], found[at : at + count]
    else:  # where HDF5 keeps what it knows about the file; with a checksum that fits
        found[rng.randrange(9, 44)] ^= 1 << rng.randrange(8)
        found[44:48] = lookup3(bytes(found[:44])).to_bytes(4, "little")
    return bytes(found)


def replaced(name: str, **made: object) -> Callable[[h5py.File], None]:
    """Return a change that puts another data set in the place of one."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **made)

    return change


def _link(kind: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file["away"] = file["pos"][:]
        del file["pos"]
        file["pos"] = kind

    return change


def _virtual(file: h5py.File) -> None:
    shape = file["pos"].shape
    del file["pos"]
    layout = h5py.VirtualLayout(shape=shape, dtype="f8")
    layout[:] = h5py.VirtualSource("elsewhere.h5", "pos", shape=shape)
    file.create_virtual_dataset("pos", layout)


def _set(name: str, where: object, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        file[name][where] = value

    return change


def _resize(name: str, rows: int) -> Callable[[h5py.File], None]:
    return lambda file: file[name].resize(rows, axis=0)


def _attribute(name: str, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        if value is None:
            del file.attrs[name]
        else:
            file.attrs[name] = value

    return change


def _huge(file: h5py.File) -> None:
    for name in ("z", "pos", "forces", *(f"extra/{n}" for n in file["extra"])):
        file[name].resize(10**9, axis=0)
    file["ptr"][-1] = 10**9


def _many(file: h5py.File) -> None:
    for name in file:
        if name not in ("extra", "committed") and file[name].maxshape[0] is None:
            file[name].resize(10**8 + 1, axis=0)
    file["check"].resize(10**8, axis=0)
    file["committed"][0] = 10**8


NAMES = ("z", "pos", "forces", "cell", "pbc", "energy", "stress", "has_energy", "has_forces", "ptr", "text", "text_ptr", "check",
         "committed", "extra", "extra/forces_std")  # fmt: skip
STRUCTURE: dict[str, Callable[[h5py.File], None]] = {
    **{f"no {name}": lambda file, name=name: file.__delitem__(name) for name in NAMES if name != "extra/forces_std"},
    **{f"{name} of texts": replaced(name, data=np.array([b"a"] * 6)) for name in NAMES if name != "extra"},
    **{f"{name} of nothing": replaced(name, data=h5py.Empty("f8")) for name in NAMES if name != "extra"},
    **{f"{name} one number": replaced(name, data=1.0) for name in NAMES if name != "extra"},
    **{f"{name} empty": replaced(name, shape=(0,), dtype="i8") for name in NAMES if name != "extra"},
    **{f"{name} complex": replaced(name, data=np.zeros((40, 3), complex)) for name in NAMES if name != "extra"},
    **{f"{name} short": _resize(name, 2) for name in NAMES if name not in ("extra", "committed")},
    "pos and more axes": replaced("pos", data=np.zeros((36, 3, 1))),
    "pos an object": replaced("pos", data=[b"x"] * 36, dtype=h5py.string_dtype()),
    "pos from elsewhere": replaced("pos", shape=(36, 3), dtype="f8", external=[("/etc/passwd", 0, 864)]),
    "pos in one chunk": replaced("pos", shape=(36, 3), maxshape=(None, 3), dtype="f8", chunks=(10**8, 3)),
    "virtual": _virtual,
    "soft link": _link(h5py.SoftLink("/away")),
    "external link": _link(h5py.ExternalLink("elsewhere.h5", "/pos")),
    "link to itself": _link(h5py.SoftLink("/pos")),
    "a billion atoms": _huge,
    "a hundred million frames": _many,
    **{f"committed {n}": _set("committed", 0, n) for n in (-1, 3, 7, 2**62)},
    **{f"ptr {n}": _set("ptr", 3, n) for n in (-5, 0, 10**6, 2**62)},
    "ptr from 1": _set("ptr", 0, 1),
    **{f"text_ptr {n}": _set("text_ptr", 3, n) for n in (-5, 0, 10**6, 2**62)},
    "text": _set("text", slice(0, 40), 0),
    "z": _set("z", 3, 8),
    "one position": _set("pos", (5, 1), 0.25),
    "not finite": _set("pos", (5, 1), np.nan),
    "no label": _set("has_energy", 1, False),
    **{f"{name} {value}": _attribute(name, value) for name in ("forcedrop_store", "provenance")
       for value in (None, 99, "text", "[1", np.zeros(3))},
}  # fmt: skip


def judge(path: Path) -> str | None:
    """Return what is wrong about how a damaged file is read, None if nothing is."""
    start = time.monotonic()
    try:
        found = list(FrameStore(path))
    except ValueError as error:
        text = str(error)
        right = str(path) in text and len(text) < 1000 and "\n" not in text
        wrong = None if right else f"{type(error).__name__}: {text[:300]}"
    except Exception as error:
        wrong = f"{type(error).__name__}: {str(error)[:300]}"
    else:
        fits = len(found) == 6 and all(same(a, b) for a, b in zip(found, frames(), strict=True))
        wrong = None if fits else f"{len(found)} frames that are not those of before"
    if time.monotonic() - start > SECONDS:
        wrong = f"{time.monotonic() - start:.0f} s"
    return wrong


def campaign(folder: Path, low: int, high: int, answers: "multiprocessing.Queue[object]") -> None:
    """Judge files damaged by the seeds from one to another; says before each which one it is."""
    resource.setrlimit(resource.RLIMIT_AS, (_mapped() + MEMORY, resource.RLIM_INFINITY))
    originals = [store(folder, compressed).read_bytes() for compressed in (False, True)]
    path = folder / "damaged.h5"
    for seed in range(low, high):
        path.write_bytes(damage_bytes(originals[seed % 2], seed))
        answers.put((seed, "begun"))
        answers.put((seed, judge(path)))
    answers.put(None)


def _mapped() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def found_by_campaign(folder: Path, low: int, high: int) -> dict[int, str]:
    """Return what is wrong, by seed; crashes and hangs in a process of its own count, too."""
    context, wrong = multiprocessing.get_context("spawn"), dict[int, str]()
    while low < high:
        answers = context.Queue()
        process = context.Process(target=campaign, args=(folder, low, high, answers))
        process.start()
        while low < high:
            try:
                answer = answers.get(timeout=60)
            except Exception:  # a hang, or a crash
                process.kill()
                wrong[low] = f"no answer; the process ended with {process.exitcode}"
                low += 1
                break
            if answer is None:
                break
            low, text = answer
            if text != "begun":
                low += 1
                if text is not None:
                    wrong[low - 1] = text
        process.join()
    return wrong


@pytest.mark.parametrize("compressed", [False, True])
def test_bytes(tmp_path: Path, compressed: bool) -> None:
    path = store(tmp_path, compressed)
    data = path.read_bytes()
    wrong = {}
    for seed in range(200):
        path.write_bytes(damage_bytes(data, seed))
        if (text := judge(path)) is not None:
            wrong[seed] = text
    assert not wrong


@pytest.mark.slow
def test_many_bytes(tmp_path: Path) -> None:
    assert not found_by_campaign(tmp_path, 1000, 21_000)


@pytest.mark.parametrize("name", STRUCTURE)
def test_structure(tmp_path: Path, name: str) -> None:
    path = store(tmp_path, False)
    with h5py.File(path, "r+") as file:
        STRUCTURE[name](file)
    with pytest.raises(ValueError, match=r"plain\.h5") as caught:
        list(FrameStore(path))
    assert len(str(caught.value)) < 1000
    with pytest.raises(ValueError, match=r"plain\.h5"):
        read_frames(path)
    with FrameStore(path, "a") as held, pytest.raises(ValueError, match=r"plain\.h5"):  # noqa: PT012 (one or the other)
        held.append(frames())
        list(held)


def test_old_files(tmp_path: Path) -> None:
    """Of format 1, whose provenance HDF5 reads for ever where its heap holds zeros."""
    path = store(tmp_path, False)
    with h5py.File(path, "r+", libver="latest") as file:
        del file["check"]
        file.attrs["forcedrop_store"] = 1
        del file.attrs["provenance"]
        file.attrs["provenance"] = '{"method": "none", "more": "%s"}' % ("x" * 400)
    with FrameStore(path) as old:
        assert old.provenance["method"] == "none"
        assert all(same(a, b) for a, b in zip(old, frames(), strict=True))
    data = path.read_bytes()
    at = data.rindex(b"x" * 400)
    path.write_bytes(data[: at - 60] + bytes(460) + data[at + 400 :])
    with pytest.raises(ValueError, match=r"plain\.h5.* damaged"):
        _ = FrameStore(path).provenance
    assert len(list(FrameStore(path))) == 6
    path.write_bytes(data)
    with FrameStore(path, "a") as new:  # becomes one with checksums
        new.append(frames())
        assert new.provenance["more"] == "x" * 400
    with h5py.File(path) as file:
        assert file.attrs["forcedrop_store"] == 2
        assert file["check"].shape == (12,)


def test_damage_is_a_function_of_its_seed(tmp_path: Path) -> None:
    data = store(tmp_path, True).read_bytes()
    assert damage_bytes(data, 3) == damage_bytes(data, 3)
    assert len({damage_bytes(data, seed) for seed in range(30)}) > 20
    shutil.copy(tmp_path / "packed.h5", tmp_path / "copy.h5")
    assert judge(tmp_path / "copy.h5") is None
    short = partial(FrameStore, tmp_path / "short.h5", "w")
    with short() as new:
        new.append(frames()[:5])
    assert "5 frames" in str(judge(tmp_path / "short.h5"))  # the judge can fail
