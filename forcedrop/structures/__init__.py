"""Structures with labels: read, check, convert units, store.

The names below are the menu; each is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from forcedrop.menus import lazily

if TYPE_CHECKING:
    from forcedrop.structures.checks import BadFrames, Problem, check_frames
    from forcedrop.structures.frame import Frame
    from forcedrop.structures.isolated import is_isolated_atom, isolated_energies
    from forcedrop.structures.labels import LabelKeys
    from forcedrop.structures.pymatgen_io import frames_from_pymatgen
    from forcedrop.structures.readers import frames_from_atoms, read_checked, read_frames
    from forcedrop.structures.reading import Reading
    from forcedrop.structures.store import FrameStore
    from forcedrop.structures.writers import write_frames

_MENU = {
    "BadFrames": "forcedrop.structures.checks",
    "Frame": "forcedrop.structures.frame",
    "FrameStore": "forcedrop.structures.store",
    "LabelKeys": "forcedrop.structures.labels",
    "Problem": "forcedrop.structures.checks",
    "Reading": "forcedrop.structures.reading",
    "check_frames": "forcedrop.structures.checks",
    "frames_from_atoms": "forcedrop.structures.readers",
    "frames_from_pymatgen": "forcedrop.structures.pymatgen_io",
    "is_isolated_atom": "forcedrop.structures.isolated",
    "isolated_energies": "forcedrop.structures.isolated",
    "read_checked": "forcedrop.structures.readers",
    "read_frames": "forcedrop.structures.readers",
    "write_frames": "forcedrop.structures.writers",
}

__all__ = [
    "BadFrames",
    "Frame",
    "FrameStore",
    "LabelKeys",
    "Problem",
    "Reading",
    "check_frames",
    "frames_from_atoms",
    "frames_from_pymatgen",
    "is_isolated_atom",
    "isolated_energies",
    "read_checked",
    "read_frames",
    "write_frames",
]

__getattr__ = lazily(__name__, _MENU)
