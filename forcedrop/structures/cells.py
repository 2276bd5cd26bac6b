"""Cells as neighbour lists want them."""

from __future__ import annotations

import numpy as np


def complete_cell(cell: np.ndarray, pbc: np.ndarray) -> np.ndarray:
    """Return a cell [Å] whose missing non-periodic vectors are filled with unit vectors normal to the others.

    Raises:
        ValueError: if a periodic direction has no cell vector, or the cell is singular.
    """
    box = np.array(cell, dtype=np.float64)
    periodic = np.asarray(pbc, bool)
    if not periodic.any():
        return np.eye(3)
    missing = np.linalg.norm(box, axis=1) < 1e-8
    if np.any(missing & periodic):
        raise ValueError(f"periodic along {'abc'[int(np.argmax(missing & periodic))]} but the cell has no vector there")
    for k in np.flatnonzero(missing):
        rows = box[np.linalg.norm(box, axis=1) > 0]
        box[k] = np.linalg.svd(np.vstack([rows, np.zeros((3 - len(rows), 3))]))[2][-1]
    if abs(np.linalg.det(box)) < 1e-8 * np.prod(np.linalg.norm(box, axis=1)):
        raise ValueError(f"the cell is singular: {np.array2string(np.asarray(cell), separator=', ')}")
    return box
