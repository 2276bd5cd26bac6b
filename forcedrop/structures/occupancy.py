"""Crystals whose sites are shared by several elements, or partly empty: no structure whose energy could be computed."""

from __future__ import annotations

from collections.abc import Mapping

from ase import Atoms

_WHOLE = 0.99


def require_whole_sites(atoms: Atoms, source: str) -> None:
    """Refuse a structure of a CIF file with partial occupancies: ASE keeps the most frequent element of a site and fills gaps.

    Args:
        atoms: as ASE read them.
        source: for the message.

    Raises:
        ValueError: naming the first site, and what is on it.
    """
    occupancy = atoms.info.get("occupancy")
    kinds = atoms.arrays.get("spacegroup_kinds")
    if not isinstance(occupancy, Mapping) or kinds is None:
        return
    for index, kind in enumerate(kinds):
        shares = occupancy.get(str(kind), {})
        if shares and (len(shares) > 1 or sum(shares.values()) < _WHOLE):
            there = ", ".join(f"{share:g} {element}" for element, share in shares.items())
            raise ValueError(
                f"{source}: the site of atom {index} is occupied by {there}; order the structure first: one atom on each site"
            )
