"""What a label is, by its name: one table of the names that codes and packages use."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum


class Kind(StrEnum):
    """What a label is."""

    ENERGY = "energy"
    FREE_ENERGY = "free energy"
    FORCES = "forces"
    STRESS = "stress"
    VIRIAL = "virial"


NAMES: dict[Kind, tuple[str, ...]] = {
    Kind.ENERGY: (
        "energy", "total_energy", "tot_energy", "energy_total", "potential_energy", "pot_energy", "epot", "e_pot", "toten",
        "tot_en", "etot", "e_tot", "etotal", "e_total", "uncorrected_total_energy",
    ),
    Kind.FREE_ENERGY: ("free_energy", "energy_free"),
    Kind.FORCES: ("forces", "force", "atomic_forces", "force_vectors"),
    Kind.STRESS: ("stress", "stresses", "stress_tensor", "cauchy_stress"),
    Kind.VIRIAL: ("virial", "virials", "vir", "virial_tensor", "virials_tensor"),
}  # fmt: skip
"""Names of the whole structure's energy, free energy, stress [pressure, positive under tension] and virial [energy; −stress times
volume], and of the atoms' forces. Case, spaces, dots, hyphens and underscores do not matter."""

METHODS = (
    "ref",
    "reference",
    "target",
    "label",
    "true",
    "",
    "dft",
    "qm",
    "abinitio",
    "vasp",
    "y",
    "pbe",
    "ccsd",
    "ccsdt",
    "mp2",
)
"""Words of the reference method that stand before or after a name (``REF_energy``, ``dft_virial``, ``energy_ref``); the
first wins where a frame has several, and "" stands for the name alone."""

ARRAYS: dict[Kind, tuple[str, ...]] = {Kind.ENERGY: ("E", "energies"), Kind.FORCES: ("F",)}
"""Further names in files whose arrays hold one entry a structure (sGDML, rMD17, dpdata)."""

_LOOKS = {
    Kind.ENERGY: re.compile(r"energ|toten|etot|^e$|^e(dft|ref|scf|hf|xtb)$|^(dft|ref|scf|hf|xtb)e$"),
    Kind.FORCES: re.compile(r"forc|grad|^f$|^f(dft|ref|scf|hf|xtb)$|^(dft|ref|scf|hf|xtb)f$"),
    Kind.STRESS: re.compile(r"stress|viri|^vir|vir$|pressure"),
}
_OTHERWISE = re.compile(
    r"forcedrop|std|sigma|uncert|varian|covar|ensemble|error|rmse|mae|kinetic|ekin|temperature|unit|weight|cutoff|barrier|conserved|drift"
    r"|zeropoint|zpe|gap|fermi|lumo|homo"
)


def plain(name: str) -> str:
    """Return a name without what does not matter: case and separators."""
    return re.sub(r"[\W_]+", "", name.lower())


def _table(names: dict[Kind, tuple[str, ...]]) -> Iterator[tuple[str, tuple[Kind, tuple[int, int]]]]:
    for kind, bases in names.items():
        for order, method in enumerate(METHODS):
            for place, base in enumerate(bases):
                yield plain(f"{method}{base}"), (kind, (order, place))
                yield plain(f"{base}{method}"), (kind, (order, place))


_KNOWN = dict(reversed(list(_table(NAMES))))
_LAST = len(METHODS)
_KNOWN_ARRAYS = {
    **_KNOWN,
    **{plain(n): (kind, (_LAST, k)) for kind, names in ARRAYS.items() for k, n in enumerate(names)},
}


def meaning(name: str, *, arrays: bool = False) -> Kind | None:
    """Return what a number of this name is; None where the table does not say.

    Args:
        name: as a file has it.
        arrays: of a file whose arrays hold one entry a structure.
    """
    found = (_KNOWN_ARRAYS if arrays else _KNOWN).get(plain(name))
    return None if found is None else found[0]


def candidates(names: Iterable[str], kinds: Sequence[Kind], *, arrays: bool = False) -> list[str]:
    """Return the names that stand for one of ``kinds``, the one to be used first: by method, then by kind, then by name."""
    table = _KNOWN_ARRAYS if arrays else _KNOWN
    found = []
    for name in names:
        kind, (method, place) = table.get(plain(name), (None, (0, 0)))
        if kind in kinds:
            found.append((method, kinds.index(kind), place, name))
    return [name for *_, name in sorted(found)]


def looks_like(name: str) -> Kind | None:
    """Return what a number of this name may be: energy, forces, or a stress of either meaning; None where it is something else.

    For messages only: nothing is read because its name looks like something.
    """
    short = plain(name)
    if _OTHERWISE.search(short):
        return None
    return next((kind for kind, pattern in _LOOKS.items() if pattern.search(short)), None)
