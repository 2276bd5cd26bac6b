"""From the units of a file to eV and Å: which unit each number is in, said or assumed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from forcedrop.units import ANGSTROM, EV, EV_PER_ANGSTROM, EV_PER_CUBE, Unit, unit

_WHAT = {"energy": "energy", "length": "length", "forces": "force", "stress": "stress"}
_INSIDE = {"energy": "eV", "length": "Å", "forces": "eV/Å", "stress": "eV/Å³"}
_WORDS = {"energy": "energies", "length": "lengths", "forces": "forces", "stress": "stress"}
_ATOMIC = {"Hartree", "mHartree", "Rydberg"}
"""Energies with forces per Bohr and stress per Bohr³ though positions are in Å: what programs of quantum chemistry write."""


@dataclass(frozen=True)
class Units:
    """Units of a file as somebody stated them; None where nobody did.

    Attributes:
        energy: of energies and virials; by default that of the forces, if they are stated, or eV.
        length: of positions and cells.
        forces: of forces; by default the energy's over the length's, over Bohr for Hartree and Rydberg.
        stress: of stress; by default the energy's over the length's cubed, over Bohr³ for Hartree and Rydberg.
    """

    energy: Any = None
    length: Any = None
    forces: Any = None
    stress: Any = None

    def __post_init__(self) -> None:
        for name, found in self.parsed().items():
            object.__setattr__(self, name, str(found))

    def parsed(self) -> dict[str, Unit]:
        """Return those that are stated.

        Raises:
            ValueError: if one is not known.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: unit(text, _WHAT[name]) for name, text in values.items() if text is not None}

    def conversion(self, own: Units | None = None, assumed: Mapping[str, str] | None = None) -> Conversion:
        """Return how a file is converted.

        Args:
            own: what the file says itself.
            assumed: units of the file's kind, where neither says more.

        Raises:
            ValueError: if the file says one unit and the user another.
        """
        mine, its = self.parsed(), (own or Units()).parsed()
        for name in mine.keys() & its.keys():
            if abs(mine[name].factor / its[name].factor - 1) > 1e-6:
                raise ValueError(
                    f"the file says that its {_WORDS[name]} are in {its[name]}, `{name}_unit` says {mine[name]}; "
                    "leave one of them out"
                )
        stated = {**its, **mine}
        guessed = {name: unit(text, _WHAT[name]) for name, text in (assumed or {}).items()}
        energy = stated.get("energy", guessed.get("energy", EV))
        if "energy" not in stated and "forces" in stated:
            energy = unit(stated["forces"].name.rpartition("/")[0], "energy")
        length = stated.get("length", guessed.get("length", ANGSTROM))
        per = unit("Bohr", "length") if energy.name in _ATOMIC and "length" not in its else length
        return Conversion(
            energy,
            length,
            stated.get("forces", unit(f"{energy}/{per}", "force")),
            stated.get("stress", unit(f"{energy}/{per}^3", "stress")),
            frozenset(stated),
        )


@dataclass(frozen=True)
class Conversion:
    """The units of a file, each with its factor to eV and Å, and which of them were stated."""

    energy: Unit = EV
    length: Unit = ANGSTROM
    forces: Unit = EV_PER_ANGSTROM
    stress: Unit = EV_PER_CUBE
    stated: frozenset[str] = frozenset()

    def sentence(self, present: Mapping[str, int]) -> str:
        """Return what is converted, such as "energies Hartree → eV, forces Hartree/Bohr → eV/Å"; empty where nothing is.

        Args:
            present: how many frames have ``energy``, ``forces`` and ``stress``; others are left out.
        """
        parts = []
        for name in ("length", "energy", "forces", "stress"):
            found: Unit = getattr(self, name)
            if found.factor != 1.0 and (name == "length" or present.get(name)):
                assumed = "" if name in self.stated else " (assumed)"
                parts.append(f"{_WORDS[name]} {found} → {_INSIDE[name]}{assumed}")
        return ", ".join(parts)
