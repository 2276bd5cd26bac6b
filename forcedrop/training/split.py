"""What is held out: whole units of frames that must not be parted, such as copies of a structure or a piece of a trajectory."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase.data import chemical_symbols

from forcedrop.structures import Frame
from forcedrop.structures.copies import NEAR, REACH, Signature, copies
from forcedrop.structures.sequences import SHORTEST, Run, runs

FEWEST_BLOCKS = 50
"""Of a long sequence; of a short one blocks are of five frames."""


@dataclass(frozen=True)
class Unit:
    """Frames that stay together.

    Attributes:
        frames: indices of different structures.
        copies: indices of copies of them.
    """

    frames: list[int]
    copies: list[int]


def make_units(
    frames: Sequence[Frame], signed: Sequence[Signature], how: str, shares: Sequence[float]
) -> tuple[list[Unit], list[str]]:
    """Return the units of frames, in their order, and words on what was found.

    Args:
        frames: in the order of their files.
        signed: their signatures.
        how: ``random`` (every structure is a unit), ``blocks`` (pieces of whatever stands together) or ``auto`` (of sequences).
        shares: that will be held out.
    """
    first = copies(frames, signed)
    words = []
    if n_copies := int((first != np.arange(len(frames))).sum()):
        words.append(
            f"{n_copies} of {len(frames)} frames are copies of others (no distance within {REACH:g} Å differs by {NEAR:g} Å): "
            "they stay on one side of the split, and count once where they are held out"
        )
    behind: dict[int, list[int]] = {}
    for index, other in enumerate(first.tolist()):
        behind.setdefault(other, []).append(index)
    units = []
    for run in runs(frames, signed):
        own = [k for k in range(run.first, run.stop) if first[k] == k]
        length = _block_length(len(own), shares) if _in_blocks(run, how) else 1
        words += _words(run, how, length, frames)
        for start in range(0, len(own), length):
            piece = own[start : start + length]
            units.append(Unit(piece, [other for k in piece for other in behind[k][1:]]))
    return units, words


def _in_blocks(run: Run, how: str) -> bool:
    return run.in_sequence if how == "auto" else how == "blocks" and len(run) >= SHORTEST


def _block_length(n: int, shares: Sequence[float]) -> int:
    """Return of how many frames a block is: not more than the smallest share, many blocks of a long sequence."""
    share = min((share for share in shares if share), default=0.1)
    return max(1, min(round(share * n), max(5, n // FEWEST_BLOCKS)))


def _words(run: Run, how: str, length: int, frames: Sequence[Frame]) -> list[str]:
    file, _, number = frames[run.first].source.rpartition("#")
    if len(run) < SHORTEST or not (run.in_sequence or length > 1):
        return []
    what = f"{file or '<memory>'}: {len(run)} frames from #{number} on"
    if run.in_sequence:
        what += f" come in sequence (neighbours have a correlation of {run.correlation:.2f})"
    if length > 1:
        return [
            f"{what}: held out in blocks of {length}"
            + ("; `data.split: random` draws single frames" if how == "auto" else "")
        ]
    if how == "random":
        return [f"{what}: held out one by one (`data.split: random`), they are judged by their neighbours' answers"]
    return []


def hold_out(
    units: Sequence[Unit], share: float, generator: torch.Generator, frames: Sequence[Frame]
) -> tuple[list[Unit], list[Unit]]:
    """Draw units for a share of the structures; the last of the units with an element is never taken.

    Returns:
        the units that are left, and those that were drawn.

    Raises:
        ValueError: if there are too few.
    """
    n = sum(len(unit.frames) for unit in units)
    count = max(1, round(share * n)) if share else 0
    if n - count < 1 or (count and len(units) < 2):
        raise ValueError(f"{n} different structures are too few to hold out a share of {share:g}")
    order = torch.randperm(len(units), generator=generator).tolist()
    elements = [{int(z) for k in unit.frames for z in frames[k].z} for unit in units]
    holders = Counter(z for own in elements for z in own)
    held: list[int] = []
    taken = 0
    for index in order:
        size = len(units[index].frames)
        if taken >= count or len(held) == len(units) - 1:
            break
        if taken and abs(taken + size - count) > count - taken:
            continue
        if any(holders[z] == 1 for z in elements[index]):
            continue
        holders.subtract(elements[index])
        held.append(index)
        taken += size
    if count and not held:
        raise ValueError(
            "no structure can be held out: each is the only one with some element; give `data.validation` and `data.calibration`"
        )
    chosen = set(held)
    return [u for k, u in enumerate(units) if k not in chosen], [units[k] for k in sorted(chosen)]


def rare(units: Sequence[Unit], frames: Sequence[Frame]) -> list[str]:
    """Say which elements are in one structure to train on alone.

    Args:
        units: that train.
        frames: of which their indices are.
    """
    holders: dict[int, list[int]] = defaultdict(list)
    for k in (k for unit in units for k in unit.frames):
        for z in set(frames[k].z.tolist()):
            holders[z].append(k)
    if sum(len(unit.frames) for unit in units) < 2:
        return []
    alone = [f"{chemical_symbols[z]} ({frames[own[0]].source})" for z, own in sorted(holders.items()) if len(own) == 1]
    if not alone:
        return []
    names = ", ".join(alone[:6]) + (f" and {len(alone) - 6} more" if len(alone) > 6 else "")
    return [
        f"warning: one structure to train on is all there is of {names}: it was not held out, and no error bar of them is tested"
    ]
