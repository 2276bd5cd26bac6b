"""Structures and molecules of pymatgen, with labels.

A dictionary may name classes (``@module``, ``@class``), and pymatgen would import whatever is named there, even deep in the
properties of a site. Here a dictionary is data: a structure or a molecule is made of it, arrays of numbers in it are read, and
names of other classes are dropped unread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from forcedrop.structures.conversion import Conversion
from forcedrop.structures.frame import Frame
from forcedrop.structures.labels import LabelKeys, Raw, labelled
from forcedrop.structures.telling import accepted

_CARRIED = {"magmom": "magmoms", "charge": "charges"}


def frames_from_pymatgen(items: Sequence[Any], source: str = "<memory>", keys: LabelKeys | None = None) -> list[Frame]:
    """Return frames from pymatgen objects, or from their dictionaries as written by ``as_dict``.

    Each item is a ``Structure`` or ``Molecule`` with labels in its ``properties`` and site properties, or a dictionary with
    ``structure`` (or ``molecule``) and labels beside it: energy [eV], forces [eV/Å], stress or virial, under the names of
    :mod:`forcedrop.structures.names`. ``stress`` is in ASE's sign (positive under tension), in the item's ``stress_unit``:
    eV/Angstrom^3 (default), GPa, kbar … VASP prints the opposite sign. ``selective_dynamics`` become constraints.
    Classes that are named in a dictionary are not imported.

    Raises:
        ValueError: naming the item that is none of these, or a site that is not one element; for a label of a wrong shape.
    """
    raws = [raw_from_pymatgen(item, f"{source}#{index}") for index, item in enumerate(items)]
    return accepted(labelled(raws, keys or LabelKeys(), Conversion(), source))


def raw_from_pymatgen(item: Any, source: str) -> Raw:
    """Return a structure with everything in it that could be a label; see :func:`frames_from_pymatgen`.

    Raises:
        ValueError: if it is none, or a site is not one element.
    """
    from pymatgen.core.structure import IMolecule, IStructure, Molecule, Structure

    beside: dict[str, Any] = {}
    if isinstance(item, dict) and ("structure" in item or "molecule" in item):
        beside = {k: plain(v) for k, v in item.items() if k not in ("structure", "molecule")}
        item = item.get("structure", item.get("molecule"))
    if isinstance(item, dict) and "sites" in item:
        item = plain(item)
        item = Structure.from_dict(item) if "lattice" in item else Molecule.from_dict(item)
    if not isinstance(item, (IStructure, IMolecule)):
        raise ValueError(f"{source}: not a pymatgen Structure or Molecule, nor one's dictionary: {type(item).__name__}")
    if not item.is_ordered:
        raise ValueError(f"{source}: a site is occupied by more than one element; order the structure first")
    cell, pbc = np.zeros((3, 3)), (False, False, False)
    if isinstance(item, IStructure):
        cell, pbc = item.lattice.matrix, item.pbc
    sites = dict(item.site_properties)
    frame = Frame(
        z=np.array([site.specie.Z for site in item], dtype=np.int64),
        pos=np.asarray(item.cart_coords, dtype=np.float64),
        cell=np.asarray(cell, dtype=np.float64),
        pbc=np.asarray(pbc, dtype=bool),
        arrays=_carried(sites),
        constraints=_held(sites.get("selective_dynamics")),
        source=source,
    )
    values = {**sites, **(item.properties or {}), **beside}
    return Raw(frame, values, values.get("stress_unit"))


def _carried(sites: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return magnetic moments and charges, where each site has its number."""
    found = {}
    for theirs, ours in _CARRIED.items():
        values = sites.get(theirs)
        if values is not None and all(isinstance(value, int | float) for value in values):
            found[ours] = np.asarray(values, dtype=np.float64)
    return found


def _held(moves: Any) -> list[dict[str, Any]]:
    """Return constraints from VASP's selective dynamics: for each site, along which cell vectors it moves."""
    if moves is None:
        return []
    held: dict[tuple[bool, ...], list[int]] = {}
    for index, free in enumerate(moves):
        mask = (False,) * 3 if free is None else tuple(not bool(x) for x in free)
        if any(mask):
            held.setdefault(mask, []).append(index)
    return [
        {"name": "FixAtoms", "kwargs": {"indices": atoms}}
        if all(mask)
        else {"name": "FixScaled", "kwargs": {"a": atoms, "mask": list(mask)}}
        for mask, atoms in held.items()
    ]


def plain(value: Any) -> Any:
    """Return plain data, a copy: arrays as nested lists, without the names of classes (keys that begin with ``@``)."""
    if isinstance(value, dict):
        if value.get("@module") == "numpy" and value.get("@class") == "array":
            return value.get("data")
        return {key: plain(entry) for key, entry in value.items() if not str(key).startswith("@")}
    return [plain(entry) for entry in value] if isinstance(value, list | tuple) else value
