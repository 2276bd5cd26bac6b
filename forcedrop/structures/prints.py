"""Small prints of structures, by which a model knows again what trained it without keeping it."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from forcedrop.structures.copies import EQUAL, Signature, signatures
from forcedrop.structures.frame import Frame

MOST = 10_000
"""Structures whose prints are kept; of more, every n-th."""
_PLACES = (0, 1, 2, 4, 8, 12)
"""Of the sorted depths that are kept."""
_TOLERANCE = np.array([EQUAL] * len(_PLACES) + [4 * EQUAL] * 2)


@dataclass(frozen=True)
class Prints:
    """Prints of some structures: 36 bytes each, the same however a structure is turned or its atoms are ordered.

    Attributes:
        kinds: checksums of elements and periodic directions, shape (n,), uint32.
        values: some of the sorted distances, and means over the atoms [Å], shape (n, 8), float32.
        of: how many structures they stand for.
    """

    kinds: np.ndarray
    values: np.ndarray
    of: int

    @classmethod
    def taken(cls, signed: Sequence[Signature]) -> Self:
        """Return the prints of structures, from their signatures."""
        kinds = np.array([zlib.crc32(own.kind) for own in signed], np.uint32)
        rows = [np.r_[own.every[list(_PLACES)], own.sums[:, [0, -1]].mean(axis=0)] for own in signed]
        return cls(kinds, np.array(rows, np.float32).reshape(len(rows), len(_TOLERANCE)), len(signed))

    def hold(self, frames: Sequence[Frame]) -> np.ndarray:
        """Return which structures are among those that the prints were taken of, shape (n,), bool.

        Copies are found as far as rounding makes them differ; of more than 10 000 structures only some are known.
        """
        from scipy.spatial import cKDTree  # only who looks for copies waits for it

        found = np.zeros(len(frames), bool)
        asked = Prints.taken(signatures(frames))
        for kind in np.intersect1d(self.kinds, asked.kinds):
            tree = cKDTree(self.values[self.kinds == kind] / _TOLERANCE)
            mine = np.flatnonzero(asked.kinds == kind)
            distance, _ = tree.query(asked.values[mine] / _TOLERANCE, p=np.inf, distance_upper_bound=1.0)
            found[mine] = np.isfinite(distance)
        return found

    def joined(self, other: Prints) -> Prints:
        """Return the prints of both."""
        return Prints(
            np.concatenate([self.kinds, other.kinds]),
            np.concatenate([self.values, other.values]),
            self.of + other.of,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a model file, of :data:`MOST` structures at most."""
        chosen = np.linspace(0, len(self.kinds) - 1, min(MOST, len(self.kinds))).astype(int)
        return {"of": self.of, "kinds": _text(self.kinds[chosen]), "values": _text(self.values[chosen])}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Undo :meth:`to_dict`.

        Raises:
            ValueError: if the values are no prints.
        """
        try:
            kinds = np.frombuffer(base64.b64decode(values["kinds"], validate=True), "<u4")
            rows = np.frombuffer(base64.b64decode(values["values"], validate=True), "<f4")
            return cls(kinds, rows.reshape(len(kinds), len(_TOLERANCE)), int(values["of"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"the prints of the training frames are damaged: {error}") from None


def _text(values: np.ndarray) -> str:
    return base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode("ascii")
