"""Files of numpy arrays with one entry a structure, as sGDML and rMD17 have them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from forcedrop.structures.conversion import Units
from forcedrop.structures.frame import Frame
from forcedrop.structures.labels import Raw
from forcedrop.structures.names import Kind, meaning

ASSUMED = {"energy": "kcal/mol", "length": "Angstrom"}
"""Units of sGDML and rMD17 files that do not say theirs."""

_POSITIONS = ("R", "coords", "coordinates", "positions", "pos", "xyz")
_NUMBERS = ("z", "nuclear_charges", "atomic_numbers", "numbers", "Z")
_CELLS = ("cell", "cells", "box")
_SHAPES = {
    Kind.ENERGY: "(n,)", Kind.FREE_ENERGY: "(n,)", Kind.FORCES: "(n, N, 3)",
    Kind.STRESS: "(n, 3, 3), (n, 9) or (n, 6)", Kind.VIRIAL: "(n, 3, 3), (n, 9) or (n, 6)",
}  # fmt: skip


def read_arrays(path: Path, asked: Mapping[str, Kind]) -> tuple[list[Raw], Units]:
    """Read a file with arrays ``R`` (n, N, 3), ``z`` (N,), and ``E`` (n,), ``F`` (n, N, 3), stress, virial where present.

    ``lattice`` (3, 3) holds the vectors of a periodic cell as columns (sGDML), ``cell`` (3, 3) or (n, 3, 3) as rows.

    Args:
        path: the file.
        asked: names of arrays that are labels, and what they are.

    Returns:
        the structures, and the units that the file says in ``e_unit`` and ``r_unit``.

    Raises:
        ValueError: if an array is missing, or is of another shape; arrays are never reshaped to fit.
    """
    with np.load(path, allow_pickle=False) as file:
        data = {name: file[name] for name in file.files}
    pos, z = _geometry(path, data)
    cells, pbc = _cells(path, data, len(pos))
    labels = {}
    for name, array in data.items():
        kind = asked.get(name) or meaning(name, arrays=True)
        if kind is not None:
            labels[name] = _label(path, name, kind, array, pos)
        elif array.shape[:1] == (len(pos),) and array.ndim <= 3 and name not in (*_POSITIONS, *_CELLS):
            labels[name] = array  # to be named, should it look like a label
    raws = [
        Raw(
            Frame(z=z, pos=pos[k], cell=cells[k], pbc=pbc, source=f"{path}#{k}"),
            {name: array[k] for name, array in labels.items()},
        )
        for k in range(len(pos))
    ]
    return raws, Units(energy=data.get("e_unit"), length=data.get("r_unit"))


def _geometry(path: Path, data: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return positions (n, N, 3) and atomic numbers (N,)."""
    r, z = (next((name for name in names if name in data), None) for names in (_POSITIONS, _NUMBERS))
    if r is None or z is None:
        raise ValueError(f"{path} needs the arrays R (positions) and z (atomic numbers); it has {', '.join(data)}")
    pos, numbers = data[r], data[z]
    if numbers.ndim != 1:
        raise ValueError(
            f"{path}: {z} must have shape (N,), the same elements in all structures, got shape {numbers.shape} with {r} of shape "
            f"{pos.shape}"
        )
    if pos.ndim != 3 or pos.shape[1:] != (len(numbers), 3):
        one = f"; for one structure (1, {len(numbers)}, 3)" if pos.shape == (len(numbers), 3) else ""
        raise ValueError(f"{path}: {r} must have shape (n, {len(numbers)}, 3){one}, got {pos.shape}")
    _numeric(path, r, pos)
    _numeric(path, z, numbers)
    if (numbers != np.round(numbers)).any():
        raise ValueError(f"{path}: {z} must hold atomic numbers, got {numbers}")
    return pos.astype(np.float64), numbers.astype(np.int64)


def _cells(path: Path, data: Mapping[str, np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return cells with vectors as rows (n, 3, 3), zeros where there is none, and the periodic directions."""
    lattice, name = data.get("lattice"), next((name for name in _CELLS if name in data), None)
    if lattice is not None:
        if lattice.shape != (3, 3):
            raise ValueError(f"{path}: lattice must have shape (3, 3), vectors as columns, got {lattice.shape}")
        _numeric(path, "lattice", lattice)
        cells = np.broadcast_to(lattice.T.astype(np.float64), (n, 3, 3))
    elif name is not None:
        if data[name].shape not in ((3, 3), (n, 3, 3)):
            raise ValueError(f"{path}: {name} must have shape (3, 3) or ({n}, 3, 3), got {data[name].shape}")
        _numeric(path, name, data[name])
        cells = np.broadcast_to(data[name].astype(np.float64), (n, 3, 3))
    else:
        return np.zeros((n, 3, 3)), np.zeros(3, bool)
    pbc: Any = data.get("pbc", np.ones(3, bool))
    if pbc.shape not in ((), (3,)):
        raise ValueError(f"{path}: pbc must have shape (3,), got {pbc.shape}")
    return cells, np.broadcast_to(pbc.astype(bool), (3,)) & bool(cells.any())


def _label(path: Path, name: str, kind: Kind, array: np.ndarray, pos: np.ndarray) -> np.ndarray:
    """Return a label's array, (n, …), the energies with shape (n,)."""
    n, atoms = pos.shape[:2]
    _numeric(path, name, array)
    if array.shape[:1] != (n,):
        raise ValueError(
            f"{path}: {name} must have {n} entries like the positions {pos.shape}, got shape {array.shape}"
        )
    if kind in (Kind.ENERGY, Kind.FREE_ENERGY) and array.shape == (n, 1):
        return array[:, 0]
    one: dict[Kind, list[tuple[int, ...]]] = {
        Kind.ENERGY: [()], Kind.FREE_ENERGY: [()], Kind.FORCES: [(atoms, 3)], Kind.STRESS: [(3, 3), (9,), (6,)],
        Kind.VIRIAL: [(3, 3), (9,), (6,)],
    }  # fmt: skip
    if array.shape[1:] not in one[kind]:
        shapes = _SHAPES[kind].replace("n,", f"{n},").replace("N", str(atoms))
        raise ValueError(
            f"{path}: {name} ({kind}) must have shape {shapes}, got {array.shape}; positions have {pos.shape}"
        )
    return array


def _numeric(path: Path, name: str, array: np.ndarray) -> None:
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{path}: {name} must hold numbers, got {array.dtype} of shape {array.shape}")
