"""From what a file says of a structure to its labels: which number is what, of which shape, in which unit."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from forcedrop.structures.checks import Problem
from forcedrop.structures.conversion import Conversion
from forcedrop.structures.frame import Frame
from forcedrop.structures.names import Kind, candidates, looks_like, meaning
from forcedrop.structures.predictions import MARK
from forcedrop.units import unit

_VOIGT_FROM_9 = (0, 4, 8, 5, 2, 1)
_TENSORS = ((6,), (9,), (3, 3))


@dataclass(frozen=True)
class LabelKeys:
    """Names of the labels in a file; where one is None, the table of :mod:`forcedrop.structures.names` is searched.

    ``stress`` may name a virial (energy; stress = −virial/volume) where the table says that it is one. A name of which the
    table knows nothing is a stress only if the unit of stress is stated as well; ``virial`` names a virial of any name.
    """

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None

    def __post_init__(self) -> None:
        if self.stress is not None and self.virial is not None:
            raise ValueError("give the name of the stress or that of the virial, not both")


@dataclass
class Raw:
    """What a file says of one structure, before any meaning or unit.

    Attributes:
        frame: geometry in the file's unit of length, info, arrays, constraints, source; no labels.
        values: everything that could be a label, by name.
        stress_unit: of this structure, where it says so itself.
    """

    frame: Frame
    values: dict[str, Any]
    stress_unit: str | None = None


@dataclass
class Labelled:
    """Frames of a file in eV and Å, and what is to be said about how they were read.

    Attributes:
        frames: all of them.
        problems: what is wrong with their labels.
        notes: what a reader would like to know.
        doubts: what may be a mistake.
        names: everything in the file that could be a label.
        units: in which the file was read; None for forcedrop's own, which has but one.
    """

    frames: list[Frame]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    units: Conversion | None = None


def labelled(raws: list[Raw], keys: LabelKeys, units: Conversion, path: str, *, arrays: bool = False) -> Labelled:
    """Give structures their labels and convert everything to eV and Å.

    Args:
        raws: all structures of a file.
        keys: names of labels that were asked for.
        units: of the file.
        path: of the file, for messages.
        arrays: whether it is a file whose arrays hold one entry a structure.

    Raises:
        ValueError: if a label that ``keys`` names is in no structure, or may be a stress or a virial.
    """
    names = sorted({name for raw in raws for name in raw.values} - {"numbers", "positions"})
    keys = _found(keys, names, path)
    if keys.stress is not None and meaning(keys.stress, arrays=arrays) is None and "stress" not in units.stated:
        raise ValueError(
            f"{path}: whether {keys.stress!r} is a stress or a virial, its name does not say: write `virial_key` instead of "
            "`stress_key` if it is a virial [energy], or state `stress_unit` (eV/Angstrom^3, GPa, kbar …) if it is a stress"
        )
    reading = _Reading(keys, units, arrays)
    frames = [reading.frame(raw) for raw in raws]
    return Labelled(frames, reading.problems, reading.notes(path), reading.doubts(path), names)


def _found(keys: LabelKeys, names: Collection[str], path: str) -> LabelKeys:
    """Return the keys as the file writes them, which may differ in case."""
    spelt: dict[str, str] = {}
    for what in ("energy", "forces", "stress", "virial"):
        asked = getattr(keys, what)
        if asked is None or asked in names:
            continue
        alike = [name for name in names if name.lower() == asked.lower()]
        if len(alike) != 1:
            raise ValueError(f"{path} has no {what} label {asked!r} in any frame; it has {', '.join(names) or 'none'}")
        spelt[what] = alike[0]
    return replace(keys, **spelt)


class _Reading:
    """Labels of one structure after another, and a tally of what was used, dropped and left."""

    def __init__(self, keys: LabelKeys, units: Conversion, arrays: bool) -> None:
        self.keys, self.units, self.arrays = keys, units, arrays
        self.problems: list[Problem] = []
        self.total = 0
        self.used: dict[str, Counter[str]] = {"energy": Counter(), "forces": Counter(), "stress": Counter()}
        self.rivals: Counter[tuple[str, str]] = Counter()
        self.alike: dict[str, Kind] = {}
        self.no_cell: set[str] = set()
        self.skewed: set[str] = set()

    def frame(self, raw: Raw) -> Frame:
        """Return the structure with its labels, without them among ``info`` and ``arrays``."""
        self.total += 1
        frame, length = raw.frame, self.units.length.factor
        frame = replace(frame, pos=frame.pos * length, cell=frame.cell * length) if length != 1.0 else frame
        values = {name: value for name, value in raw.values.items() if value is not None}
        found: dict[str, Any] = {}
        for what in ("energy", "forces", "stress"):
            names = self._names(what, values, len(frame))
            if names:
                try:
                    found[what] = self._value(what, names[0], values[names[0]], frame, raw.stress_unit)
                except ValueError as error:
                    self.problems.append(Problem(frame.source, names[0], str(error)))
                    continue
                self.used[what][names[0]] += found[what] is not None
                self._compare(what, names, values, found[what], frame, raw.stress_unit)
        self._look_around(values, len(frame))
        mine = {name for what in self.used for name in self._names(what, values, len(frame))}
        mine |= {name for name in values if meaning(name) is not None or name in ("energies", "stresses")}
        return replace(
            frame,
            info={k: v for k, v in frame.info.items() if k not in mine},
            arrays={k: v for k, v in frame.arrays.items() if k not in mine},
            **found,
        )

    def _names(self, what: str, values: Mapping[str, Any], atoms: int) -> list[str]:
        """Return the names of a label in a structure, the one to be used first."""
        if what == "stress":
            asked = self.keys.stress or self.keys.virial
            kinds = [Kind.STRESS, Kind.VIRIAL]
            # by atom there are other things of the same names
            by_atom = [(atoms, *shape) for shape in _TENSORS]
            values = {k: v for k, v in values.items() if k == asked or _shape(v) not in by_atom}
        else:
            asked, kinds = getattr(self.keys, what), [Kind(what)]
        if asked is not None:
            return [asked] if asked in values else []
        found = candidates(values, kinds, arrays=self.arrays)
        return found + candidates(values, [Kind.FREE_ENERGY]) if what == "energy" else found

    def _value(self, what: str, name: str, value: Any, frame: Frame, own_unit: str | None) -> Any:
        """Return a label in eV and Å; None for a stress that is none.

        Raises:
            ValueError: for something of another shape, or no numbers.
        """
        array = _numbers(value)
        if what == "energy":
            if array.size != 1 or array.ndim > 1:
                raise ValueError(f"an energy must be one number, got shape {array.shape}")
            return float(array.reshape(())) * self.units.energy.factor
        if what == "forces":
            if array.shape != (len(frame), 3):
                raise ValueError(f"forces must have shape {(len(frame), 3)}, got {array.shape}")
            return array * self.units.forces.factor
        if array.shape not in _TENSORS:
            raise ValueError(f"stress and virial must have shape (6,), (9,) or (3, 3), got {array.shape}")
        if not frame.pbc.any() or frame.volume <= 0:
            self.no_cell.add(frame.source)
            return None
        return self._voigt(array, frame) * self._per_volume(name, frame, own_unit)

    def _per_volume(self, name: str, frame: Frame, own_unit: str | None) -> float:
        """Return what makes a stress in eV/Å³, positive under tension, of a stress or a virial."""
        if name == self.keys.virial or (meaning(name) is Kind.VIRIAL and self.keys.virial is None):
            return -self.units.energy.factor / frame.volume
        if own_unit is None:
            return self.units.stress.factor
        stated = self.units.stress
        own = unit(own_unit, "stress")
        if "stress" in self.units.stated and abs(own.factor / stated.factor - 1) > 1e-6:
            raise ValueError(f"the structure says that its stress is in {own}, `stress_unit` says {stated}")
        return own.factor

    def _voigt(self, array: np.ndarray, frame: Frame) -> np.ndarray:
        if array.size == 6:
            return array
        tensor = array.reshape(3, 3)
        largest = np.abs(tensor).max()
        if np.isfinite(largest) and np.abs(tensor - tensor.T).max() > 0.01 * largest + 1e-8:
            self.skewed.add(frame.source)
        return (0.5 * (tensor + tensor.T)).reshape(9)[list(_VOIGT_FROM_9)]

    def _compare(
        self, what: str, names: list[str], values: Mapping[str, Any], taken: Any, frame: Frame, own_unit: str | None
    ) -> None:
        """Note which others of the same meaning are there and differ; a marked prediction beside a label is none."""
        for other in names[1:]:
            if other == what and MARK in frame.info:
                continue
            try:
                value = None if taken is None else self._value(what, other, values[other], frame, own_unit)
            except ValueError:
                value = np.nan
            if value is not None and not np.allclose(taken, value, rtol=1e-4, atol=1e-6, equal_nan=True):
                self.rivals[names[0], other] += 1

    def _look_around(self, values: Mapping[str, Any], atoms: int) -> None:
        """Note what looks like a label and is not read."""
        for name, value in values.items():
            if name in self.alike or name in (*vars(self.keys).values(), "energies", "stresses"):
                continue
            kind = looks_like(name)
            if kind is None or meaning(name, arrays=self.arrays) is not None:
                continue
            wanted = {Kind.ENERGY: ((), (1,)), Kind.FORCES: ((atoms, 3), (3 * atoms,)), Kind.STRESS: _TENSORS}[kind]
            try:
                array = _numbers(value)
            except ValueError:
                continue
            if array.shape in wanted:
                self.alike[name] = kind

    def notes(self, path: str) -> list[str]:
        """Return which names and units were read, where these are not ASE's own."""
        present = {what: sum(names.values()) for what, names in self.used.items()}
        parts = []
        for what, names in self.used.items():
            plain = set(names) <= {what} and (what == "stress" or present[what] in (0, self.total))
            if names and not plain:
                words = [
                    name if n == self.total else f"{name} ({n} of {self.total} frames)"
                    for name, n in names.items()
                    if n
                ]
                parts += [f"{what} from {' and '.join(words)}"] if words else []
        sentence = self.units.sentence(present)
        said = "; ".join([*([", ".join(parts)] if parts else []), *([sentence] if sentence else [])])
        return [f"{path}: {said}"] if said else []

    def doubts(self, path: str) -> list[str]:
        """Return what may not be as it was meant."""
        said = []
        frees = [name for name in self.used["energy"] if meaning(name) is Kind.FREE_ENERGY and self.keys.energy is None]
        if frees:
            said.append(f"energies are free energies ({', '.join(frees)}), for want of others")
        for (taken, left), count in self.rivals.items():
            frames = "all frames" if count == self.total else f"{count} of {self.total} frames"
            said.append(f"{taken} is taken, not {left}, which differs in {frames}")
        if self.alike:
            said.append(
                f"looks like a label and is not used: {', '.join(sorted(self.alike))} (name it: `energy_key`, `forces_key`, "
                "`stress_key`, `virial_key`)"
            )
        if self.no_cell:
            said.append(f"stress of {len(self.no_cell)} frames without a periodic cell does not count")
        if self.skewed:
            said.append(
                f"stress tensors of {len(self.skewed)} frames are not symmetric; their symmetric parts are taken"
            )
        return [f"{path}: {text}" for text in said]


def _numbers(value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"no array of numbers: {error}") from None
    if array.dtype.kind not in "fiu":
        shown = repr(value)
        raise ValueError(f"numbers are wanted, got {shown if len(shown) < 60 else shown[:57] + '…'}")
    return array.astype(np.float64)


def _shape(value: Any) -> tuple[int, ...]:
    """Return the shape of an array; of anything else, that it has none."""
    return value.shape if isinstance(value, np.ndarray) else ()
