"""What the loop knows, on disk: whatever is written appears whole or not at all, so that a kill at any moment costs only time.

The folder::

    lock                    held by the loop that runs
    loop.json               what the labels are: oracle and settings
    config.yaml             all settings of the last start
    labels.h5               every labelled frame, with its origin in ``info``
    journal.jsonl           a line for every attempt at a label that was started
    audit.csv rounds.csv    tables, written anew from the rest after every stage
    rounds/001/             round 1; round 0 labels the start frames
        roles.json train.h5 validation.h5 calibration.h5
                            what each label of the round is for, from then on
        model/  model-1/    the training; further members of a committee
        runs/               one folder a trajectory
        picks.h5            the frames that were chosen
        labels/KEY.json     the label of each, or why there is none
        judged.h5           the labelled ones with what the model of the round had predicted, σ of every atom included
        train.json explore.json pick.json label.json judge.json append.json
                            written at the end of each stage: a stage whose file is there is over
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from forcedrop.door import Refused, door, short
from forcedrop.files import append_bytes, remove_parts, write_text
from forcedrop.structures import Frame, FrameStore, write_frames

DECIMALS = 6
"""Of the positions [Å] that tell frames apart."""


def frame_key(frame: Frame) -> str:
    """Return what identifies a structure: a hash of its elements, cell, periodic directions and positions to 1e-6 Å."""
    digest = hashlib.sha256()
    digest.update(np.asarray(frame.z, np.int64).tobytes())
    digest.update(np.asarray(frame.pbc, bool).tobytes())
    for lengths in (frame.cell, frame.pos):
        rounded = np.round(np.asarray(lengths, np.float64), DECIMALS) + 0.0  # −0 is 0
        digest.update(rounded.tobytes())
    return digest.hexdigest()[:20]


def write_json(path: Path, values: Any) -> None:
    """Write plain values, atomically."""
    write_text(path, json.dumps(values, indent=1, ensure_ascii=False), shared=True)


def read_json(path: Path) -> Any:
    """Return what :func:`write_json` wrote, or None if there is nothing.

    Raises:
        ValueError: naming the file, if it is not JSON, or later, if something is looked for that it lacks.
    """
    if not path.exists():
        return None
    with door(path):
        return json.loads(path.read_text(encoding="utf-8"), object_hook=lambda values: _Record(values, path))


class _Record(dict[str, Any]):
    """Names and values from a file, which an error about a missing one names."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, name: str) -> Any:
        raise Refused(f"{self._path} lacks {short(name)}: is it damaged?")


class Journal:
    """Lines that are only ever added, each on disk before the call returns.

    Args:
        path: the file; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, **values: Any) -> None:
        """Add a line."""
        torn = self.path.exists() and self.path.stat().st_size > 0 and self.path.read_bytes()[-1:] != b"\n"
        line = ("\n" if torn else "") + json.dumps({"time": round(time.time(), 3), **values}) + "\n"
        append_bytes(self.path, line.encode(), sync=True)

    def read(self) -> list[dict[str, Any]]:
        """Return all lines; one that a kill cut in two is left out."""
        found = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if self.path.exists() else []:
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(values, dict):
                found.append(values)
        return found


class State:
    """The folder, see the module's page.

    Args:
        folder: made if missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.journal = Journal(folder / "journal.jsonl")

    @property
    def store(self) -> Path:
        """The file of the labelled frames."""
        return self.folder / "labels.h5"

    def round(self, number: int) -> Path:
        """Return the folder of a round."""
        return self.folder / "rounds" / f"{number:03d}"

    def result(self, number: int, stage: str) -> Any:
        """Return what a stage left at its end; None if it is not over.

        Raises:
            ValueError: naming the file, if it holds anything but names and values.
        """
        path = self.round(number) / f"{stage}.json"
        return _named(read_json(path), path)

    def finish(self, number: int, stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
        """Note that a stage is over, and what it found."""
        write_json(self.round(number) / f"{stage}.json", dict(values))
        return dict(values)

    def rounds(self) -> list[int]:
        """Return the numbers of the rounds that have begun."""
        folder = self.folder / "rounds"
        return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []

    def frames(self) -> list[Frame]:
        """Return every labelled frame."""
        if not self.store.exists():
            return []
        with FrameStore(self.store) as store:
            frames: list[Frame] = store[:]
        return frames

    def append(self, frames: Iterable[Frame]) -> int:
        """Add labelled frames to the store, but those it holds already; return how many it holds then."""
        before = self.frames()
        known = {frame_key(frame) for frame in before}
        new = {frame_key(frame): frame for frame in frames}
        fresh = [frame for key, frame in new.items() if key not in known]
        if fresh:  # whole: HDF5 opens, makes and changes a file in several steps
            write_frames(self.store, [*before, *fresh], provenance={"what": "active learning"})
        return len(before) + len(fresh)

    def clean(self) -> None:
        """Remove what a kill left half written."""
        remove_parts(self.folder)

    def records(self, number: int) -> dict[str, dict[str, Any]]:
        """Return the labels of a round, and the failures, by key."""
        paths = sorted((self.round(number) / "labels").glob("[!.]*.json"))
        found = [_named(read_json(path), path) for path in paths]
        return {str(record["key"]): record for record in found}

    def has_labels(self) -> bool:
        """Return whether anything has got a label."""
        records = (record for number in self.rounds() for record in self.records(number).values())
        return bool(self.frames()) or any(record.get("status") == "labelled" for record in records)

    def tried(self) -> set[str]:
        """Return the keys of all structures that were labelled, or could not be."""
        keys = {frame_key(frame) for frame in self.frames()}
        return keys.union(*(self.records(number) for number in self.rounds()))


def _named(values: Any, path: Path) -> Any:
    """Return values that must have names, or None."""
    if values is not None and not isinstance(values, dict):
        raise Refused(f"{path} must hold names and values, got {short(values)}")
    return values
