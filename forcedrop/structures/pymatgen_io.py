"""Structures and molecules of pymatgen, with labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from forcedrop.structures.frame import Frame
from forcedrop.units import GPA

_STRESS_UNITS = {"eV/A^3": 1.0, "GPa": GPA, "kBar": GPA / 10}


def frames_from_pymatgen(items: Sequence[Any], source: str = "<memory>") -> list[Frame]:
    """Return frames from pymatgen objects, or from their dictionaries as written by ``as_dict``.

    Each item is a ``Structure`` or ``Molecule`` (labels in ``properties`` ``energy`` and ``stress`` and in the site property
    ``forces``), or a dictionary with ``structure`` (or ``molecule``) and ``energy`` [eV], ``forces`` [eV/Å], ``stress``.
    ``stress`` is 3×3 or Voigt 6 in ASE's sign (positive under tension), in ``stress_unit``: eV/A^3 (default), GPa or kBar.
    VASP prints the opposite sign.

    Raises:
        ValueError: naming the item that is none of these, or a site that is not one element.
    """
    return [_frame(item, f"{source}#{index}") for index, item in enumerate(items)]


def _frame(item: Any, source: str) -> Frame:
    from pymatgen.core.structure import IMolecule, IStructure, Molecule, Structure

    labels: dict[str, Any] = {}
    if isinstance(item, dict) and ("structure" in item or "molecule" in item):
        labels = {k: v for k, v in item.items() if k not in ("structure", "molecule")}
        item = item.get("structure", item.get("molecule"))
    if isinstance(item, dict) and "sites" in item:
        item = Structure.from_dict(item) if "lattice" in item else Molecule.from_dict(item)
    if not isinstance(item, (IStructure, IMolecule)):
        raise ValueError(f"{source}: not a pymatgen Structure or Molecule, nor one's dictionary: {type(item).__name__}")
    if not item.is_ordered:
        raise ValueError(f"{source}: a site is occupied by more than one element; order the structure first")
    labels = {**(item.properties or {}), **labels}
    if "forces" in item.site_properties:
        labels.setdefault("forces", item.site_properties["forces"])
    cell, pbc = np.zeros((3, 3)), (False, False, False)
    if isinstance(item, IStructure):
        cell, pbc = item.lattice.matrix, item.pbc
    stress = labels.get("stress")
    return Frame(
        z=np.array([site.specie.Z for site in item], dtype=np.int64),
        pos=np.asarray(item.cart_coords, dtype=np.float64),
        cell=np.asarray(cell, dtype=np.float64),
        pbc=np.asarray(pbc, dtype=bool),
        energy=None if labels.get("energy") is None else float(labels["energy"]),
        forces=None if labels.get("forces") is None else np.asarray(labels["forces"], dtype=np.float64),
        stress=None if stress is None else _voigt(stress, labels.get("stress_unit", "eV/A^3"), source),
        source=source,
    )


def _voigt(stress: Any, unit: str, source: str) -> np.ndarray:
    if unit not in _STRESS_UNITS:
        raise ValueError(f"{source}: unknown stress_unit {unit!r}; known are {', '.join(_STRESS_UNITS)}")
    array = np.asarray(stress, dtype=np.float64) * _STRESS_UNITS[unit]
    return array.reshape(9)[[0, 4, 8, 5, 2, 1]] if array.size == 9 else array
