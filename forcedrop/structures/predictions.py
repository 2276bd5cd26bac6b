"""Which of a frame's labels are a model's own predictions, and what may be done with them.

Files of dynamics and of ``forcedrop predict`` hold predictions where other programs look for energies and forces. Each frame
says so in ``info["forcedrop_predicted"]``, with numbers, so that a frame that was labelled anew is known, whoever copied the
note: ``energy E; forces I Fx Fy Fz; stress xx yy zz yz xz xy`` in eV and Å, of the atom I with the largest force.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from forcedrop.structures.frame import Frame
from forcedrop.units import ENERGY

MARK = "forcedrop_predicted"
"""The key of the note."""

LABELS = ("energy", "forces", "stress")
Use = Literal["refuse", "drop", "keep"]
"""What to do with predictions in the place of labels: an error, reading the structures alone, or taking them for labels."""

_ROUNDING = 1e-7
"""Of a component in a text file [eV/Å, eV/Å³]."""


class PredictedLabels(ValueError):
    """Predictions were about to be taken for labels."""


def mark(frame: Frame) -> Frame:
    """Return a frame whose labels are predictions with the note that says so."""
    parts = []
    if frame.energy is not None:
        parts.append(f"energy {float(frame.energy)!r}")
    if frame.forces is not None:
        index = int(np.argmax(np.linalg.norm(frame.forces, axis=1)))
        parts.append(f"forces {index} {_text(frame.forces[index])}")
    if frame.stress is not None:
        parts.append(f"stress {_text(frame.stress)}")
    return replace(frame, info={**frame.info, MARK: "; ".join(parts)})


def predicted(frame: Frame) -> tuple[str, ...]:
    """Return which labels of a frame are predictions.

    Without the note, of files of versions that wrote none: all of them, if the energy is that of the dynamics (``potential_eV``)
    or of the model (``forcedrop_energy``) beside it, or stands beside its own error bar.
    """
    have = tuple(name for name in LABELS if getattr(frame, name) is not None)
    note = frame.info.get(MARK)
    if note is not None:
        noted = _parsed(str(note))
        return tuple(name for name in have if name in noted and _same(name, frame, noted[name]))
    if frame.energy is None:
        return ()
    own = frame.info.get("potential_eV", frame.info.get("forcedrop_energy") if len(frame) > 1 else None)
    if own is not None:
        return have if _same_energy(frame.energy, float(own)) else ()
    beside = {"energy_uncertainty", "energy_std"} & set(frame.info) and "forcedrop_energy" not in frame.info
    return have if beside else ()


def only_labels(frames: Sequence[Frame], use: Use = "refuse") -> list[Frame]:
    """Return frames whose labels are labels, in the way that ``use`` says.

    Raises:
        PredictedLabels: naming each file and the number of its frames, if ``use`` is ``refuse`` and there are any.
    """
    if use == "keep":
        return list(frames)
    found = [predicted(frame) for frame in frames]
    if use == "refuse" and any(found):
        raise PredictedLabels(_refusal(frames, found))
    return [_without(frame, names) for frame, names in zip(frames, found, strict=True)]


def _without(frame: Frame, names: Iterable[str]) -> Frame:
    if not names:
        return frame
    info = {name: value for name, value in frame.info.items() if name != MARK}
    kept: dict[str, Any] = dict.fromkeys(names)
    return replace(frame, info=info, **kept)


def _refusal(frames: Sequence[Frame], found: Sequence[tuple[str, ...]]) -> str:
    files = [frame.source.rpartition("#")[0] or frame.source for frame in frames]
    total, own = Counter(files), Counter(file for file, names in zip(files, found, strict=True) if names)
    names = [name for name in LABELS if any(name in some for some in found)]
    where = "; ".join(f"{file}: {own[file]} of {total[file]} frames" for file in own)
    return (
        f"{where} hold predictions of a model ({', '.join(names)}) where labels belong. Label the frames with the reference "
        "method; to take predictions for labels after all: --predictions-as-labels, or `predictions_as_labels: true` in the file"
    )


def _text(values: Any) -> str:
    return " ".join(repr(float(value)) for value in values)


def _parsed(note: str) -> dict[str, list[float]]:
    """Return the numbers of a note by label; what cannot be read counts as any number."""
    noted: dict[str, list[float]] = {}
    for part in note.split(";"):
        name, *numbers = part.split() or [""]
        try:
            noted[name] = [float(number) for number in numbers]
        except ValueError:
            noted[name] = []
    return noted


def _same(name: str, frame: Frame, noted: list[float]) -> bool:
    """Return whether a label is the noted prediction; a note without numbers says that it is."""
    if not noted:
        return True
    if name == "energy":
        return _same_energy(float(getattr(frame, name)), noted[0])
    values = np.asarray(getattr(frame, name), float)
    if name == "forces":
        index, noted = int(noted[0]), noted[1:]
        if not 0 <= index < len(values):
            return False
        values = values[index]
    return values.shape == (len(noted),) and bool(np.allclose(values, noted, rtol=1e-6, atol=_ROUNDING))


def _same_energy(energy: float, own: float) -> bool:
    """Return whether two energies are one [eV], also if a file of eV was read in another unit."""
    return any(abs(energy - own * factor) <= 2e-8 + 1e-12 * abs(own * factor) for factor in ENERGY.values())
