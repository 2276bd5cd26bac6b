"""When a run went astray: what a structure of it shows after which nothing that comes means anything.

One set of rules for the guard, which looks while a run goes on, and for the learning loop, which looks at what was recorded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import numpy as np
from ase.data import atomic_numbers, chemical_symbols, covalent_radii

from forcedrop.graph import SIGHT, NeighbourFinder, out_of_sight
from forcedrop.structures import Frame

CLOSEST = 0.7
"""Of the shortest distance in training that atoms may come to."""


class Kind(StrEnum):
    """What was seen: a frame to keep (flagged), or why a run went astray."""

    FLAGGED = "flagged"
    HIGH = "high"
    OVERLAP = "overlap"
    LOST = "lost"
    HOT = "hot"


class Trouble(NamedTuple):
    """Why a structure means nothing, and in words with numbers."""

    kind: Kind
    detail: str


@dataclass(frozen=True)
class Rules:
    """The limits.

    Attributes:
        sigma: largest σ, in the unit of the criterion.
        closest: distance below which two atoms overlap [Å], by pairs of atomic numbers, smaller first.
        temperature: highest [K]; None: it is not looked at.
        cutoff: of the network [Å]; an atom that has now no other one within :data:`~forcedrop.graph.SIGHT` of it is lost. None:
            not looked at.
        criterion: name of σ.
    """

    sigma: float
    closest: Mapping[tuple[int, int], float]
    temperature: float | None = None
    cutoff: float | None = None
    criterion: str = "max_force"

    def alone(self, frame: Frame) -> np.ndarray | None:
        """Return which atoms no other one sees, shape (N,); None if nobody knows the cutoff."""
        if self.cutoff is None or not np.isfinite(frame.pos).all():
            return None
        return out_of_sight(frame.pos, frame.cell, frame.pbc, self.cutoff)

    def trouble(
        self, frame: Frame, sigma: float, temperature: float, alone: np.ndarray | None, before: np.ndarray | None
    ) -> Trouble | None:
        """Say why a structure means nothing; None if all is well.

        Args:
            frame: the structure.
            sigma: of it, by the criterion.
            temperature: instantaneous [K].
            alone: from :meth:`alone`.
            before: the same of an earlier structure: who was alone then is not lost now. None: nobody is.
        """
        if not sigma <= self.sigma:  # NaN is trouble
            return Trouble(Kind.HIGH, f"{self.criterion} σ {sigma:.4g} above {self.sigma:.4g}")
        if not np.isfinite(frame.pos).all():
            return Trouble(Kind.LOST, "positions are not finite")
        overlap = find_overlap(frame, self.closest)
        if overlap:
            return Trouble(Kind.OVERLAP, overlap)
        if alone is not None and before is not None and (lost := np.flatnonzero(alone & ~before)).size:
            names = ", ".join(f"{chemical_symbols[frame.z[i]]}{i}" for i in lost[:5])
            reach = SIGHT * (self.cutoff or 0.0)
            return Trouble(Kind.LOST, f"{names} left all others by more than {reach:.3g} Å, where σ knows nothing")
        if self.temperature is not None and not temperature <= self.temperature:
            return Trouble(Kind.HOT, f"{temperature:.0f} K above {self.temperature:.0f} K")
        return None


def closest_allowed(
    numbers: Iterable[int], provenance: Mapping[str, Any] | None = None, share: float = CLOSEST
) -> dict[tuple[int, int], float]:
    """Return the distance [Å] below which two atoms overlap, by pairs of atomic numbers, the smaller first.

    Args:
        numbers: atomic numbers that matter.
        provenance: of a model, which knows the shortest distances of its training set; where they lack, the sum of the
            covalent radii stands for them.
        share: of that distance.
    """
    training = (provenance or {}).get("training_set", {}).get("shortest_distance", {})
    seen = {tuple(sorted(atomic_numbers[s] for s in pair.split("-"))): distance for pair, distance in training.items()}
    elements = sorted({int(z) for z in numbers})
    pairs = [(a, b) for a in elements for b in elements if a <= b]
    return {(a, b): share * seen.get((a, b), float(covalent_radii[a] + covalent_radii[b])) for a, b in pairs}


def find_overlap(frame: Frame, closest: Mapping[tuple[int, int], float]) -> str | None:
    """Say which two atoms are the most too close, None if none are."""
    finder = NeighbourFinder(max(closest.values(), default=0.1))
    (i, j), shift, _ = finder(frame.pos, frame.cell, frame.pbc)
    if len(i) == 0:
        return None
    distance = np.linalg.norm(frame.pos[j] - frame.pos[i] + shift @ frame.cell, axis=1)
    z = np.sort(frame.z[np.stack([i, j])], axis=0)
    limit = np.array([closest.get((int(a), int(b)), 0.0) for a, b in z.T])
    worst = int(np.argmin(distance / np.maximum(limit, 1e-12)))
    if distance[worst] >= limit[worst]:
        return None
    a, b = int(i[worst]), int(j[worst])
    names = f"{chemical_symbols[frame.z[a]]}{a} and {chemical_symbols[frame.z[b]]}{b}"
    return f"{names} are {distance[worst]:.3f} Å apart, at least {limit[worst]:.3f} Å are allowed"


def runaway(n_atoms: int) -> float:
    r"""Return a factor of the temperature that the instantaneous one never reaches: ten standard deviations, and at least 3.

    The standard deviation of the kinetic temperature of N free atoms is :math:`\sqrt{2/(3N)}` of its mean.
    """
    return max(3.0, 1 + 10 * float(np.sqrt(2 / (3 * n_atoms))))
