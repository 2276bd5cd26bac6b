"""What a calculator says about a structure, if it is about this structure."""

from __future__ import annotations

from typing import Any

from ase import Atoms
from ase.calculators.calculator import compare_atoms

_SAME = 1e-6
"""Positions [Å] and cells that differ by less are the same: files round."""
_NOT_GEOMETRY = {"initial_charges", "initial_magmoms"}


def results_of(atoms: Atoms, source: str) -> dict[str, Any]:
    """Return the results that the calculator of ``atoms`` holds; nothing is computed.

    Raises:
        ValueError: if they are those of atoms that have changed since: as labels they would be wrong.
    """
    results = dict(getattr(atoms.calc, "results", None) or {})
    before = getattr(atoms.calc, "atoms", None)
    if results and before is not None:
        changed = compare_atoms(before, atoms, tol=_SAME, excluded_properties=_NOT_GEOMETRY)
        if changed:
            raise ValueError(
                f"{source}: the results of its calculator are those of other atoms ({', '.join(changed)} changed since): compute "
                "them anew, or take the calculator off (`atoms.calc = None`)"
            )
    return results
