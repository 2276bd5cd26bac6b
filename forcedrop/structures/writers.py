"""Writing frames so that nothing they carry is dropped."""

from __future__ import annotations

import errno
import gzip
import io
import numbers
import os
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ase.db
import ase.io
import numpy as np
from ase import Atoms
from ase.db.core import check as check_pairs
from ase.io.trajectory import Trajectory

from forcedrop.files import append_bytes, whole
from forcedrop.structures.constraints import XYZ_COLUMN
from forcedrop.structures.frame import Frame
from forcedrop.structures.store import FrameStore

SUFFIXES = (".xyz", ".extxyz", ".xyz.gz", ".extxyz.gz", ".traj", ".db", ".json", ".h5", ".hdf5")
"""Of files that hold everything a frame carries; formats such as CIF or POSCAR lose energies and error bars."""

Append = Callable[[Sequence[Frame]], None]


def require_frames_suffix(path: str | Path | None) -> None:
    """Refuse a file of another format than frames are written in.

    Raises:
        ValueError: naming the formats.
    """
    if path is not None:
        _suffix(Path(path))


def write_frames(
    path: str | Path, frames: Sequence[Frame], *, append: bool = False, provenance: dict[str, Any] | None = None
) -> None:
    """Write frames in the format of the suffix, one of :data:`SUFFIXES`, with labels, ``info`` and ``arrays``.

    Labels get ASE's own names (energy, forces, stress), so that other programs read them. A new file is whole or not there, as is
    what is appended.

    Args:
        path: the file; its folder is made.
        frames: what to write.
        append: to a file of extended XYZ or a :class:`FrameStore`.
        provenance: plain values to keep with a new :class:`FrameStore`.

    Raises:
        ValueError: for another suffix, or a format that cannot be appended to.
        WriteError: if the file cannot be written.
    """
    path = Path(path)
    suffix = _suffix(path)
    if not append:
        with frames_writer(path, provenance) as write:
            write(frames)
    elif suffix in (".h5", ".hdf5"):
        with FrameStore(path, "a", provenance) as store:
            store.append(frames)
    elif suffix in (".xyz", ".extxyz"):
        text = io.StringIO()
        ase.io.write(text, [_image(f) for f in frames], format="extxyz")
        append_bytes(path, text.getvalue().encode())
    else:
        raise ValueError(f"frames are appended to .xyz, .extxyz, .h5 or .hdf5, got {path.name!r}")


@contextmanager
def frames_writer(path: str | Path, provenance: dict[str, Any] | None = None) -> Iterator[Append]:
    """Give a function that adds frames to a new file, as many at a time as there are; the file is in its place at the end.

    Args:
        path: the file; its folder is made.
        provenance: plain values to keep with a :class:`FrameStore`.

    Raises:
        ValueError: for a suffix that is none of :data:`SUFFIXES`.
        WriteError: if the file cannot be written.
    """
    path = Path(path)
    opened = _OPENERS[_suffix(path).removesuffix(".gz")]
    with whole(path, shared=True) as part, opened(part, path, provenance) as append:
        yield append


def _suffix(path: Path) -> str:
    name = path.name.lower()
    found = next((suffix for suffix in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(suffix)), None)
    if found is None:
        raise ValueError(f"frames with energies and error bars are written as {' '.join(SUFFIXES)}, got {path.name!r}")
    return found


@contextmanager
def _store(part: Path, path: Path, provenance: dict[str, Any] | None) -> Iterator[Append]:
    with FrameStore(part, "w", provenance) as store:
        yield store.append


@contextmanager
def _xyz(part: Path, path: Path, provenance: Any) -> Iterator[Append]:
    opener: Any = gzip.open if path.name.lower().endswith(".gz") else open
    with opener(part, "wt", encoding="utf-8") as stream:
        yield lambda frames: ase.io.write(stream, [_image(f) for f in frames], format="extxyz")


@contextmanager
def _trajectory(part: Path, path: Path, provenance: Any) -> Iterator[Append]:
    with Trajectory(part, "w") as trajectory:

        def append(frames: Sequence[Frame]) -> None:
            for frame in frames:
                atoms, more = _split(frame)
                atoms.info.update(more)
                trajectory.write(atoms)

        yield append


@contextmanager
def _database(part: Path, path: Path, provenance: Any) -> Iterator[Append]:
    part.unlink(missing_ok=True)  # of an earlier process with the same number
    with ase.db.connect(part, type=path.suffix.lower()[1:], append=True) as database:

        def append(frames: Sequence[Frame]) -> None:
            for frame in frames:
                atoms, more = _split(frame)
                pairs = {name: value for name, value in atoms.info.items() if _is_pair(name, value)}
                data = {name: value for name, value in atoms.info.items() if name not in pairs}
                database.write(atoms, key_value_pairs=pairs, data={**data, **more})

        try:
            yield append
        except sqlite3.OperationalError as error:  # which has no number of the system's error
            if "full" in str(error):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
            raise


_OPENERS = {
    ".xyz": _xyz, ".extxyz": _xyz, ".traj": _trajectory, ".db": _database, ".json": _database, ".h5": _store, ".hdf5": _store,
}  # fmt: skip


def _image(frame: Frame) -> Atoms:
    """Return what an extended XYZ file is written from, with constraints that ``move_mask`` cannot hold in ``info``."""
    atoms = frame.to_atoms()
    if not all(type(constraint).__name__ in XYZ_COLUMN for constraint in atoms.constraints):
        atoms.info["constraints"] = frame.constraints
    return atoms


def _split(frame: Frame) -> tuple[Atoms, dict[str, np.ndarray]]:
    """Return atoms with ASE's own arrays, and the others, which trajectories and databases of ASE drop, by name."""
    atoms = frame.to_atoms()
    own = {"numbers", "positions", "momenta", "masses", "tags", "initial_magmoms", "initial_charges"}
    more = {name: np.asarray(values) for name, values in atoms.arrays.items() if name not in own}
    for name in more:
        del atoms.arrays[name]
    return atoms, more


def _is_pair(name: str, value: Any) -> bool:
    """Return whether a database of ASE takes a value as one that it can be searched by."""
    if not isinstance(value, numbers.Real | str | np.bool_):
        return False
    try:
        check_pairs({name: value})
    except ValueError:
        return False
    return True
