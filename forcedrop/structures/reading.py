"""What is asked of a reader: names, units, and what becomes of what looks wrong."""

from __future__ import annotations

from dataclasses import dataclass, field

from forcedrop.structures.conversion import Units
from forcedrop.structures.labels import LabelKeys


@dataclass(frozen=True)
class Reading:
    """How files are read: names of the labels, units, and what becomes of what looks wrong.

    Attributes:
        keys: names of the labels; where one is not given, those that codes and packages use are looked for.
        energy_unit: of energies and virials; by default eV (npz: what the file says, or kcal/mol).
        length_unit: of positions and cells; by default Å.
        forces_unit: by default the energy's over the length's; over Bohr for Hartree and Rydberg.
        stress_unit: by default the energy's over the length's cubed; over Bohr³ for Hartree and Rydberg.
        skip_bad: drop bad frames instead of raising.
        trust_units: take numbers that can hardly be in their unit, with a word.
    """

    keys: LabelKeys = field(default_factory=LabelKeys)
    energy_unit: str | None = None
    length_unit: str | None = None
    forces_unit: str | None = None
    stress_unit: str | None = None
    skip_bad: bool = False
    trust_units: bool = False

    def __post_init__(self) -> None:
        _ = self.units  # says what is wrong

    @property
    def units(self) -> Units:
        """The units that were stated.

        Raises:
            ValueError: if one is not known.
        """
        return Units(self.energy_unit, self.length_unit, self.forces_unit, self.stress_unit)
