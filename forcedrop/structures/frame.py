"""One labelled structure, the way everything inside forcedrop sees it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator


@dataclass(frozen=True)
class Frame:
    """A structure with the labels it has; a label it lacks is ``None``.

    Attributes:
        z: atomic numbers, shape (N,), int64.
        pos: positions [Å], shape (N, 3).
        cell: cell vectors as rows [Å], shape (3, 3); zeros where there is none.
        pbc: periodic directions, shape (3,), bool.
        energy: total energy [eV].
        forces: forces [eV/Å], shape (N, 3).
        stress: stress [eV/Å³], shape (6,), ASE's sign and Voigt order xx yy zz yz xz xy.
        info: anything else worth keeping of the whole structure, such as ``config_type``; numbers, texts and short lists.
        arrays: anything else worth keeping of each atom, first axis N.
        source: where it came from, as ``file#frame``, for error messages.
    """

    z: np.ndarray
    pos: np.ndarray
    cell: np.ndarray
    pbc: np.ndarray
    energy: float | None = None
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    info: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    source: str = "<memory>"

    def __len__(self) -> int:
        return len(self.z)

    @property
    def volume(self) -> float:
        """Cell volume [Å³]; 0 where there is no cell."""
        return float(abs(np.linalg.det(self.cell)))

    @classmethod
    def from_atoms(cls, atoms: Atoms, source: str = "<memory>", **labels: Any) -> Frame:
        """Copy the geometry of ``atoms``; labels (``energy``, ``forces`` …) are given by name."""
        return cls(
            z=np.asarray(atoms.get_atomic_numbers(), dtype=np.int64),
            pos=np.asarray(atoms.get_positions(), dtype=np.float64),
            cell=np.array(atoms.cell.array, dtype=np.float64),  # a copy: ASE changes cells in place
            pbc=np.asarray(atoms.get_pbc(), dtype=bool),
            source=source,
            **labels,
        )

    def to_atoms(self) -> Atoms:
        """Return ASE atoms that carry the labels in a ``SinglePointCalculator``."""
        atoms = Atoms(numbers=self.z, positions=self.pos, cell=self.cell, pbc=self.pbc, info=dict(self.info))
        for name, values in self.arrays.items():
            atoms.set_array(name, np.asarray(values))
        results = {"energy": self.energy, "forces": self.forces, "stress": self.stress}
        atoms.calc = SinglePointCalculator(atoms, **{k: v for k, v in results.items() if v is not None})
        return atoms
