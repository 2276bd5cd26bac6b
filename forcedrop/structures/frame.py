"""One labelled structure, the way everything inside forcedrop sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

from forcedrop.structures.constraints import described, restored

CARRIED = ("momenta", "masses", "tags", "initial_charges", "initial_magmoms")
"""What ASE's atoms carry besides their geometry, by atom, in ASE's units."""

COMPUTED = ("magmoms", "charges")
"""What a calculator may have found for each atom besides forces; kept among a frame's ``arrays``."""


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
        arrays: anything else worth keeping of each atom, first axis N: ASE's momenta, masses, tags, initial charges and magnetic
            moments under ASE's names and in its units, and whatever a file has.
        constraints: ASE's constraints as dictionaries with ``name`` and ``kwargs``.
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
    constraints: list[dict[str, Any]] = field(default_factory=list)
    source: str = "<memory>"

    def __len__(self) -> int:
        return len(self.z)

    @property
    def volume(self) -> float:
        """Cell volume [Å³]; 0 where there is no cell."""
        return float(abs(np.linalg.det(self.cell)))

    @classmethod
    def geometry(cls, atoms: Atoms, source: str = "<memory>") -> Frame:
        """Copy elements, positions and cell of ``atoms`` and nothing else."""
        return cls(
            z=np.asarray(atoms.get_atomic_numbers(), dtype=np.int64),
            pos=np.asarray(atoms.get_positions(), dtype=np.float64),
            cell=np.array(atoms.cell.array, dtype=np.float64),  # a copy: ASE changes cells in place
            pbc=np.asarray(atoms.get_pbc(), dtype=bool),
            source=source,
        )

    @classmethod
    def from_atoms(cls, atoms: Atoms, source: str = "<memory>", **labels: Any) -> Frame:
        """Copy ``atoms`` with what they carry: constraints, velocities, masses, tags, initial charges and magnetic moments.

        Labels (``energy``, ``forces`` …), ``info`` and further ``arrays`` are given by name.
        """
        carried = {name: np.array(atoms.arrays[name]) for name in CARRIED if name in atoms.arrays}
        arrays = {**carried, **labels.pop("arrays", {})}
        constraints = labels.pop("constraints", None) or (described(atoms) if atoms.constraints else [])
        return replace(cls.geometry(atoms, source), arrays=arrays, constraints=constraints, **labels)

    def to_atoms(self) -> Atoms:
        """Return ASE atoms with all that the frame carries, the labels in a ``SinglePointCalculator``.

        Raises:
            ValueError: for a constraint that ASE does not know.
        """
        atoms = Atoms(numbers=self.z, positions=self.pos, cell=self.cell, pbc=self.pbc, info=dict(self.info))
        for name, values in self.arrays.items():
            if name not in COMPUTED:
                atoms.set_array(name, np.asarray(values, dtype=int if name == "tags" else None))
        if self.constraints:
            atoms.set_constraint(restored(self.constraints))
        results: dict[str, Any] = {"energy": self.energy, "forces": self.forces, "stress": self.stress}
        results |= {name: np.asarray(self.arrays[name]) for name in COMPUTED if name in self.arrays}
        atoms.calc = SinglePointCalculator(atoms, **{k: v for k, v in results.items() if v is not None})
        return atoms
