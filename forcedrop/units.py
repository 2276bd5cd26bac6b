"""Units. Inside forcedrop everything is Å, eV, eV/Å, eV/Å³, u and fs; conversion happens here and at the door only.

A unit is written as other packages write it: names of any length and case (``Ha``, ``hartree``, ``Eh``), products, quotients and
powers (``kcal/mol/Ang``, ``kcal mol^-1 Angstrom^-1``, ``eV Å⁻³``), bytes, ``a.u.``.
"""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import units as _ase

ENERGY: dict[str, float] = {
    "eV": 1.0,
    "meV": 1e-3,
    "kcal/mol": _ase.kcal / _ase.mol,
    "kJ/mol": _ase.kJ / _ase.mol,
    "Hartree": _ase.Hartree,
    "Rydberg": _ase.Rydberg,
    "mHartree": 1e-3 * _ase.Hartree,
}
"""One unit of energy in eV."""

LENGTH: dict[str, float] = {"Angstrom": 1.0, "Bohr": _ase.Bohr, "nm": 10.0, "pm": 0.01}
"""One unit of length in Å."""

PRESSURE: dict[str, float] = {
    "GPa": _ase.GPa,
    "MPa": 1e-3 * _ase.GPa,
    "Pa": _ase.Pascal,
    "kbar": 0.1 * _ase.GPa,
    "bar": _ase.bar,
    "atm": 101325 * _ase.Pascal,
}
"""One unit of pressure in eV/Å³."""

GPA = _ase.GPa
"""One GPa in eV/Å³."""

_POWERS = {"energy": (1, 0), "length": (0, 1), "force": (1, -1), "stress": (1, -3)}
"""Of energy and length, by what a unit is of."""

_EXAMPLES = {
    "energy": ", ".join(ENERGY),
    "length": ", ".join(LENGTH),
    "force": "eV/Angstrom, Hartree/Bohr, kcal/mol/Angstrom and other quotients of an energy and a length",
    "stress": "eV/Angstrom^3, GPa, kbar, Hartree/Bohr^3 and other quotients of an energy and a volume",
}

_ATOMIC = {"energy": "Hartree", "length": "Bohr", "force": "Hartree/Bohr", "stress": "Hartree/Bohr^3"}

_ALIASES = {
    "eV": "ev evs electronvolt electronvolts electron_volt electron_volts",
    "meV": "mev millielectronvolt millielectronvolts",
    "kcal/mol": "kcal kcals kcalmol kilocalorie kilocalories kcalpermol",
    "kJ/mol": "kj kjs kjmol kilojoule kilojoules kjpermol",
    "Hartree": "hartree hartrees ha har eh e_h hartree_energy",
    "Rydberg": "rydberg rydbergs ry ryd",
    "mHartree": "mhartree mha meh millihartree millihartrees",
    "Angstrom": "angstrom angstroms ang angs angst angstroem angstroems ångström ångströms ångstrom å a aa",
    "Bohr": "bohr bohrs bohr_radius bohrradius a0 a_0",
    "nm": "nm nanometer nanometers nanometre nanometres",
    "pm": "pm picometer picometers picometre picometres",
    "GPa": "gpa gigapascal gigapascals",
    "MPa": "mpa megapascal megapascals",
    "Pa": "pa pascal pascals",
    "kbar": "kbar kb kilobar kilobars kbars",
    "bar": "bar bars",
    "atm": "atm atmosphere atmospheres",
}
_NAMES = {alias: name for name, aliases in _ALIASES.items() for alias in aliases.split()}
_MOLES = {"mol", "mole", "moles", "mols"}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺−·×", "0123456789-+-**")
_TOKEN = re.compile(r"([*/()])|(a_?0(?![0-9])|[^\W\d]+)(?:\^?([-+]?\d+))?")


@dataclass(frozen=True)
class Unit:
    """A unit and what one of it is in eV, Å, eV/Å or eV/Å³."""

    name: str
    factor: float

    def __str__(self) -> str:
        return self.name


EV = Unit("eV", 1.0)
ANGSTROM = Unit("Angstrom", 1.0)
EV_PER_ANGSTROM = Unit("eV/Angstrom", 1.0)
EV_PER_CUBE = Unit("eV/Angstrom^3", 1.0)


