"""The reference methods that give labels, by name, and what is asked of them.

Only numpy and ASE are imported here: a process that labels starts in a tenth of a second.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError


class Method(Protocol):
    """A reference method: makes calculators; plain data, so that it travels to other processes."""

    def calculator(self, settings: Mapping[str, Any]) -> Calculator:
        """Return a new ASE calculator with these settings."""
        ...

    def check(self) -> None:
        """Find out whether it is there, without computing anything.

        Raises:
            ValueError: if it is not; the message says what to install or to correct.
        """
        ...


@dataclass(frozen=True)
class EMT:
    """ASE's effective medium theory of Al, Cu, Ag, Au, Ni, Pd and Pt."""

    def calculator(self, settings: Mapping[str, Any]) -> Calculator:
        """Return ASE's calculator."""
        import ase.calculators.emt

        return ase.calculators.emt.EMT(**settings)

    def check(self) -> None:
        """It comes with ASE."""


@dataclass(frozen=True)
class TBLite:
    """A tight-binding method of tblite, such as GFN2-xTB.

    Attributes:
        method: tblite's name of it.
    """

    method: str

    def calculator(self, settings: Mapping[str, Any]) -> Calculator:
        """Return tblite's calculator, silent unless the settings say otherwise."""
        from tblite.ase import TBLite as Calculator

        return Calculator(method=self.method, **{"verbosity": 0, **settings})

    def check(self) -> None:
        """Look for the package and the method.

        Raises:
            ValueError: see :class:`Method`.
        """
        if find_spec("tblite") is None:
            raise ValueError(
                f"the oracle tblite:{self.method} needs the package tblite: pip install 'forcedrop[label]'"
            )
        known = ("GFN2-xTB", "GFN1-xTB", "IPEA1-xTB")
        if self.method not in known:
            raise ValueError(f"tblite knows the methods {', '.join(known)}, got {self.method!r}")


@dataclass(frozen=True)
class Factory:
    """Anybody's function that returns an ASE calculator.

    Attributes:
        module: where it is.
        function: its name; called with the settings as keyword arguments.
        folder: looked in for the module first.
    """

    module: str
    function: str
    folder: str = ""

    def calculator(self, settings: Mapping[str, Any]) -> Calculator:
        """Call the function."""
        return self._find()(**settings)

    def check(self) -> None:
        """Import the module and look for the function.

        Raises:
            ValueError: see :class:`Method`.
        """
        self._find()

    def _find(self) -> Callable[..., Calculator]:
        if self.folder and self.folder not in sys.path:
            sys.path.insert(0, self.folder)
        try:
            found = getattr(import_module(self.module), self.function, None)
        except ImportError as error:
            raise ValueError(f"the oracle {self.module}:{self.function} cannot be imported: {error}") from error
        if not callable(found):
            raise ValueError(f"{self.module} has no function {self.function!r} that returns an ASE calculator")
        function: Callable[..., Calculator] = found
        return function


@dataclass(frozen=True)
class Oracle:
    """A reference method with its settings.

    Attributes:
        name: as it was asked for.
        method: what makes calculators.
        settings: keyword arguments of the calculator.
        retry_settings: those that are added, or changed, when a label is tried again, such as more SCF cycles; what they change
            must not change the labels.
    """

    name: str
    method: Method
    settings: dict[str, Any] = field(default_factory=dict)
    retry_settings: dict[str, Any] = field(default_factory=dict)

    def calculator(self, attempt: int = 1) -> Calculator:
        """Return a new calculator for the n-th attempt at a label."""
        return self.method.calculator(self.settings | (self.retry_settings if attempt > 1 else {}))


def find_oracle(
    name: str,
    settings: Mapping[str, Any] | None = None,
    retry_settings: Mapping[str, Any] | None = None,
    folder: str | Path = "",
) -> Oracle:
    """Return the oracle of a name: ``emt``, ``tblite:METHOD``, or ``module:function``, and check that it is there.

    Args:
        name: see above.
        settings: keyword arguments of the calculator.
        retry_settings: see :class:`Oracle`.
        folder: where a module of one's own is looked for first.

    Raises:
        ValueError: if there is no such oracle, or a package is missing.
    """
    kind, colon, rest = name.partition(":")
    if name == "emt":
        method: Method = EMT()
    elif kind == "tblite" and rest:
        method = TBLite(rest)
    elif colon and kind and rest.isidentifier():
        method = Factory(kind, rest, str(folder))
    else:
        raise ValueError(
            f"an oracle is named emt, tblite:GFN2-xTB (or another method) or module:function, got {name!r}"
        )
    method.check()
    return Oracle(name, method, dict(settings or {}), dict(retry_settings or {}))


@dataclass(frozen=True)
class Task:
    """One label to compute.

    Attributes:
        key: of the structure, see ``state.frame_key``.
        atoms: the structure.
        oracle: what labels it.
        stress: whether the stress is wanted.
        attempt: 1 at first.
    """

    key: str
    atoms: Atoms
    oracle: Oracle
    stress: bool = False
    attempt: int = 1


def compute(task: Task) -> dict[str, Any]:
    """Return energy [eV], forces [eV/Å], shape (N, 3), and the stress [eV/Å³], shape (6,), or None where there is none."""
    atoms = task.atoms.copy()
    atoms.calc = task.oracle.calculator(task.attempt)
    found: dict[str, Any] = {
        "energy": float(atoms.get_potential_energy()),
        "forces": np.array(atoms.get_forces(apply_constraint=False), float),
        "stress": None,
    }
    if task.stress:
        try:
            found["stress"] = np.array(atoms.get_stress(apply_constraint=False), float)
        except (PropertyNotImplementedError, NotImplementedError):
            found["stress"] = None
    return found


def refusal(found: Mapping[str, Any], n_atoms: int, largest_force: float) -> str | None:
    """Say what is wrong with a label; None if nothing is.

    Args:
        found: from :func:`compute`.
        n_atoms: of the structure.
        largest_force: [eV/Å] above which a label is not believed.
    """
    forces = np.asarray(found["forces"])
    if forces.shape != (n_atoms, 3):
        return f"refused: forces of shape {forces.shape} for {n_atoms} atoms"
    for name in ("energy", "forces", "stress"):
        if found[name] is not None and not np.isfinite(found[name]).all():
            return f"refused: {name} not finite"
    largest = float(np.linalg.norm(forces, axis=1).max())
    if largest > largest_force:
        return f"refused: a force of {largest:.3g} eV/Å is above the largest that is believed, {largest_force:.3g}"
    return None
