r"""Numbers that can hardly be in the unit in which they were read.

Everything here is asked of frames in eV and Å, of one file. Sizes: energies against those of all electrons of the atoms, by the
statistical atom with corrections, :math:`-(0.7687\,Z^{7/3} - Z^2/2 + 0.2699\,Z^{5/3})` Hartree (Schwinger, Phys. Rev. A 24, 2353,
1981); distances against covalent radii. Consistency: between neighbouring frames energies change by −F·Δx and, where cells
change, volume times stress times strain.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
from ase.data import covalent_radii

from forcedrop.structures.cells import complete_cell
from forcedrop.structures.conversion import Conversion
from forcedrop.structures.frame import Frame
from forcedrop.structures.search import PairSearch
from forcedrop.units import ENERGY, LENGTH

MOST = 200
"""So many frames, spread over a file, are looked at."""

SHORT, LONG = 0.7, 1.45
"""Distances of most atoms to their nearest, in units of the sum of covalent radii, below and above which a unit is wrong."""

REACH = 2.2
"""How far the nearest atom is looked for, in the same units."""

LARGE_FORCES, IMPOSSIBLE_FORCES = 15.0, 150.0
"""Root mean square forces of a typical frame [eV/Å] that are questioned, and refused."""

LARGE_STRESS = 1.0
"""Largest stress component of a typical frame [eV/Å³], 160 GPa, that is questioned."""

FURTHEST, LARGEST_STRAIN = 0.35, 0.05
"""Displacement [Å] and strain between frames that count as neighbours."""

_NOBLE = (2, 10, 18, 36, 54, 86)
_PAIRS = 5


@dataclass(frozen=True)
class Question:
    """A number that can hardly be in its unit.

    Attributes:
        about: whose units are in question.
        text: what is strange.
        grave: whether work must not go on, unless all these units were stated.
        always: whether not even then.
    """

    about: tuple[Literal["energy", "length", "forces", "stress"], ...]
    text: str
    grave: bool = True
    always: bool = False


def questions(frames: Sequence[Frame], units: Conversion) -> list[Question]:
    """Return what is strange about the numbers of one file."""
    every = max(1, len(frames) // MOST)
    sample = frames[::every][:MOST]
    found = [*_lengths(sample), *_energies(sample, units), *_forces(sample), *_stress(sample)]
    return found if any(q.about == ("length",) for q in found) else [*found, *_changes(frames)]


def _lengths(frames: Sequence[Frame]) -> Iterator[Question]:
    ratios = [ratio for frame in frames if len(frame) > 1 if (ratio := nearest(frame)) is not None]
    if not ratios:
        return
    short = sum(ratio < SHORT for ratio in ratios) / len(ratios)
    far = sum(ratio > LONG for ratio in ratios) / len(ratios)
    typical = float(np.median([ratio for ratio in ratios if math.isfinite(ratio)] or [math.inf]))
    times = f"{typical:.2f}" if math.isfinite(typical) else f"more than {REACH}"
    text = f"most atoms are {times} times the sum of covalent radii from their nearest"
    if short > 0.5:
        yield Question(("length",), f"{text}: positions in Angstrom read as Bohr, or in nm?", always=True)
    elif far > 0.5:
        several = min(len(frame) for frame in frames) > 3
        yield Question(("length",), f"{text}: positions in Bohr read as Angstrom?", grave=several and far > 0.8)
    elif _mixed(ratios):
        yield Question(
            ("length",), "distances of some frames differ from the others' by the ratio of Bohr and Angstrom", False
        )


def _mixed(ratios: Sequence[float]) -> bool:
    """Return whether some frames, more than a few, are in Bohr and the others in Å."""
    for odd, even in (
        ([r for r in ratios if r < SHORT], [r for r in ratios if r >= SHORT]),
        ([r for r in ratios if r > LONG], [r for r in ratios if r <= LONG]),
    ):
        if len(odd) > max(2, 0.05 * len(ratios)) and even:
            ratio = float(np.median(odd)) / float(np.median(even))
            if any(abs(ratio / bohr - 1) < 0.1 for bohr in (LENGTH["Bohr"], 1 / LENGTH["Bohr"])):
                return True
    return False


def nearest(frame: Frame) -> float | None:
    """Return the median over atoms of the distance to the nearest atom, in units of the sum of both covalent radii.

    It is infinite where most have none within :data:`REACH` such units or 8 Å, and None where noble gases make radii meaningless.
    """
    if np.isin(frame.z, _NOBLE).any() or (frame.z < 1).any() or (frame.z >= len(covalent_radii)).any():
        return None
    radii = covalent_radii[frame.z]
    reach = min(REACH * 2 * float(radii.max()), 8.0)
    pairs = PairSearch(reach, threads=1)(frame.pos, frame.cell, frame.pbc)
    closest = np.full(len(frame), math.inf)
    for atoms in (pairs.i, pairs.j):
        np.minimum.at(closest, atoms, pairs.d / (radii[pairs.i] + radii[pairs.j]))
    return float(np.median(closest))


def all_electrons(z: np.ndarray) -> float:
    """Return the energy of all electrons of atoms that do not interact [eV], to some per cent; see above."""
    charge = z.astype(float)
    return -ENERGY["Hartree"] * float(
        np.sum(0.768745 * charge ** (7 / 3) - 0.5 * charge**2 + 0.26990 * charge ** (5 / 3))
    )


def _energies(frames: Sequence[Frame], units: Conversion) -> Iterator[Question]:
    labelled = [f for f in frames if f.energy is not None and np.isfinite(f.energy) and len(f) and (f.z > 0).all()]
    if not labelled:
        return
    bounds = np.array([all_electrons(f.z) for f in labelled])
    atoms = np.array([len(f) for f in labelled])
    energies = np.array([f.energy for f in labelled], float)
    impossible = (energies < 1.3 * bounds - 50 * atoms) | (energies > 1000 * atoms)
    typical = float(np.median(energies / atoms))
    if impossible.mean() > 0.5:
        yield Question(("energy",), f"energies are {typical:.4g} eV per atom, which no electrons have")
    elif impossible.any():
        yield Question(
            ("energy",), f"{impossible.sum()} energies are beyond what electrons have: two units?", grave=False
        )
    heavy = np.array([(f.z > 4).any() for f in labelled])
    hartree = np.abs(energies * ENERGY["Hartree"] / bounds - 1) < 0.02
    if units.energy.factor == 1.0 and heavy.any() and hartree[heavy].mean() > 0.5:
        yield Question(("energy",), f"energies, {typical:.4g} eV per atom, are those of all electrons in Hartree")


def _forces(frames: Sequence[Frame]) -> Iterator[Question]:
    sizes = [float(np.sqrt(np.mean(f.forces**2))) for f in frames if f.forces is not None and f.forces.size]
    typical = float(np.median(sizes)) if sizes else 0.0
    if typical > LARGE_FORCES:
        text = f"forces of a typical frame are {typical:.3g} eV/Å (root mean square)"
        yield Question(("forces",), text, grave=typical > IMPOSSIBLE_FORCES)


def _stress(frames: Sequence[Frame]) -> Iterator[Question]:
    sizes = [float(np.abs(f.stress).max()) for f in frames if f.stress is not None]
    typical = float(np.median(sizes)) if sizes else 0.0
    if typical > LARGE_STRESS:
        text = f"stress of a typical frame is {typical:.3g} eV/Å³, {typical * 160.2:.3g} GPa: is it in GPa or kbar, or a virial?"
        yield Question(("stress",), text)


def _changes(frames: Sequence[Frame]) -> Iterator[Question]:
    every = max(1, len(frames) // MOST)
    found = [w for k in range(0, len(frames) - 1, every) if (w := work(frames[k], frames[k + 1])) is not None]
    still = [w for w in found if w.stress == 0]
    if len(still) >= _PAIRS:
        (ratio,), (error,) = _slopes(still, ("forces",))
        if abs(ratio - 1) > 0.2 + 2 * error and error < 0.15 * abs(ratio):
            text = f"between neighbouring frames energies change {ratio:.3g} times as much as forces say"
            cause = _cause(ratio, {len(f) for f in frames})
            yield Question(("energy", "forces"), f"{text} ({len(still)} pairs){cause}")
            return
    strained = [w for w in found if w.stress != 0]
    if len(strained) < 2 * _PAIRS:
        return
    (forces, stress), (loose, error) = _slopes(strained, ("forces", "stress"))
    if abs(forces - 1) < 0.25 + 2 * loose and abs(stress - 1) > 0.25 + 2 * error and error < 0.15 * abs(stress):
        text = f"between frames of other cells energies change {stress:.3g} times as much as stress says"
        wrong_sign = "; is its sign that of VASP?" if abs(stress + 1) < 0.25 else ""
        yield Question(("stress",), f"{text} ({len(strained)} pairs){wrong_sign}")


def not_per_bohr(frames: Sequence[Frame]) -> bool:
    """Return whether neighbouring frames say that forces, read as per Bohr, are per Angstrom."""
    found = [w for a, b in pairwise(frames[: 2 * MOST]) if (w := work(a, b)) is not None and w.stress == 0]
    if len(found) < _PAIRS:
        return False
    (ratio,), (error,) = _slopes(found, ("forces",))
    return abs(ratio / LENGTH["Bohr"] - 1) < 0.1 and error < 0.1 * LENGTH["Bohr"]


@dataclass(frozen=True)
class Work:
    """By how much energies of two neighbouring frames differ, and what forces and stress say to that [eV].

    Attributes:
        change: of the energy.
        forces: −F·Δx by the mean of both frames' forces.
        stress: volume times mean stress times strain; 0 where the cell does not change.
        doubt: by how much −F·Δx differs between both frames' forces.
    """

    change: float
    forces: float
    stress: float
    doubt: float


def _slopes(works: Sequence[Work], names: Sequence[Literal["forces", "stress"]]) -> tuple[list[float], list[float]]:
    """Return by what energies change in units of what each of ``names`` says, with standard errors, by weighted least squares."""
    weights = 1 / np.array([math.hypot(w.doubt, 0.1 * (abs(w.forces) + abs(w.stress))) for w in works])
    design = np.array([[getattr(w, name) for name in names] for w in works]) * weights[:, None]
    target = np.array([w.change for w in works]) * weights
    inverse = np.linalg.pinv(design.T @ design)
    slopes = inverse @ design.T @ target
    variance = float(np.sum((target - design @ slopes) ** 2)) / (len(works) - len(names))
    return slopes.tolist(), np.sqrt(variance * np.diag(inverse)).tolist()


def work(a: Frame, b: Frame) -> Work | None:
    """Return what lies between two frames; None where they are no neighbours or lack labels."""
    if a.energy is None or b.energy is None or a.forces is None or b.forces is None or not np.array_equal(a.z, b.z):
        return None
    if not (np.array_equal(a.pbc, b.pbc) and a.forces.shape == b.forces.shape == a.pos.shape == b.pos.shape):
        return None
    moved, strain = b.pos - a.pos, np.zeros((3, 3))
    if a.pbc.any():
        first, second = complete_cell(a.cell, a.pbc), complete_cell(b.cell, b.pbc)
        scaled = b.pos @ np.linalg.inv(second) - a.pos @ np.linalg.inv(first)
        scaled -= np.round(scaled) * a.pbc
        moved = scaled @ (0.5 * (first + second))
        change = np.linalg.inv(first) @ second - np.eye(3)
        strain = 0.5 * (change + change.T)
    largest = float(np.abs(moved).max())
    if not 1e-4 < largest < FURTHEST or np.abs(strain).max() > LARGEST_STRAIN:
        return None
    before, after = -float(np.sum(a.forces * moved)), -float(np.sum(b.forces * moved))
    done = 0.5 * (before + after)
    if done == 0:
        return None
    pressed = 0.0
    if np.abs(strain).max() > 1e-6:
        if a.stress is None or b.stress is None:
            return None
        mean = 0.5 * (a.stress + b.stress)
        pressed = 0.5 * (a.volume + b.volume) * float(mean @ (strain[[0, 1, 2, 1, 0, 0], [0, 1, 2, 2, 2, 1]] * _TWICE))
    return Work(b.energy - a.energy, done, pressed, abs(before - after))


_TWICE = np.array([1.0, 1.0, 1.0, 2.0, 2.0, 2.0])


def _cause(ratio: float, atoms: set[int]) -> str:
    """Return what makes energies change so many times as much as forces say."""
    causes = {
        -1.0: "they are gradients",
        1 / LENGTH["Bohr"]: "forces are per Bohr",
        LENGTH["Bohr"]: "forces are not per Bohr",
    }
    if len(atoms) == 1:
        causes[1 / atoms.pop()] = "energies are per atom"
    for name, factor in ENERGY.items():
        if "m" in name[0] or factor == 1.0:
            continue
        causes[1 / factor] = f"energies are in {name}, or forces are not"
        causes[factor] = f"forces are in {name}, energies are not"
        causes[factor / LENGTH["Bohr"]] = f"forces are in {name}/Bohr, energies are not in {name}"
    fitting = [cause for value, cause in causes.items() if abs(ratio / value - 1) < 0.07]
    return f"; perhaps {' or '.join(fitting)}" if fitting else ""
