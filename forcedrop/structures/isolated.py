"""Energies of isolated atoms, the zero from which a potential counts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from forcedrop.structures.frame import Frame
from forcedrop.structures.labels import LabelKeys
from forcedrop.structures.names import plain
from forcedrop.structures.readers import read_checked
from forcedrop.structures.reading import Reading
from forcedrop.structures.search import PairSearch
from forcedrop.structures.telling import Tell

ALONE = 5.0
"""An atom without another one within this distance [Å] is alone, where no cutoff says more."""

MOST_BINDING = 50.0
"""Energy for each atom [eV] between a structure and its isolated atoms that no structure has: the strongest solids bind by 12."""

_SAYS_SO = {"isolatedatom", "isolatedatoms", "isoatom"}
_SAME = 1e-3


def is_isolated_atom(frame: Frame, cutoff: float = ALONE) -> bool:
    """Return whether a frame is a single atom in empty space: it says where energies are counted from, and trains nothing.

    It is one without periodic images, or with none within ``cutoff`` [Å], or of which the file says
    ``config_type=IsolatedAtom``.
    """
    if len(frame) != 1:
        return False
    if not frame.pbc.any() or plain(str(frame.info.get("config_type", ""))) in _SAYS_SO:
        return True
    return len(PairSearch(cutoff, threads=1)(frame.pos, frame.cell, frame.pbc).d) == 0


def isolated_energies(
    frames: Sequence[Frame],
    given: Mapping[str, float] | Mapping[int, float] | Mapping[str | int, float] | Path | str | None = None,
    *,
    reading: Reading | None = None,
    cutoff: float = ALONE,
    tell: Tell | None = None,
) -> tuple[dict[int, float], str]:
    """Return the energy of each isolated atom [eV] by atomic number, and a word on where they come from.

    Args:
        frames: labelled structures; every element in them gets an energy.
        given: energies by chemical symbol or atomic number, or a file of single atoms. Without it single-atom frames among
            ``frames`` are used if they cover all elements; else a least-squares fit of the energies on the compositions, of
            minimum norm, which for one composition determines the sum only.
        reading: names and units of the file, and the unit of energies that are given; by default eV.
        cutoff: an atom without a periodic image nearer than this is isolated [Å].
        tell: gets what is worth knowing about how the file was read.

    Raises:
        ValueError: if ``given`` lacks an element, names an unknown one, or holds no number; if two single-atom frames of one
            element have different energies.
    """
    needed = sorted({int(z) for frame in frames for z in frame.z})
    reading = reading or Reading()
    if given is not None:
        if isinstance(given, Mapping):
            energies, origin = _given(given, reading), "given"
        else:
            own = replace(reading, keys=LabelKeys(energy=reading.keys.energy))
            found = read_checked([given], own, labels_needed=True, tell=tell)[0]
            energies, origin = _singles(found, cutoff), f"from {Path(given).name}"
        missing = [chemical_symbols[z] for z in needed if z not in energies]
        if missing:
            raise ValueError(f"isolated-atom energies ({origin}) lack {', '.join(missing)}")
        return {z: energies[z] for z in needed}, origin
    singles = _singles(frames, cutoff)
    if singles and all(z in singles for z in needed):
        return {z: singles[z] for z in needed}, "from single-atom frames"
    labelled = [f for f in frames if f.energy is not None]
    if not labelled:
        return dict.fromkeys(needed, 0.0), "zero (no energies to fit)"
    counts = np.array([[np.count_nonzero(f.z == z) for z in needed] for f in labelled], float)
    fitted = np.linalg.lstsq(counts, np.array([f.energy for f in labelled]), rcond=None)[0]
    return dict(zip(needed, fitted.tolist(), strict=True)), "fitted to the compositions"


def doubtful_binding(frames: Sequence[Frame], isolated: Mapping[int, float]) -> str | None:
    """Return a sentence if energies of structures lie so far from those of their atoms that the two cannot belong together.

    Args:
        frames: structures with energies.
        isolated: of each isolated atom [eV], by atomic number.
    """
    binding = [
        (f.energy - sum(isolated[int(z)] for z in f.z)) / len(f)
        for f in frames
        if f.energy is not None and len(f) and all(int(z) in isolated for z in f.z)
    ]
    typical = float(np.median(binding)) if binding else 0.0
    if abs(typical) <= MOST_BINDING:
        return None
    where = "above" if typical > 0 else "below"
    return (
        f"energies of the structures are {abs(typical):.4g} eV per atom {where} those of their isolated atoms, which is no "
        "chemistry: are both of the same method, of all electrons or of valence electrons alone, and in the same unit?"
    )


def _given(
    given: Mapping[str, float] | Mapping[int, float] | Mapping[str | int, float], reading: Reading
) -> dict[int, float]:
    """Return energies [eV] by atomic number from those by symbol or number, in the unit of ``reading``."""
    factor = reading.units.conversion().energy.factor
    found: dict[int, float] = {}
    for key, energy in given.items():
        z = _element(key)
        if isinstance(energy, bool) or not isinstance(energy, int | float | np.number) or not math.isfinite(energy):
            raise ValueError(f"isolated-atom energies: that of {key} must be a number, got {energy!r}")
        if z in found:
            raise ValueError(f"isolated-atom energies: {chemical_symbols[z]} is given twice")
        found[z] = float(energy) * factor
    return found


def _element(key: object) -> int:
    text = str(key).strip()
    if text in atomic_numbers and text != "X":
        return int(atomic_numbers[text])
    if not isinstance(key, bool) and text.isdecimal() and 1 <= int(text) < len(chemical_symbols):
        return int(text)
    raise ValueError(f"isolated-atom energies: {key!r} is no chemical symbol and no atomic number")


def _singles(frames: Sequence[Frame], cutoff: float) -> dict[int, float]:
    """Return the energies of isolated atoms among frames [eV].

    Raises:
        ValueError: if two of one element differ.
    """
    found: dict[int, Frame] = {}
    for frame in frames:
        if frame.energy is None or not is_isolated_atom(frame, cutoff):
            continue
        z = int(frame.z[0])
        other = found.setdefault(z, frame)
        if other.energy is not None and abs(other.energy - frame.energy) > _SAME:
            raise ValueError(
                f"two energies of an isolated {chemical_symbols[z]}: {other.energy:.6g} eV ({other.source}) and "
                f"{frame.energy:.6g} eV ({frame.source}); leave one, or give `isolated_atoms`"
            )
    return {z: float(frame.energy or 0.0) for z, frame in found.items()}
