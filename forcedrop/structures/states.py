"""What decides an energy besides elements and positions, and is not seen by a network: total charge and spin."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from ase.symbols import Symbols

from forcedrop.structures.frame import Frame
from forcedrop.structures.names import plain

_STATES = {
    "charge": "charge", "totalcharge": "charge", "netcharge": "charge", "spin": "spin", "totalspin": "spin",
    "multiplicity": "spin", "spinmultiplicity": "spin", "uhf": "spin", "unpairedelectrons": "spin",
}  # fmt: skip


def unseen_states(frames: Sequence[Frame]) -> str | None:
    """Return a sentence if frames of one composition are of several charges or spins.

    A network takes them for points on one surface, and their mean for the truth.

    Args:
        frames: with ``charge``, ``spin`` … in their ``info``, as far as the file says so.
    """
    seen: dict[tuple[bytes, str], set[float]] = {}
    for frame in frames:
        for name, value in frame.info.items():
            if (state := _STATES.get(plain(name))) and isinstance(value, int | float | np.number):
                seen.setdefault((np.sort(frame.z).tobytes(), name), set()).add(float(value))
                if len(values := seen[np.sort(frame.z).tobytes(), name]) > 1:
                    first, second, *_ = sorted(values)
                    return (
                        f"frames of {Symbols(frame.z).get_chemical_formula()} have `{name}` {first:g} and {second:g}: a network "
                        f"does not see the {state}, and takes all for one energy surface; train on each alone"
                    )
    return None
