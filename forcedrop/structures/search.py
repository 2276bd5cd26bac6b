"""Pairs within a cutoff: by vesin where its grid of cells fits, by a k-d tree where it does not, or a clear error.

vesin 0.6 ends the process (a division by zero) where a structure is long in one direction and thin in another, such that a grid
of 10⁵ cells would have none along the thin one, or where a cell holds NaN; of partly periodic structures that are long in another
direction its time grows with the square of the length (10 s for four atoms over 20 000 Å); it loses pairs of atoms that are more
than 2³¹ images away; and where atoms are crowded every method would fill the memory. All that is found here, before anything is
searched.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

import numpy as np
from vesin import NeighborList

from forcedrop.structures.cells import complete_cell

FARTHEST = 1e9
"""Coordinates beyond this [Å] are a mistake: doubles do not resolve them to 10⁻⁷ Å."""
DENSEST = 5.0
"""More atoms than this in a cubic Ångström, over a box as large as the cutoff, are a mistake: solid hydrogen at the pressure of a
star's shell has about one."""
FLATTEST = 0.05
"""Periodic cells whose lattice planes are nearer than this [Å] are a mistake, or need another choice of vectors."""
_GRID = 1e5
_SKEW = 100.0
_LONG = 200.0
_FEW = 500


class Pairs(NamedTuple):
    """Every pair once: atoms ``i`` and ``j`` (E,), ``shift`` (E, 3) integers, and the distance ``d`` (E,) [Å].

    The vector from i to j is ``pos[j] + shift @ cell − pos[i]``. Nothing is said about the order.
    """

    i: np.ndarray
    j: np.ndarray
    shift: np.ndarray
    d: np.ndarray

    def nearest(self) -> tuple[int, int, float]:
        """Return the two atoms that are nearest to one another, and their distance [Å]; (−1, −1, ∞) without a pair."""
        if not len(self.d):
            return -1, -1, float("inf")
        k = int(np.argmin(self.d))
        return int(self.i[k]), int(self.j[k]), float(self.d[k])


def check_geometry(pos: np.ndarray, cell: np.ndarray) -> None:
    """Check that positions and cell [Å] are numbers that mean something.

    Raises:
        ValueError: naming the atom or cell vector that is not finite, or farther out than :data:`FARTHEST`.
    """
    for name, rows in (("position of atom {}", pos), ("cell vector {}", cell)):
        # false for NaN as well; the largest number is found without a copy
        if rows.size and not (rows.max() <= FARTHEST and rows.min() >= -FARTHEST):
            row = int(np.flatnonzero(~(np.abs(rows) <= FARTHEST).all(axis=-1))[0])
            what = name.format(row if name.startswith("pos") else "abc"[row])
            value = np.array2string(rows[row], separator=", ")
            if np.isfinite(rows[row]).all():
                raise ValueError(f"the {what} is {value} Å, farther out than {FARTHEST:g} Å: in another unit?")
            raise ValueError(f"the {what} is not finite: {value}")


class PairSearch:
    """Finds the pairs within a cutoff, with a Verlet skin that is reused from call to call.

    Args:
        cutoff: [Å].
        skin: [Å]; pairs are searched anew once an atom has moved by skin/2. 0 searches at every call.
        threads: of vesin; None for all.
    """

    def __init__(self, cutoff: float, skin: float = 0.0, threads: int | None = None) -> None:
        self.cutoff, self.skin, self._threads = float(cutoff), float(skin), threads
        self._list = self._new_list()
        self._n_atoms: int | None = None

    def _new_list(self) -> NeighborList:
        threads = {} if self._threads is None else {"n_threads": self._threads}
        return NeighborList(cutoff=self.cutoff, full_list=False, skin=self.skin, **threads)

    def __call__(self, pos: np.ndarray, cell: np.ndarray, pbc: np.ndarray) -> Pairs:
        """Return the pairs of atoms at ``pos`` [Å], (N, 3), in ``cell`` [Å], (3, 3), periodic along ``pbc``, (3,).

        Raises:
            ValueError: if a number is not finite or absurdly large, the cell does not fit the periodic directions, or atoms are
                so crowded that the pairs would fill the memory.
        """
        check_geometry(pos, cell)
        periodic = np.asarray(pbc, bool)
        box = complete_cell(cell, periodic)
        if not len(pos):
            none = np.zeros(0, np.int64)
            return Pairs(none, none, np.zeros((0, 3), np.int64), np.zeros(0))
        fits = self._fits_a_grid(pos, box, periodic)
        reach = self.cutoff + self.skin if fits else self.cutoff
        _refuse_crowds(pos, box, periodic, reach)
        if not fits:
            return tree_pairs(pos, box, periodic, self.cutoff)
        if self._n_atoms not in (None, len(pos)):  # the skin of another structure is of no use
            self._list = self._new_list()
        self._n_atoms = len(pos)
        i, j, shift, d = self._list.compute(points=pos, box=box, periodic=periodic, quantities="ijSd")
        return Pairs(i.astype(np.int64), j.astype(np.int64), shift.astype(np.int64), d)

    def _fits_a_grid(self, pos: np.ndarray, box: np.ndarray, periodic: np.ndarray) -> bool:
        """Return whether vesin can lay a grid over the structure; see the module's page."""
        largest = max(np.abs(pos).max(), np.abs(box).max())
        if largest < 10 * self.cutoff:  # at most some 40 cells a side
            return True
        heights = _heights(box)
        fraction = pos @ np.linalg.inv(box)
        span = np.ptp(fraction, axis=0) * heights
        if np.abs(fraction[:, periodic]).max(initial=0.0) > 1e6:
            return False
        for lengths in (np.where(periodic, heights, span), np.where(periodic, heights, np.maximum(span, heights))):
            cells = np.maximum(lengths / self.cutoff, 1.0)
            if cells.prod() > _GRID and cells.max() > _SKEW * cells.min():
                return False
            if periodic.any() and cells[~periodic].max(initial=0.0) > _LONG:
                return False
        return True


