"""What a killed run needs to go on: written atomically at every recorded step, after all else of that step is on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import nn

from forcedrop.door import Refused, door, short
from forcedrop.files import load_tensors, save_tensors
from forcedrop.structures.search import check_geometry

FORMAT = 1
FASTEST = 1e9
"""Largest momentum of an atom, in ASE's units: far beyond anything that dynamics can follow."""
FREE = ("steps",)
"""Settings that may change on resuming: a run may be made longer."""


@dataclass(frozen=True)
class Restart:
    """A moment of a run.

    Attributes:
        settings: plain values that decide what the run computes.
        step: the moment.
        positions: [Å], shape (N, 3).
        momenta: in ASE's units, shape (N, 3).
        cell: [Å], shape (3, 3).
        dynamics: of the thermostat and barostat.
        recorder: how far the files go.
        guard: of the guard, None without.
        stopped: whether the guard ended the run here.
    """

    settings: dict[str, Any]
    step: int
    positions: np.ndarray
    momenta: np.ndarray
    cell: np.ndarray
    dynamics: dict[str, Any]
    recorder: dict[str, Any]
    guard: dict[str, Any] | None
    stopped: bool = False

    def save(self, path: Path) -> None:
        """Write it; a reader finds the old moment or this one."""
        arrays = {name: torch.tensor(getattr(self, name)) for name in ("positions", "momenta", "cell")}
        plain = {name: value for name, value in vars(self).items() if name not in arrays}
        save_tensors({"restart_format": FORMAT, **arrays, "json": json.dumps(plain)}, path)

    @classmethod
    def load(cls, path: Path) -> Restart:
        """Read it.

        Raises:
            ValueError: if the file is not a restart file, or does not hold what it should; the message names it.
        """
        values = load_tensors(path)
        if values.get("restart_format") != FORMAT:
            raise ValueError(f"{path} is not a restart file of format {FORMAT}")
        with door(path):
            arrays = {name: values[name].numpy() for name in ("positions", "momenta", "cell")}
            found = cls(**json.loads(values["json"]), **arrays)
            found._check()
        return found

    def _check(self) -> None:
        """Check that everything is of the right kind and shape, and finite.

        Raises:
            Refused: naming what is wrong.
        """
        kinds = {
            "settings": dict,
            "step": int,
            "dynamics": dict,
            "recorder": dict,
            "guard": dict | None,
            "stopped": bool,
        }
        for name, kind in kinds.items():
            if not isinstance(getattr(self, name), kind) or (kind is int and isinstance(getattr(self, name), bool)):
                raise Refused(f"`{name}` cannot be {short(getattr(self, name))}")
        n = len(self.settings["numbers"])
        shapes = {"positions": (n, 3), "momenta": (n, 3), "cell": (3, 3)}
        for name, shape in shapes.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype.kind != "f":
                raise Refused(f"`{name}` must be numbers of shape {shape}, got {array.dtype} of shape {array.shape}")
        check_geometry(self.positions, self.cell)
        if n and not np.abs(self.momenta).max() <= FASTEST:
            raise Refused(f"`momenta` are not finite, or beyond {FASTEST:g}")
        counts = [self.step, *(self.recorder[name] for name in ("csv", "xyz", "frames", "flagged"))]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise Refused(f"steps and lengths of files must not be negative, got {short(counts)}")
        if not all(abs(number) <= FASTEST for number in _numbers([self.dynamics, self.recorder["first"]])):
            raise Refused(f"the thermostat, the barostat or the first energies are not finite, or beyond {FASTEST:g}")

    def require(self, settings: dict[str, Any], moved: bool = False) -> None:
        """Check that a run may go on from here.

        Args:
            settings: of now.
            moved: whether the atoms are those that the run itself has moved to this moment.

        Raises:
            ValueError: for another start structure, or naming the first setting that differs, with both values.
        """
        before, now = _flat(self.settings), _flat(json.loads(json.dumps(settings)))
        if before.get("numbers") != now.get("numbers"):
            raise ValueError("cannot resume: the run started from a structure of other atoms")
        if before.get("start", now["start"]) != now["start"] and not moved:
            raise ValueError(
                "cannot resume: the run started from another structure of the same atoms, or from another frame"
            )
        before["start"] = now["start"]
        for name in dict.fromkeys([*before, *now]):
            old, new = before.get(name, "absent"), now.get(name, "absent")
            if name not in FREE and old != new:
                raise ValueError(f"cannot resume: `{name}` was {old}, now it is {new}")
        if now["steps"] < self.step:
            raise ValueError(f"cannot resume: the run is at step {self.step} already, asked for {now['steps']}")

    def apply(self, atoms: Atoms) -> None:
        """Put the atoms where they were."""
        atoms.set_cell(self.cell, scale_atoms=False)
        atoms.set_positions(self.positions, apply_constraint=False)
        atoms.set_momenta(self.momenta, apply_constraint=False)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return nested settings by dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(value, f"{before}{name}.") if isinstance(value, dict) else {before + name: value}
    return found


def _numbers(values: Any) -> Iterator[float]:
    """Yield every number in nested lists and dictionaries."""
    if isinstance(values, dict | list):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _numbers(value)
    elif isinstance(values, int | float):
        yield values


def fingerprint(network: nn.Module) -> str:
    """Return a short hash of the weights, so that a run is not resumed with another model."""
    digest = hashlib.sha256()
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
