"""Which energies labelled structures determine, where those of isolated atoms are not known.

Energies per atom of an element that are fitted to the compositions are any that fit them: of ethanol alone only the sum of two C,
six H and one O is known. What is determined is the energy of every composition in the span of the labelled ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ase.data import atomic_numbers, chemical_symbols
from ase.symbols import Symbols

from forcedrop.structures.frame import Frame


def basis(frames: Iterable[Frame]) -> list[dict[str, int]]:
    """Return compositions of frames with an energy, none a combination of those before, that span all of them."""
    found: list[dict[str, int]] = []
    seen: set[bytes] = set()
    for frame in frames:
        key = np.sort(frame.z).tobytes()
        if frame.energy is not None and key not in seen:
            seen.add(key)
            if not spanned(frame.z, found):
                numbers, counts = np.unique(frame.z, return_counts=True)
                found.append({chemical_symbols[z]: int(n) for z, n in zip(numbers, counts, strict=True)})
    return found


def spanned(z: np.ndarray, compositions: Sequence[Mapping[str, int]]) -> bool:
    """Return whether the composition of some atoms is a combination of others."""
    if not compositions:
        return False
    elements = sorted({int(number) for number in z} | {atomic_numbers[s] for known in compositions for s in known})
    rows = np.array([[known.get(chemical_symbols[e], 0) for e in elements] for known in compositions], float)
    own = np.array([np.count_nonzero(z == e) for e in elements], float)
    left = own - np.linalg.lstsq(rows.T, own, rcond=None)[0] @ rows
    return bool(np.abs(left).max() < 1e-6 * max(1.0, own.max()))


def formula(composition: Mapping[str, int]) -> str:
    """Return a composition as chemists write it."""
    z = [atomic_numbers[symbol] for symbol, count in composition.items() for _ in range(count)]
    return str(Symbols(z).get_chemical_formula())