def tree_pairs(pos: np.ndarray, box: np.ndarray, periodic: np.ndarray, cutoff: float) -> Pairs:
    """Return the pairs within a cutoff [Å] by a k-d tree over the atoms and the images near them: slower, for any shape.

    Args:
        pos: [Å], shape (N, 3).
        box: cell vectors as rows [Å], shape (3, 3), not singular.
        periodic: directions, shape (3,).
        cutoff: [Å].
    """
    from scipy.spatial import cKDTree

    wrap = np.where(periodic, np.floor(pos @ np.linalg.inv(box)), 0.0)
    inner = pos - wrap @ box
    reach = np.where(periodic, np.ceil(cutoff / _heights(box)), 0).astype(int)
    low, high = inner.min(axis=0) - cutoff, inner.max(axis=0) + cutoff
    tree, found = cKDTree(inner), []
    for cell in product(*(range(-int(r), int(r) + 1) for r in reach)):
        if cell < (0, 0, 0):  # the other half
            continue
        image = inner + np.array(cell) @ box
        near = np.flatnonzero(((image >= low) & (image <= high)).all(axis=1))
        neighbours = tree.query_ball_point(image[near], cutoff, workers=1)
        j = np.repeat(near, [len(n) for n in neighbours])
        i = np.concatenate([np.asarray(n, np.int64) for n in neighbours]) if len(near) else j
        keep = i < j if cell == (0, 0, 0) else slice(None)
        found.append((i[keep], j[keep], np.tile(np.array(cell, np.int64), (len(i[keep]), 1))))
    i, j, cells = (np.concatenate(part) for part in zip(*found, strict=True))
    d = np.linalg.norm(inner[j] + cells @ box - inner[i], axis=1)
    whole = wrap.astype(np.int64)
    return Pairs(i, j, cells + whole[i] - whole[j], d)


def _heights(box: np.ndarray) -> np.ndarray:
    """Return the distances of the lattice planes [Å], shape (3,)."""
    heights: np.ndarray = 1.0 / np.linalg.norm(np.linalg.inv(box), axis=0)
    return heights


def _refuse_crowds(pos: np.ndarray, box: np.ndarray, periodic: np.ndarray, cutoff: float) -> None:
    """Raise a ``ValueError`` where somewhere atoms are so many that the pairs would fill the memory."""
    if not periodic.any() and len(pos) <= _FEW:
        return
    heights = _heights(box)
    if periodic.any() and heights[periodic].min() < FLATTEST:
        axis = "abc"[int(np.flatnonzero(periodic)[np.argmin(heights[periodic])])]
        raise ValueError(
            f"the periodic cell is {heights['abc'.index(axis)]:.3g} Å high along {axis}: a cell in another unit, or vectors that "
            "need a reduction"
        )
    images = np.where(periodic, 2 * np.ceil(cutoff / heights) + 1, 1.0).prod()
    if len(pos) * images <= _FEW:
        return
    fraction = pos @ np.linalg.inv(box)
    fraction -= np.where(periodic, np.floor(fraction), fraction.min(axis=0))
    span = np.where(periodic, 1.0, np.maximum(fraction.max(axis=0), cutoff / heights))
    parts = np.maximum(np.floor(span * heights / cutoff), 1.0)
    place = np.minimum(np.floor(fraction / span * parts), parts - 1)
    if parts.prod() < 2**53:  # one number a box: much faster to sort
        counts = np.unique((place[:, 0] * parts[1] + place[:, 1]) * parts[2] + place[:, 2], return_counts=True)[1]
    else:
        counts = np.unique(place, axis=0, return_counts=True)[1]
    density = counts.max() * parts.prod() / (abs(np.linalg.det(box)) * span.prod())
    if density > DENSEST:
        raise ValueError(
            f"atoms are crowded, {density:.3g} in a cubic Ångström, more than {DENSEST:g}: positions or a cell in another unit, "
            "or a structure that collapsed"
        )
