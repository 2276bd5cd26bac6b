"""Which frames come in sequence, such as those of a trajectory: neighbours in the file are more alike than any two are.

Held out one by one, such a frame is tested by the answers of its neighbours, which trained. It has to be held out with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from forcedrop.structures.copies import Signature
from forcedrop.structures.frame import Frame

SHORTEST = 10
"""Frames below which nothing is called a sequence."""
ALIKE = 0.5
"""Correlation of neighbouring frames from which on they come in sequence."""


class Run(NamedTuple):
    """Frames of the same atoms that stand together in a file.

    Attributes:
        first: index of the first.
        stop: index behind the last.
        correlation: of neighbouring frames, mean over what describes their atoms: near 0 where their order is random, near 1
            where each is almost the one before.
    """

    first: int
    stop: int
    correlation: float

    @property
    def in_sequence(self) -> bool:
        """Whether neighbours are more alike than chance makes them."""
        n = len(self)
        return n >= SHORTEST and self.correlation > max(ALIKE, 2.5 / float(np.sqrt(n)))

    def __len__(self) -> int:
        return self.stop - self.first


def runs(frames: Sequence[Frame], signed: Sequence[Signature]) -> list[Run]:
    """Return the runs of frames of the same atoms, in the same order, from one file; all frames are in one.

    Args:
        frames: in the order of their files.
        signed: their signatures.
    """
    keys = [(frame.source.rpartition("#")[0], own.kind, own.order) for frame, own in zip(frames, signed, strict=True)]
    starts = [k for k in range(len(keys)) if k == 0 or keys[k] != keys[k - 1]]
    return [
        Run(first, stop, correlation(signed[first:stop]))
        for first, stop in zip(starts, [*starts[1:], len(keys)], strict=True)
    ]


def correlation(signed: Sequence[Signature]) -> float:
    r"""Return the correlation of neighbouring structures of the same atoms.

    1 − Σ (x_{k+1} − x_k)² / 2 Σ (x_k − x̄)², von Neumann's ratio, of what each atom has of neighbours, mean over all that varies.
    """
    if len(signed) < SHORTEST:
        return 0.0
    x = np.stack([own.sums.ravel() for own in signed])
    spread = x.std(axis=0)
    x = x[:, spread > 1e-6 * max(float(spread.max()), 1e-3)]
    if not x.size:
        return 0.0
    steps, whole = np.square(np.diff(x, axis=0)).mean(axis=0), np.square(x - x.mean(axis=0)).mean(axis=0)
    return float(np.mean(1 - steps / (2 * whole)))


def halves(frames: Sequence[Frame], signed: Sequence[Signature]) -> tuple[list[int], list[int]]:
    """Return the indices of two halves: every other frame, of a sequence every other quarter.

    Args:
        frames: none a copy of another.
        signed: their signatures.
    """
    second = np.arange(len(frames)) % 2 == 1
    for run in runs(frames, signed):
        if run.in_sequence:
            second[run.first : run.stop] = np.arange(len(run)) * 4 // len(run) % 2 == 1
    return np.flatnonzero(~second).tolist(), np.flatnonzero(second).tolist()
