"""Which structures are copies of one another, however they are turned, shifted, wrapped into their cell, or their atoms ordered.

A copy on the other side of a split is a test with the answers given. Two structures of the same atoms and periodic directions are
*equal* if the distances within 6 Å, sorted for each pair of elements, differ by no more than rounding to three digits does, and
*nearly equal* if, their atoms in the same order, no distance differs by more than 0.008 Å. Labels are not looked at: a structure
that was computed twice is one structure.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from forcedrop.structures.frame import Frame
from forcedrop.structures.search import PairSearch

REACH = 6.0
"""[Å]; farther pairs are not looked at: hardly a network sees them."""
EQUAL = 1e-3
"""What rounding may change of a distance [Å]."""
NEAR = 8e-3
"""What may change of a distance between nearly equal structures [Å]: less than the 0.01 Å of finite displacements."""
_RANKS = np.unique([*range(12), *(12 * 1.15 ** np.arange(90)).astype(int)])
"""Of the sorted distances that are compared; all of a few, ever fewer of many."""
_RADII = (3.0, 4.5, REACH)
_MOST_CACHED = 20_000_000


@dataclass(frozen=True)
class Signature:
    """What is compared of a structure; it changes no more than distances do.

    Attributes:
        kind: atomic numbers, sorted, and periodic directions: only structures of one kind can be copies.
        order: atomic numbers in their own order.
        depths: how far some of the sorted distances of each pair of elements are within reach [Å], shape (pairs, ranks).
        every: the same of all pairs together, shape (ranks,).
        sums: of the depths of each atom's neighbours within each radius, with a weight of their element [Å], shape (N, radii).
        neighbours: mean number of neighbours within each radius, shape (radii,).
    """

    kind: bytes
    order: bytes
    depths: np.ndarray
    every: np.ndarray
    sums: np.ndarray
    neighbours: np.ndarray

    @property
    def unordered(self) -> np.ndarray:
        """The depths, and the sums with those of each element and radius in ascending order, flat."""
        z = np.frombuffer(self.order, np.int64)
        return np.concatenate([self.depths.ravel(), *(column[np.lexsort((column, z))] for column in self.sums.T)])

    def tolerance(self, distance: float) -> np.ndarray:
        """Return by how much each number of :attr:`unordered` may differ [Å] where distances do by ``distance``."""
        sums = distance * (1 + np.sqrt(self.neighbours))  # distances of many neighbours differ in no common direction
        return np.concatenate([np.full(self.depths.size, distance), np.repeat(sums, len(self.sums))])


class Pairs:
    """Finds the pairs of atoms within reach."""

    def __init__(self) -> None:
        self._search = PairSearch(REACH, threads=1)

    def __call__(self, frame: Frame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return every pair once, nearest first: indices i, j, shape (P,), and depths [Å]: how far within reach."""
        i, j, _, d = self._search(frame.pos, frame.cell, frame.pbc)
        depth = REACH - d
        order = np.argsort(-depth, kind="stable")
        return i[order], j[order], depth[order]


def signatures(frames: Sequence[Frame]) -> list[Signature]:
    """Return the signature of every structure."""
    pairs = Pairs()
    return [_sign(frame, pairs) for frame in frames]


def _sign(frame: Frame, pairs: Pairs) -> Signature:
    z, n = np.asarray(frame.z, np.int64), len(frame)
    i, j, depth = pairs(frame)
    elements, species = np.unique(z, return_inverse=True)
    low, high = np.minimum(species[i], species[j]), np.maximum(species[i], species[j])
    kinds = low * len(elements) + high
    depths = [
        _at_ranks(depth[kinds == a * len(elements) + b]) for a in range(len(elements)) for b in range(a, len(elements))
    ]
    weight = 0.5 + 0.5 * ((z * 0.6180339887498949) % 1.0)
    sums, neighbours = [], []
    for radius in _RADII:
        count = int(np.searchsorted(-depth, radius - REACH))
        own, other, share = i[:count], j[:count], depth[:count] - (REACH - radius)
        sums.append(np.bincount(own, weight[other] * share, n) + np.bincount(other, weight[own] * share, n))
        neighbours.append(2 * count / n)
    return Signature(
        kind=np.sort(z).tobytes() + np.asarray(frame.pbc, bool).tobytes(),
        order=z.tobytes(),
        depths=np.stack(depths),
        every=_at_ranks(depth),
        sums=np.stack(sums, axis=1),
        neighbours=np.array(neighbours),
    )


def _at_ranks(depth: np.ndarray) -> np.ndarray:
    """Return what stands at the ranks, 0 beyond the end."""
    found = np.zeros(len(_RANKS))
    here = _RANKS[: np.searchsorted(_RANKS, len(depth))]
    found[: len(here)] = depth[here]
    return found


