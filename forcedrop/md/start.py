"""What dynamics can start from: settings and structures that cannot run are refused in words before the first step."""

from __future__ import annotations

import hashlib
import json
import math

import numpy as np
from ase import Atoms

from forcedrop.md.ensembles import IN_DYNAMICS, NPT, NVE, NVT, Ensemble
from forcedrop.structures.constraints import described


def check_settings(ensemble: Ensemble, temperature: float, timestep: float, steps: int, record_every: int) -> None:
    """Refuse settings that dynamics cannot run with.

    Args:
        ensemble: what is kept constant.
        temperature: [K].
        timestep: [fs].
        steps: number of steps.
        record_every: steps between records.

    Raises:
        ValueError: naming the setting, its value and what it must be.
    """
    if steps < 1 or record_every < 1 or not (timestep > 0 and math.isfinite(timestep)):
        raise ValueError(f"steps, record_every and timestep must be positive, got {steps}, {record_every}, {timestep}")
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ValueError(f"the temperature must not be negative [K], got {temperature}")
    if isinstance(ensemble, NVT) and not (ensemble.friction > 0 and math.isfinite(ensemble.friction)):
        raise ValueError(
            f"the friction of NVT must be positive [1/fs], got {ensemble.friction}; NVE is dynamics without friction"
        )
    if isinstance(ensemble, NPT):
        if temperature == 0:
            raise ValueError("NPT needs a temperature above 0 K: its thermostat and barostat are made of it, got 0 K")
        for name in ("thermostat_time", "barostat_time"):
            value = getattr(ensemble, name)
            if not (value > 0 and math.isfinite(value)):
                raise ValueError(f"`{name}` of NPT must be positive [fs], got {value}")
        if not math.isfinite(ensemble.pressure):
            raise ValueError(f"the pressure must be a number [GPa], got {ensemble.pressure}")


def check_start(atoms: Atoms, ensemble: Ensemble, temperature: float, draw: bool) -> None:
    """Refuse a structure that dynamics cannot start from.

    Args:
        atoms: the start.
        ensemble: what is kept constant.
        temperature: [K].
        draw: whether velocities will be drawn; else the atoms must have them.

    Raises:
        ValueError: for constraints that would not be obeyed, atoms none of which can move, velocities that are asked for and not
            there, or NPT of one atom, of constrained ones, or of what is not periodic.
    """
    unknown = sorted({type(c).__name__ for c in atoms.constraints if not isinstance(c, IN_DYNAMICS)})
    if unknown:
        known = ", ".join(kind.__name__ for kind in IN_DYNAMICS)
        raise ValueError(
            f"dynamics would not obey the constraint {', '.join(unknown)} of the start structure; take it away, or use {known}"
        )
    if isinstance(ensemble, NPT):
        if not atoms.pbc.all():
            raise ValueError(
                f"NPT needs a structure that is periodic in all directions, got pbc = {atoms.pbc.tolist()}"
            )
        if atoms.constraints:
            kinds = ", ".join(sorted({type(constraint).__name__ for constraint in atoms.constraints}))
            raise ValueError(
                f"NPT scales the positions of all atoms with the cell and would not obey the constraints of the start structure "
                f"({kinds}); use NVT, or take them away"
            )
        if len(atoms) < 2:
            raise ValueError(
                "NPT needs at least two atoms: one has no motion of its own; repeat the cell (--repeat 2 2 2)"
            )
    if atoms.get_number_of_degrees_of_freedom() < 1:
        raise ValueError("the constraints of the start structure hold all atoms: nothing can move")
    if not draw:
        _check_velocities(atoms, temperature)
    elif len(atoms) == 1 and isinstance(ensemble, NVE) and temperature > 0 and not atoms.constraints:
        raise ValueError(
            "one atom alone has no velocity without drift and would stay at 0 K in NVE; use NVT, or repeat the cell"
        )


def _check_velocities(atoms: Atoms, temperature: float) -> None:
    if not atoms.has("momenta"):
        others = [name for name in atoms.arrays if name.lower().startswith(("vel", "mom"))]
        beside = f" (of unknown unit: {', '.join(others)})" if others else ""
        raise ValueError(
            f"the start structure has no velocities to keep{beside}; they are read from `momenta`, in ASE's units. Without "
            "--keep-velocities they are drawn at the temperature"
        )
    momenta = atoms.get_momenta()
    if not np.isfinite(momenta).all():
        raise ValueError(f"the velocity of atom {int(np.argwhere(~np.isfinite(momenta))[0, 0])} is no number")
    if temperature > 0 and not momenta.any():
        raise ValueError(
            "all velocities of the start structure are 0: it would start at 0 K; without --keep-velocities they are drawn at the "
            "temperature"
        )


def start_digest(atoms: Atoms, with_velocities: bool) -> str:
    """Return a short hash of what a run starts from: cell, positions, masses, constraints and, if they are kept, velocities."""
    digest = hashlib.sha256()
    parts = [atoms.numbers, np.asarray(atoms.pbc), atoms.cell.array, atoms.get_positions(), atoms.get_masses()]
    for values in [*parts, *([atoms.get_momenta()] if with_velocities else [])]:
        digest.update(np.ascontiguousarray(values).tobytes())
    if atoms.constraints:
        digest.update(json.dumps(described(atoms), sort_keys=True).encode())
    return digest.hexdigest()[:16]
