import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace

import h5py
import numpy as np
import pytest
from ase.build import bulk, molecule

from forcedrop.structures import Frame, FrameStore, read_frames, write_frames
from tests.conftest import ethanol


def frames(n: int = 6) -> list[Frame]:
    generator = np.random.default_rng(0)
    out = []
    for k in range(n):
        atoms = molecule("CH3CH2OH") if k % 2 else bulk("Si")
        size = (len(atoms), 3)
        labels = {"energy": float(k), "forces": generator.normal(size=size)} if k % 3 else {}
        if k == 2:
            labels["stress"] = generator.normal(size=6)
        extra = {"forces_std": generator.normal(size=size)} if k > 2 else {}
        frame = Frame.from_atoms(atoms, source=f"x#{k}", info={"k": k, "name": f"frame {k}"}, arrays=extra, **labels)
        out.append(frame)
    return out


def same(a: Frame, b: Frame) -> bool:
    for name in ("z", "pos", "cell", "pbc", "energy", "forces", "stress"):
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and not np.array_equal(x, y)):
            return False
    if set(a.arrays) != set(b.arrays) or any(not np.array_equal(a.arrays[n], b.arrays[n]) for n in a.arrays):
        return False
    drop = {"source"}
    return {k: v for k, v in a.info.items() if k not in drop} == {k: v for k, v in b.info.items() if k not in drop}


def test_what_goes_in_comes_out(tmp_path) -> None:
    with FrameStore(tmp_path / "a.h5", "w", provenance={"method": "none"}) as store:
        store.append(frames()[:2])
        store.append(frames()[2:])
    with FrameStore(tmp_path / "a.h5") as store:
        assert len(store) == 6
        assert all(same(a, b) for a, b in zip(store, frames(), strict=True))
        assert same(store[-1], frames()[-1])
        assert [f.info["k"] for f in store[1:6:2]] == [1, 3, 5]
        assert [f.info["k"] for f in store[::-1]] == [5, 4, 3, 2, 1, 0]
        assert store.provenance["method"] == "none"
        assert store[1].info["source"] == "x#1"
        with pytest.raises(IndexError, match="holds 6 frames, asked for frame 6"):
            store[6]
        with pytest.raises(ValueError, match="opened to read"):
            store.append(frames())
    with h5py.File(tmp_path / "a.h5") as file:
        assert "eV/Angstrom" in file.attrs["units"]
        assert file["pos"].shape == (3 * 2 + 3 * 9, 3)


def test_append_later_and_content_hash(tmp_path) -> None:
    for name, cuts in (("a.h5", [6]), ("b.h5", [1, 4, 6])):
        first = 0
        for cut in cuts:
            with FrameStore(tmp_path / name, "a") as store:
                store.append(frames()[first:cut])
            first = cut
    a, b = FrameStore(tmp_path / "a.h5"), FrameStore(tmp_path / "b.h5")
    assert a.content_hash() == b.content_hash()
    with FrameStore(tmp_path / "c.h5", "w") as store:
        store.append([*frames()[:5], replace(frames()[5], energy=99.0)])
    assert FrameStore(tmp_path / "c.h5").content_hash() != a.content_hash()


def test_reader_sees_what_a_living_writer_has_committed(tmp_path) -> None:
    with FrameStore(tmp_path / "a.h5", "w") as writer:
        writer.append(frames()[3:])
        with FrameStore(tmp_path / "a.h5") as reader:
            assert len(reader) == 3
            writer.append(frames()[3:])
            assert len(reader) == 6
            assert same(reader[5], frames()[5])


WRITER = """
import sys, itertools
from tests.structures.test_store import frames
from forcedrop.structures import FrameStore
batch = frames()
with FrameStore(sys.argv[1], 'a') as store:
    for k in itertools.count():
        store.append(batch)
        print(k + 1, flush=True)
"""