def copies(frames: Sequence[Frame], signed: Sequence[Signature] | None = None) -> np.ndarray:
    """Return for every structure the index of the first that it is a copy of, its own where it is none, shape (n,).

    Args:
        frames: the structures.
        signed: their signatures, where they are known.
    """
    signed = signatures(frames) if signed is None else signed
    first = np.arange(len(frames))
    by_kind: dict[bytes, list[int]] = defaultdict(list)
    same: dict[bytes, int] = {}
    for index, signature in enumerate(signed):
        rounded = (np.round(signature.unordered, 4) + 0.0).tobytes()
        first[index] = same.setdefault(signature.kind + rounded, index)  # many copies are found at once
        if first[index] == index:
            by_kind[signature.kind].append(index)
    for members in by_kind.values():
        _join(members, signed, EQUAL, first)
    by_order: dict[bytes, list[int]] = defaultdict(list)
    for index, signature in enumerate(signed):
        if first[index] == index:
            by_order[signature.kind + signature.order].append(index)
    tables = _Tables(frames)
    for members in by_order.values():
        _join(members, signed, NEAR, first, tables)
    while (first[first] != first).any():  # what joined a structure that joined another
        first = first[first]
    return first


class _Tables:
    """Depths of the pairs of each structure, by pair of atoms, each made when it is first asked for."""

    def __init__(self, frames: Sequence[Frame]) -> None:
        self._frames, self._pairs = frames, Pairs()
        self._known: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._size = 0

    def nearly(self, index: int, other: int) -> bool:
        """Return whether no distance differs by more than :data:`NEAR` between two structures, atom by atom."""
        (place, depth), (place_of_other, depth_of_other) = self._of(index), self._of(other)
        if len(place) == len(place_of_other) and np.array_equal(place, place_of_other):
            return bool(np.all(np.abs(depth - depth_of_other) <= NEAR))
        both, where = np.unique(np.concatenate([place, place_of_other]), return_inverse=True)
        rows = np.zeros((2, len(both)))
        rows[0, where[: len(place)]], rows[1, where[len(place) :]] = depth, depth_of_other
        return bool(np.all(np.abs(rows[0] - rows[1]) <= NEAR))

    def _of(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return where each pair stands, by atoms and then by number of the image, ascending, and its depth [Å]."""
        if index not in self._known:
            frame = self._frames[index]
            i, j, depth = self._pairs(frame)
            pair = np.minimum(i, j) * len(frame) + np.maximum(i, j)
            order = np.argsort(pair, kind="stable")  # images of a pair stay sorted by depth
            pair, depth = pair[order], depth[order]
            starts = np.r_[0, np.flatnonzero(np.diff(pair)) + 1] if len(pair) else np.empty(0, int)
            image = np.arange(len(pair)) - np.repeat(starts, np.diff(np.r_[starts, len(pair)]))
            if self._size > _MOST_CACHED:
                self._known.clear()
                self._size = 0
            self._size += len(pair)
            self._known[index] = (pair * 100_000 + image, depth)
        return self._known[index]


def _join(
    members: Sequence[int],
    signed: Sequence[Signature],
    distance: float,
    first: np.ndarray,
    tables: _Tables | None = None,
) -> None:
    """Let each structure of one kind join the first one of which it is a copy, that itself is none.

    Args:
        members: their indices.
        signed: signatures of all structures.
        distance: what may change of a distance [Å].
        first: what each structure is a copy of; changed.
        tables: for nearly equal ones, which are looked at atom by atom.
    """
    from scipy.spatial import cKDTree  # only who looks for copies waits for it

    if len(members) < 2:
        return
    rows = [signed[k].unordered for k in members]
    if tables is not None:
        rows = [np.concatenate([signed[k].depths.ravel(), signed[k].sums.T.ravel()]) for k in members]
    values = np.stack(rows) / signed[members[0]].tolerance(distance)
    telling = np.argsort(-values.std(axis=0), kind="stable")[:10]
    tree = cKDTree(values[:, telling])
    joined = np.zeros(len(members), bool)
    for leader in range(len(members)):
        if joined[leader]:
            continue
        around = np.array(tree.query_ball_point(values[leader, telling], 1.0, p=np.inf), int)
        around = np.sort(around[(around > leader) & ~joined[around]])
        around = around[np.all(np.abs(values[around] - values[leader]) <= 1, axis=1)]
        if tables is not None:
            alike = [tables.nearly(members[leader], members[k]) for k in around]
            around = around[np.array(alike, bool)]
        joined[around] = True
        first[[members[k] for k in around]] = members[leader]
