"""How what is found while reading reaches people: to a command's output, or as a warning."""

from __future__ import annotations

import warnings
from collections.abc import Callable

from forcedrop.structures.checks import BadFrames
from forcedrop.structures.frame import Frame
from forcedrop.structures.labels import Labelled

Tell = Callable[[str], None]


def say(found: Labelled, tell: Tell | None) -> None:
    """Hand notes and doubts to ``tell``; without it, warn of the doubts."""
    if tell is not None:
        for text in (*found.notes, *found.doubts):
            tell(text)
    else:
        for text in found.doubts:
            warnings.warn(text, stacklevel=4)


def accepted(found: Labelled) -> list[Frame]:
    """Return the frames, having warned of doubts.

    Raises:
        BadFrames: for labels that are none.
    """
    if found.problems:
        raise BadFrames(found.problems)
    say(found, None)
    return found.frames
