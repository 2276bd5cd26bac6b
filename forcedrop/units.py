"""Units. Inside forcedrop everything is Å, eV, eV/Å, eV/Å³, u and fs; conversion happens here and at the door only."""

from __future__ import annotations

from ase import units as _ase

ENERGY: dict[str, float] = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": _ase.kcal / _ase.mol,
    "kJ/mol": _ase.kJ / _ase.mol,
    "Hartree": _ase.Hartree,
}
"""One unit of energy in eV."""

LENGTH: dict[str, float] = {"Angstrom": 1.0, "Bohr": _ase.Bohr, "nm": 10.0}
"""One unit of length in Å."""

GPA = _ase.GPa
"""One GPa in eV/Å³."""

_ALIASES = {
    "Å": "Angstrom",
    "angstrom": "Angstrom",
    "bohr": "Bohr",
    "a0": "Bohr",
    "ev": "eV",
    "hartree": "Hartree",
    "Ha": "Hartree",
    "kcal": "kcal/mol",
    "kJ": "kJ/mol",
}


def energy_factor(unit: str) -> float:
    """Return the factor that takes an energy in ``unit`` to eV.

    Raises:
        ValueError: if the unit is not known.
    """
    return _factor(unit, ENERGY, "energy")


def length_factor(unit: str) -> float:
    """Return the factor that takes a length in ``unit`` to Å.

    Raises:
        ValueError: if the unit is not known.
    """
    return _factor(unit, LENGTH, "length")


def _factor(unit: str, table: dict[str, float], what: str) -> float:
    name = _ALIASES.get(unit, unit)
    if name not in table:
        raise ValueError(f"unknown {what} unit {unit!r}; known are {', '.join(table)}")
    return table[name]