def unit(text: Any, what: str) -> Unit:
    """Return the unit of an energy, a length, a force or a stress, from its name as a text, bytes, or an array of one of these.

    Args:
        text: such as ``kcal/mol``.
        what: ``"energy"``, ``"length"``, ``"force"`` or ``"stress"``.

    Raises:
        ValueError: if it is none.
    """
    written = _text(text)
    plain = unicodedata.normalize("NFC", written.replace("\u212b", "Å")).translate(_SUPERSCRIPTS).strip().lower()
    if re.sub(r"[^a-z]", "", plain) in ("au", "atomic", "atomicunit", "atomicunits"):
        return unit(_ATOMIC[what], what)
    try:
        name, factor, powers = _parsed(plain)
    except ValueError as error:
        detail = f": {error}" if str(error) else ""
        raise ValueError(f"unknown {what} unit {written!r}{detail}; known are {_EXAMPLES[what]}") from None
    if powers != _POWERS[what]:
        raise ValueError(f"unknown {what} unit {written!r}: it is no unit of {what}; known are {_EXAMPLES[what]}")
    return Unit(name, factor)


def energy_factor(name: Any) -> float:
    """Return the factor that takes an energy in the unit to eV.

    Raises:
        ValueError: if the unit is not known.
    """
    return unit(name, "energy").factor


def length_factor(name: Any) -> float:
    """Return the factor that takes a length in the unit to Å.

    Raises:
        ValueError: if the unit is not known.
    """
    return unit(name, "length").factor


def _text(value: Any) -> str:
    """Return a text from what files keep it in."""
    if isinstance(value, np.ndarray):
        if value.size != 1:
            raise ValueError(f"a unit must be one text, got an array of shape {value.shape}")
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise ValueError(f"a unit must be a text, got {value!r}")
    return str(value)


def _parsed(text: str) -> tuple[str, float, tuple[int, int]]:
    """Return the canonical name of a unit, its factor and its powers of energy and length.

    Raises:
        ValueError: naming the part that is not known.
    """
    text = re.sub(r"\bper\b", "/", text.replace("**", "^").replace("\\aa", "å"))
    text = re.sub(r"[$\[\]{}]|\\(?:mathrm|text|rm)\b", "", text)
    text = re.sub(r"/\s*a\.?u\b\.?", "/bohr", text)
    text = re.sub(r"\s*([*/^()])\s*", r"\1", text)
    text = re.sub(
        r"(kcal|kj)/mol(?:es|e|s)?\b(?:[-*](?=\w))?", lambda found: found[1] + "/" * (found[0][-1] in "-*"), text
    )
    text = re.sub(r"\b(bohr|hartree|electron)[\s_-]+(radius|energy|volts?)\b", r"\1_\2", text)
    if not text:
        raise ValueError("it is empty")
    if "(" in text:  # only a denominator in brackets is ever meant
        text = re.sub(r"/\(([^()]*)\)", lambda found: "/" + re.sub(r"[*\s]+", "/", found[1]), text)
    parts: list[tuple[str, int]] = []
    end, sign = 0, 1
    for found in _TOKEN.finditer(text):
        if text[end : found.start()].strip(" ."):
            raise ValueError(f"{text[end : found.start()].strip()!r}")
        end = found.end()
        if found[1]:
            if found[1] in "()":
                raise ValueError(f"{found[1]!r}")
            sign = -1 if found[1] == "/" else 1
            continue
        if found[2] not in _MOLES:
            parts.append((_canonical(found[2]), sign * int(found[3] or 1)))
        sign = 1
    if text[end:].strip(" ."):
        raise ValueError(f"{text[end:].strip()!r}")
    return _combined(parts)


def _canonical(word: str) -> str:
    if word not in _NAMES:
        raise ValueError(f"{word!r}")
    return _NAMES[word]


def _combined(parts: list[tuple[str, int]]) -> tuple[str, float, tuple[int, int]]:
    tables = ((ENERGY, (1, 0)), (LENGTH, (0, 1)), (PRESSURE, (1, -3)))
    factor, energy, length = 1.0, 0, 0
    for name, power in parts:
        table, powers = next((t, p) for t, p in tables if name in t)
        factor *= math.pow(table[name], power)
        energy, length = energy + power * powers[0], length + power * powers[1]
    above = [name if power == 1 else f"{name}^{power}" for name, power in parts if power > 0]
    below = [name if power == -1 else f"{name}^{-power}" for name, power in parts if power < 0]
    return "/".join(["*".join(above) or "1", *below]), factor, (energy, length)
