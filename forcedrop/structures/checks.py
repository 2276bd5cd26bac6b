"""What makes a frame unusable, found before anything is computed from it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols

from forcedrop.structures.frame import Frame
from forcedrop.structures.search import FARTHEST, PairSearch
from forcedrop.units import ENERGY

MIN_DISTANCE = 0.3
"""Atoms closer than this [Å] are a mistake in the file."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one frame: where (``file#frame``), in which field, and what."""

    source: str
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.source}: {self.field}: {self.message}"


class BadFrames(ValueError):
    """Frames that cannot be used; the message lists the first ten problems, ``problems`` holds all."""

    def __init__(self, problems: Sequence[Problem], hint: str = "") -> None:
        self.problems = list(problems)
        sources = {problem.source for problem in self.problems}
        if len(self.problems) == 1:
            super().__init__(f"{self.problems[0]}{f' ({hint})' if hint else ''}")
            return
        count = f"{len(sources)} bad frame{'s' if len(sources) != 1 else ''}{f' ({hint})' if hint else ''}:"
        lines = [f"  {problem}" for problem in self.problems[:10]]
        if len(self.problems) > 10:
            lines.append(f"  … and {len(self.problems) - 10} more")
        super().__init__("\n".join([count, *lines]))


def check_frames(
    frames: Iterable[Frame], *, elements: Collection[int] | None = None, min_distance: float = MIN_DISTANCE
) -> list[Problem]:
    """Return every problem of every frame: shapes, numbers, elements, cell, distances [Å], mixed units."""
    frames = list(frames)
    problems: list[Problem] = []
    # a search radius of the order of a bond keeps the number of cells small
    search = PairSearch(max(min_distance, 1.5), threads=1)
    for frame in frames:
        found = [*_shapes(frame)] or [*_numbers(frame), *_elements(frame, elements), *_cell(frame)]
        if not found:
            found = [*_distances(frame, search, min_distance)]
        problems += found
    return problems + mixed_units(frames) + mixed_within(frames)


def _shapes(frame: Frame) -> Iterable[Problem]:
    n = len(frame.z)
    if n == 0:
        yield Problem(frame.source, "positions", "there are no atoms")
        return
    wanted = {"pos": (n, 3), "cell": (3, 3), "pbc": (3,), "forces": (n, 3), "stress": (6,)}
    for name, shape in wanted.items():
        array = getattr(frame, name)
        if array is not None and np.shape(array) != shape:
            yield Problem(frame.source, name, f"shape must be {shape}, got {np.shape(array)}")


def _numbers(frame: Frame) -> Iterable[Problem]:
    for name in ("pos", "cell", "energy", "forces", "stress"):
        values = getattr(frame, name)
        if values is None:
            continue
        if np.isfinite(values).all():
            if name in ("pos", "cell") and np.abs(values).max() > FARTHEST:
                yield Problem(
                    frame.source, name, f"{np.abs(values).max():.3g} Å, more than {FARTHEST:g} Å: in another unit?"
                )
            continue
        bad = np.argwhere(~np.isfinite(np.atleast_1d(values)))[0]
        atom = f" at atom {bad[0]}" if name in ("pos", "forces") else ""
        yield Problem(frame.source, name, f"NaN or infinite{atom}")


def _elements(frame: Frame, elements: Collection[int] | None) -> Iterable[Problem]:
    for index, z in enumerate(frame.z):
        if not 1 <= z < len(chemical_symbols):
            yield Problem(frame.source, "z", f"atom {index} has atomic number {z}, which is no element")
            return
        if elements is not None and z not in elements:
            known = ", ".join(chemical_symbols[e] for e in sorted(elements))
            yield Problem(frame.source, "z", f"atom {index} is {chemical_symbols[z]}; the model knows {known}")
            return


def _cell(frame: Frame) -> Iterable[Problem]:
    if not frame.pbc.any():
        return
    lengths = np.linalg.norm(frame.cell, axis=1)
    if np.any(frame.pbc & (lengths < 1e-8)):
        axis = "abc"[int(np.argmax(frame.pbc & (lengths < 1e-8)))]
        yield Problem(frame.source, "cell", f"periodic along {axis}, but the cell has no vector {axis}")
    elif lengths.all() and frame.volume < 1e-8 * lengths.prod():
        yield Problem(frame.source, "cell", "the cell vectors lie in one plane")


def _distances(frame: Frame, search: PairSearch, min_distance: float) -> Iterable[Problem]:
    try:
        i, j, d = search(frame.pos, frame.cell, frame.pbc).nearest()
    except ValueError as error:
        yield Problem(frame.source, "cell" if "cell" in str(error) else "pos", str(error))
        return
    if d < min_distance:
        yield Problem(frame.source, "pos", f"atoms {i} and {j} are {d:.3f} Å apart, less than {min_distance} Å")


_UNITS = ("eV", "kcal/mol", "kJ/mol", "Hartree", "Rydberg")
_RATIOS = {f"{a} instead of {b}": ENERGY[a] / ENERGY[b] for a in _UNITS for b in _UNITS if a != b}


def mixed_within(frames: Sequence[Frame]) -> list[Problem]:
    """Return a problem for each frame whose energy looks like another unit than that of most in its file of its composition.

    Compositions are compared by their shares of elements, energies per atom; the rest is as in :func:`mixed_units`.
    """
    groups: dict[tuple[str, tuple[tuple[int, int], ...]], list[tuple[float, Frame]]] = defaultdict(list)
    for frame in frames:
        if frame.energy is not None and np.isfinite(frame.energy) and len(frame.z) > 1:
            elements, counts = np.unique(frame.z, return_counts=True)
            shares = (counts // np.gcd.reduce(counts)).tolist()
            key = frame.source.rpartition("#")[0], tuple(zip(elements.tolist(), shares, strict=True))
            groups[key].append((frame.energy / len(frame.z), frame))
    problems = []
    for members in groups.values():
        typical = sorted(energy for energy, _ in members)[len(members) // 2]
        for energy, frame in members:
            if abs(energy - typical) < 10:
                continue
            for words, ratio in _RATIOS.items():
                if energy != 0 and abs(typical / energy / ratio - 1) < 0.02:
                    text = f"is {energy:.4g} eV per atom, that of most like it in the file {typical:.4g}: {words}?"
                    problems.append(Problem(frame.source, "energy", text))
    return problems


def mixed_units(frames: Sequence[Frame]) -> list[Problem]:
    """Return a problem for each file whose energies look like another unit than those of the first with the same composition.

    Two files with frames of one composition are compared by their mean energies: a ratio within 2 % of that of two units
    (eV, kcal/mol, kJ/mol, Hartree) and more than 10 eV per atom apart. A difference in the reference method does not do that.
    """
    means: dict[tuple[int, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for frame in frames:
        if frame.energy is not None and np.isfinite(frame.energy) and len(frame.z):
            means[tuple(sorted(frame.z.tolist()))][frame.source.rpartition("#")[0]].append(frame.energy)
    problems: dict[str, Problem] = {}
    for composition, by_file in means.items():
        files = list(by_file)
        first = float(np.mean(by_file[files[0]]))
        for file in files[1:]:
            other = float(np.mean(by_file[file]))
            if abs(other - first) < 10 * len(composition) or first == 0:
                continue
            for words, ratio in _RATIOS.items():
                if abs(first / other / ratio - 1) < 0.02:
                    text = f"energies are {other / first:.4g} times those of {files[0]}: a file in {words}?"
                    problems[file] = Problem(file, "energy", text)
    return list(problems.values())