@pytest.mark.parametrize("wait", [0.0, 0.05, 0.13])
def test_a_killed_writer_loses_at_most_the_batch_in_flight(tmp_path, wait: float) -> None:
    path = tmp_path / "a.h5"
    done = 0
    for _ in range(2):  # the second writer starts from what the killed one left
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3):
            process.stdout.readline()
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        reported = 3 + len(process.stdout.read().split())
        process.wait()
        process.stdout.close()
        with FrameStore(path) as store:
            assert len(store) % 6 == 0
            assert len(store) // 6 - done in (reported, reported + 1)
            done = len(store) // 6
            assert all(same(a, frames()[k % 6]) for k, a in enumerate(store))
    with FrameStore(path, "a") as store:
        store.append(frames())
        assert len(store) == 6 * done + 6
    assert len(read_frames(path, skip_bad=True)) == 6 * done + 6
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_it_travels_to_worker_processes(tmp_path) -> None:
    with FrameStore(tmp_path / "a.h5", "w") as store:
        store.append(frames())
        copy = pickle.loads(pickle.dumps(store))
    assert same(copy[3], frames()[3])


def test_not_a_store(tmp_path) -> None:
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(ValueError, match=r"other\.h5 is not a forcedrop frame store"):
        len(FrameStore(tmp_path / "other.h5"))
    with pytest.raises(ValueError, match="no such file"):
        FrameStore(tmp_path / "none.h5")
    bad = replace(frames()[1], arrays={"x": np.zeros(2)})
    with (
        pytest.raises(ValueError, match=r"x#1: array 'x' needs 9 rows"),
        FrameStore(tmp_path / "b.h5", "w") as store,
    ):
        store.append([bad])


@pytest.mark.parametrize("name", ["a.xyz", "a.h5"])
def test_written_frames_keep_everything(tmp_path, name: str) -> None:
    made = [f for f in frames() if f.energy is not None]
    write_frames(tmp_path / name, made[:2])
    write_frames(tmp_path / name, made[2:], append=True)
    for a, b in zip(read_frames(tmp_path / name), made, strict=True):
        np.testing.assert_allclose(a.forces, b.forces, atol=1e-7)
        assert a.energy == pytest.approx(b.energy)
        assert a.info["name"] == b.info["name"]
        assert set(b.arrays) <= set(a.arrays)
    with pytest.raises(ValueError, match=r"written as \.xyz"):
        write_frames(tmp_path / "a.cif", made)


def test_truncate_forgets_the_rest_and_appends_after_it(tmp_path) -> None:
    images = [Frame.from_atoms(ethanol(seed), info={"k": seed}) for seed in range(5)]
    path = tmp_path / "t.h5"
    with FrameStore(path, "w") as store:
        store.append(images)
        store.truncate(2)
        assert [f.info["k"] for f in store] == [0, 1]
        store.append(images[4:])
    with FrameStore(path) as store:
        assert [f.info["k"] for f in store] == [0, 1, 4]
        np.testing.assert_array_equal(store[2].pos, images[4].pos)
        with pytest.raises(ValueError, match="opened to read"):
            store.truncate(1)
    with FrameStore(path, "a") as store, pytest.raises(ValueError, match="holds 3 frames, 4 are to be kept"):
        store.truncate(4)


def test_frames_that_come_one_by_one_cost_no_more_than_their_numbers(tmp_path) -> None:
    atoms = ethanol()
    rng = np.random.default_rng(0)
    sizes = []
    for compressed in (False, True):
        path = tmp_path / f"{compressed}.h5"
        with FrameStore(path, "w", compressed=compressed) as store:
            for k in range(150):
                noise = {name: rng.normal(size=(len(atoms), 3)) for name in ("a", "b")}
                store.append([Frame.from_atoms(atoms, forces=noise["a"], arrays=noise, info={"k": k})])
        sizes.append(path.stat().st_size)
        assert [frame.info["k"] for frame in FrameStore(path)] == list(range(150))
    numbers = 150 * len(atoms) * (2 + 4 * 3 * 8)
    assert sizes[0] < numbers + 250_000  # chunks that are not full yet
    assert sizes[1] < numbers + 250_000  # a chunk that is packed anew takes the place of what was there before
