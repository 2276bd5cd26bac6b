"""Energies of isolated atoms, the zero from which a potential counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from forcedrop.structures.frame import Frame
from forcedrop.structures.readers import read_frames


def isolated_energies(
    frames: Sequence[Frame], given: Mapping[str, float] | Path | str | None = None
) -> tuple[dict[int, float], str]:
    """Return the energy of each isolated atom [eV] by atomic number, and a word on where they come from.

    Args:
        frames: labelled structures; every element in them gets an energy.
        given: energies by chemical symbol, or a file of single atoms. Without it single-atom frames among ``frames`` are used
            if they cover all elements; else a least-squares fit of the energies on the compositions, of minimum norm, which
            for one composition determines the sum only.

    Raises:
        ValueError: if ``given`` lacks an element, or names an unknown one.
    """
    needed = sorted({int(z) for frame in frames for z in frame.z})
    if given is not None:
        if isinstance(given, Mapping):
            unknown = [symbol for symbol in given if symbol not in atomic_numbers]
            if unknown:
                raise ValueError(f"isolated-atom energies: {unknown[0]!r} is no chemical symbol")
            energies, origin = {atomic_numbers[s]: float(e) for s, e in given.items()}, "given"
        else:
            energies, origin = _singles(read_frames(given)), f"from {Path(given).name}"
        missing = [chemical_symbols[z] for z in needed if z not in energies]
        if missing:
            raise ValueError(f"isolated-atom energies ({origin}) lack {', '.join(missing)}")
        return {z: energies[z] for z in needed}, origin
    singles = _singles(frames)
    if singles and all(z in singles for z in needed):
        return {z: singles[z] for z in needed}, "from single-atom frames"
    labelled = [f for f in frames if f.energy is not None]
    if not labelled:
        return dict.fromkeys(needed, 0.0), "zero (no energies to fit)"
    counts = np.array([[np.count_nonzero(f.z == z) for z in needed] for f in labelled], float)
    fitted = np.linalg.lstsq(counts, np.array([f.energy for f in labelled]), rcond=None)[0]
    return dict(zip(needed, fitted.tolist(), strict=True)), "fitted to the compositions"


def _singles(frames: Sequence[Frame]) -> dict[int, float]:
    return {int(f.z[0]): f.energy for f in frames if len(f) == 1 and f.energy is not None and not f.pbc.any()}
