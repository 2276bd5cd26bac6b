"""Writing frames so that nothing they carry is dropped."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import ase.io

from forcedrop.structures.frame import Frame
from forcedrop.structures.store import FrameStore


def write_frames(path: str | Path, frames: Sequence[Frame], *, append: bool = False) -> None:
    """Write frames as extended XYZ or as a :class:`FrameStore`, by suffix, with labels, ``info`` and ``arrays``.

    Labels get ASE's own names (energy, forces, stress), so that other programs read them.

    Raises:
        ValueError: if the suffix is none of .xyz .extxyz .h5 .hdf5.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".h5", ".hdf5"):
        with FrameStore(path, "a" if append else "w") as store:
            store.append(frames)
    elif path.suffix in (".xyz", ".extxyz"):
        ase.io.write(path, [f.to_atoms() for f in frames], format="extxyz", append=append)
    else:
        raise ValueError(f"frames are written as .xyz, .extxyz, .h5 or .hdf5, got {path.name!r}")
