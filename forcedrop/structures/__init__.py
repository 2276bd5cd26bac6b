"""Structures with labels: read, check, convert units, store."""

from forcedrop.structures.checks import BadFrames, Problem, check_frames
from forcedrop.structures.frame import Frame
from forcedrop.structures.isolated import isolated_energies
from forcedrop.structures.pymatgen_io import frames_from_pymatgen
from forcedrop.structures.readers import LabelKeys, frames_from_atoms, read_checked, read_frames
from forcedrop.structures.store import FrameStore
from forcedrop.structures.writers import write_frames

__all__ = [
    "BadFrames",
    "Frame",
    "FrameStore",
    "LabelKeys",
    "Problem",
    "check_frames",
    "frames_from_atoms",
    "frames_from_pymatgen",
    "isolated_energies",
    "read_checked",
    "read_frames",
    "write_frames",
]
