"""Ensembles: what dynamics keeps constant, and what must be kept to go on with it later."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from ase import Atoms, units
from ase.constraints import (
    FixAtoms,
    FixBondLengths,
    FixCartesian,
    FixCom,
    FixedLine,
    FixedPlane,
    FixLinearTriatomic,
    Hookean,
)
from ase.md.andersen import Andersen
from ase.md.bussi import Bussi
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.nvtberendsen import NVTBerendsen
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta
from ase.md.verlet import VelocityVerlet

from forcedrop.units import GPA


@dataclass(frozen=True)
class NVE:
    """Velocity Verlet at constant energy."""

    conserves_energy: ClassVar[bool] = True

    def dynamics(
        self, atoms: Atoms, timestep: float, temperature: float, rng: np.random.Generator
    ) -> MolecularDynamics:
        """Return the integrator."""
        return VelocityVerlet(atoms, timestep * units.fs)

    def state(self, dynamics: Any) -> dict[str, Any]:
        """Return what the integrator knows beyond positions, cell and momenta: nothing."""
        return {}

    def restore(self, dynamics: Any, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""


@dataclass(frozen=True)
class NVT:
    """Langevin dynamics.

    Attributes:
        friction: [1/fs].
    """

    conserves_energy: ClassVar[bool] = False

    friction: float = 0.01

    def dynamics(
        self, atoms: Atoms, timestep: float, temperature: float, rng: np.random.Generator
    ) -> MolecularDynamics:
        """Return the integrator; the centre of mass moves as it likes (its drift is not a force of the model)."""
        return Langevin(
            atoms,
            timestep * units.fs,
            temperature_K=temperature,
            friction=self.friction / units.fs,
            rng=rng,
            fixcm=False,
        )

    def state(self, dynamics: Any) -> dict[str, Any]:
        """Return the state of the generator of random forces."""
        return {"rng": json.dumps(dynamics.rng.bit_generator.state)}

    def restore(self, dynamics: Any, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        dynamics.rng.bit_generator.state = json.loads(state["rng"])


@dataclass(frozen=True)
class NPT:
    """Isotropic Martyna-Tobias-Klein dynamics at constant pressure.

    Attributes:
        pressure: [GPa].
        thermostat_time: [fs].
        barostat_time: [fs].
    """

    conserves_energy: ClassVar[bool] = False

    pressure: float = 0.0
    thermostat_time: float = 100.0
    barostat_time: float = 1000.0

    def dynamics(
        self, atoms: Atoms, timestep: float, temperature: float, rng: np.random.Generator
    ) -> MolecularDynamics:
        """Return the integrator, for a structure that :func:`~forcedrop.md.start.check_start` accepts."""
        return IsotropicMTKNPT(
            atoms,
            timestep * units.fs,
            temperature_K=temperature,
            pressure_au=self.pressure * GPA,
            tdamp=self.thermostat_time * units.fs,
            pdamp=self.barostat_time * units.fs,
        )

    def state(self, dynamics: Any) -> dict[str, Any]:
        """Return the chains, the strain and its momentum, and the cell that the strain counts from."""
        thermostat, barostat = dynamics._thermostat, dynamics._barostat
        return {
            "eps": float(dynamics._eps),
            "p_eps": float(dynamics._p_eps),
            "volume0": float(dynamics._volume0),
            "cell0": dynamics._cell0.tolist(),
            "eta": thermostat._eta.tolist(),
            "p_eta": thermostat._p_eta.tolist(),
            "xi": barostat._xi.tolist(),
            "p_xi": barostat._p_xi.tolist(),
        }

    def restore(self, dynamics: Any, state: dict[str, Any]) -> None:
        """Undo :meth:`state`."""
        thermostat, barostat = dynamics._thermostat, dynamics._barostat
        dynamics._eps, dynamics._p_eps = state["eps"], state["p_eps"]
        dynamics._volume0, dynamics._cell0 = state["volume0"], np.array(state["cell0"])
        thermostat._eta, thermostat._p_eta = np.array(state["eta"]), np.array(state["p_eta"])
        barostat._xi, barostat._p_xi = np.array(state["xi"]), np.array(state["p_xi"])


Ensemble = NVE | NVT | NPT

FREE_TO_DRIFT = (FixBondLengths, FixLinearTriatomic, FixCom)
"""Constraints that leave a molecule free to move and to turn as a whole, or hold it at rest."""

IN_DYNAMICS = (FixAtoms, FixCartesian, FixedPlane, FixedLine, Hookean, *FREE_TO_DRIFT)
"""Constraints that ASE's velocity Verlet and Langevin dynamics obey."""


def draw_velocities(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Give the atoms Maxwell-Boltzmann velocities [K] without drift and, where nothing is periodic, without rotation.

    Where constraints tie atoms to places in space, there is no drift to be taken away: it would move what is held.
    """
    thermalize_momenta(atoms, temperature_K=temperature, rng=rng)
    if not all(isinstance(constraint, FREE_TO_DRIFT) for constraint in atoms.constraints):
        return
    Stationary(atoms)
    if not atoms.pbc.any() and len(atoms) > 2:
        ZeroRotation(atoms)


_READ_ATOMS = (VelocityVerlet, Langevin, Andersen, NVTBerendsen, Bussi)


def can_jump(dynamics: object) -> bool:
    """Return whether :func:`jump` knows this integrator."""
    return isinstance(dynamics, (*_READ_ATOMS, IsotropicMTKNPT))


def jump(dynamics: object) -> None:
    """Make dynamics go on from atoms that were moved behind its back; its thermostat and barostat start from rest.

    Most integrators read the atoms anew at every step; ``IsotropicMTKNPT`` keeps copies, which are replaced.

    Raises:
        ValueError: for an integrator that may keep copies nobody knows of.
    """
    if not can_jump(dynamics):
        raise ValueError(f"cannot go back in {type(dynamics).__name__}: what it keeps of the past is not known")
    if isinstance(dynamics, IsotropicMTKNPT):
        atoms = dynamics.atoms
        dynamics._q, dynamics._p = atoms.get_positions(), atoms.get_momenta()
        dynamics._eps, dynamics._p_eps = float(np.log(atoms.get_volume() / dynamics._volume0) / 3), 0.0
        for chain in (dynamics._thermostat._eta, dynamics._thermostat._p_eta):
            chain[:] = 0
        for chain in (dynamics._barostat._xi, dynamics._barostat._p_xi):
            chain[:] = 0
