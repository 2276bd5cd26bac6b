"""Structures of a file one after another, however many there are: for commands that look at each frame once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import ase.db
import ase.io
from ase import Atoms

from forcedrop.door import door
from forcedrop.structures.checks import BadFrames, Problem
from forcedrop.structures.door import check_packed, xyz_images
from forcedrop.structures.frame import Frame
from forcedrop.structures.readers import read_checked, read_comment
from forcedrop.structures.reading import Reading
from forcedrop.structures.store import FrameStore
from forcedrop.units import length_factor

_OWN = {"energy", "free_energy", "energies", "forces", "force", "stress", "stresses", "virial", "virials"}
"""What predictions take the place of; labels by other names, such as ``REF_energy``, stay."""


def structures_in(
    path: str | Path, length_unit: str | None = None, damaged: list[Problem] | None = None
) -> Iterator[Frame]:
    """Yield the structures of a file as they are, without labels: nothing about them is checked.

    Extended XYZ, ``.traj``, ``.db`` and ``.h5`` are read as they are needed, other formats at once.

    Args:
        path: the file.
        length_unit: of positions and cells in it, by default Å; where it is not, what else the file holds is left out, for its
            units are not known.
        damaged: takes what is wrong with frames of an xyz file that cannot be read; without it the first is an error.

    Raises:
        ValueError: if the file cannot be read, naming the frame.
    """
    path, factor = Path(path), length_factor(length_unit or "Angstrom")
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    if not path.is_file():
        raise ValueError(f"no such file: {path}")
    check_packed(path)
    if suffix in (".h5", ".hdf5"):
        with FrameStore(path) as store:
            yield from map(_bare, store)
    elif suffix in (".xyz", ".extxyz", ".traj", ".db"):
        number = 0
        images = _rows(path) if suffix == ".db" else _images(path, suffix)
        while True:
            with door(f"{path}#{number}"):
                atoms = next(images, None)
                frame = _frame(atoms, f"{path}#{number}", factor) if isinstance(atoms, Atoms) else None
            if isinstance(atoms, Problem):
                if damaged is None:
                    raise BadFrames([atoms])
                damaged.append(atoms)
            elif frame is None:
                return
            else:
                yield frame
            number += 1
    else:
        reading = Reading(length_unit=length_unit, trust_units=True)  # labels do not matter
        yield from map(_bare, read_checked([path], reading, predictions="drop", tell=lambda _: None)[0])


def _images(path: Path, suffix: str) -> Iterator[Any]:
    if path.stat().st_size:
        yield from ase.io.iread(path, index=":") if suffix == ".traj" else xyz_images(path, read_comment)


def _rows(path: Path) -> Iterator[Any]:
    with ase.db.connect(path) as database:
        for row in database.select():
            atoms = row.toatoms()
            atoms.info = dict(row.key_value_pairs)
            yield atoms


def _frame(atoms: Atoms, source: str, factor: float) -> Frame:
    if factor != 1.0:
        frame = Frame.from_atoms(Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc), source)
        return replace(frame, pos=frame.pos * factor, cell=frame.cell * factor)
    arrays = {name: values for name, values in atoms.arrays.items() if name not in ("numbers", "positions")}
    info = dict(atoms.info)
    written = info.pop("constraints", None)
    own = {"constraints": written} if isinstance(written, list) else {}
    return _bare(Frame.from_atoms(atoms, source, info=info, arrays=arrays, **own))


def _bare(frame: Frame) -> Frame:
    info, arrays = ({k: v for k, v in values.items() if k not in _OWN} for values in (frame.info, frame.arrays))
    return replace(frame, energy=None, forces=None, stress=None, info=info, arrays=arrays)
