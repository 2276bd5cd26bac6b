"""A guard that watches σ during any dynamics or optimisation of ASE: flags, stops, goes back.

    guard = Guard(calculator, atoms, Band(0.05, 0.5), on_high=RollBack(300.0, seed=0))
    guard.watch(dynamics, every=10)  # or dynamics.attach(guard, interval=10)
    event = run_guarded(dynamics, steps=10_000)

A frame is *trouble* where σ is above the band, atoms overlap, one has left the sight of all others (where σ fades to 0), or the
temperature has run away. Such a frame is never kept; what lies inside the band is, at most once in a while (``spacing``), for the
training set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from ase import Atoms
from ase.md.md import MolecularDynamics

from forcedrop.md.astray import Kind, Rules, closest_allowed
from forcedrop.md.band import Band
from forcedrop.md.ensembles import can_jump, draw_velocities, jump
from forcedrop.structures import Frame
from forcedrop.uncertainty.calibration import frame_criteria


@dataclass(frozen=True)
class Event:
    """Something that a guard saw.

    Attributes:
        step: of the dynamics; of a guard that was only attached: which of its calls.
        kind: what.
        sigma: by the band's criterion.
        detail: in words, with numbers.
        back_to: the step of the frame that the run went back to, if it did.
    """

    step: int
    kind: Kind
    sigma: float
    detail: str = ""
    back_to: int | None = None

    def sentence(self) -> str:
        """Say it."""
        back = "" if self.back_to is None else f"; went back to step {self.back_to}"
        return f"step {self.step}: {self.kind}, {self.detail}{back}"


class GuardStop(Exception):
    """Raised through the dynamics when a run must not go on; see :func:`run_guarded`.

    Attributes:
        event: the reason.
    """

    def __init__(self, event: Event) -> None:
        super().__init__(event.sentence())
        self.event = event


class WithErrorBars(Protocol):
    """A calculator with σ, such as ``DropoutCalculator``."""

    @property
    def sigma_kind(self) -> str:
        """``uncertainty`` if calibrated, else ``std``."""
        ...

    def get_property(self, name: str, atoms: Atoms) -> Any:
        """Return a property, as in ASE."""
        ...


@dataclass(frozen=True)
class Stop:
    """Trouble ends the run."""


@dataclass(frozen=True)
class RollBack:
    """Trouble sends the run back to its last frame below the band, with new velocities.

    The velocities of the n-th time are a function of (seed, n). Thermostats and barostats start from rest.

    Attributes:
        temperature: of the new velocities [K]; ``run_md`` fills in its own.
        seed: of the new velocities.
        most: times, before trouble ends the run.
    """

    temperature: float | None = None
    seed: int = 0
    most: int = 10


class Guard:
    """A callable for ``attach`` of any ASE dynamics or optimiser.

    Args:
        calculator: with σ; usually the one of ``atoms``.
        atoms: those that move.
        band: thresholds of σ.
        spacing: steps between flagged frames, at least (calls, for a guard that was only attached).
        on_high: what to do about trouble.
        closest: overlap, by pairs of atomic numbers, smaller first [Å]; by default
            :func:`~forcedrop.md.astray.closest_allowed` of the model.
        cutoff: of the network [Å], by default that of the calculator's model: an atom that was in sight of another one and now
            has none within :data:`~forcedrop.graph.SIGHT` of it is lost. Without either, that is not looked at.
        temperature_limit: [K]; beyond, the run has run away. None: temperature is not looked at.
        on_flag: called with every flagged frame.

    Attributes:
        flagged: unlabelled frames inside the band, with σ in ``info`` and ``arrays``.
        events: what happened, in order.

    Raises:
        ValueError: for a spacing below 1, or a roll-back without a temperature.
    """

    def __init__(
        self,
        calculator: WithErrorBars,
        atoms: Atoms,
        band: Band,
        *,
        spacing: int = 100,
        on_high: Stop | RollBack | None = None,
        closest: Mapping[tuple[int, int], float] | None = None,
        cutoff: float | None = None,
        temperature_limit: float | None = None,
        on_flag: Callable[[Frame], None] | None = None,
    ) -> None:
        if spacing < 1:
            raise ValueError(f"the spacing of flagged frames must be at least 1, got {spacing}")
        on_high = on_high or Stop()
        if isinstance(on_high, RollBack) and on_high.temperature is None:
            raise ValueError("going back needs a temperature for the new velocities: RollBack(temperature=...)")
        self.calculator, self.atoms, self.band, self.spacing, self.on_high = calculator, atoms, band, spacing, on_high
        model = getattr(calculator, "model", None)
        self.rules = Rules(
            sigma=band.high,
            closest=closest_allowed(atoms.numbers, getattr(model, "provenance", {})) if closest is None else closest,
            temperature=temperature_limit,
            cutoff=getattr(model, "cutoff", None) if cutoff is None else cutoff,
            criterion=band.criterion,
        )
        self.on_flag = on_flag
        self.flagged: list[Frame] = []
        self.events: list[Event] = []
        self._dynamics: Any = None
        self._calls = 0
        self._last_flag: int | None = None
        self._safe: _Place | None = None
        self._safe_is_low = False
        self._away: np.ndarray | None = None  # who was out of sight at the last look that was no trouble

    def follow(self, dynamics: Any) -> None:
        """Note whose steps the events count, and what to tell about going back; :meth:`watch` attaches besides.

        Raises:
            ValueError: if it should go back in something that cannot.
        """
        if isinstance(self.on_high, RollBack) and not (isinstance(dynamics, MolecularDynamics) and can_jump(dynamics)):
            raise ValueError(f"cannot go back in {type(dynamics).__name__}; use on_high=Stop()")
        self._dynamics = dynamics

    def watch(self, dynamics: Any, every: int = 1) -> None:
        """Attach to dynamics or an optimiser, to look at it every so many steps; going back needs this.

        Raises:
            ValueError: see :meth:`follow`.
        """
        self.follow(dynamics)
        dynamics.attach(self, interval=every)

    @property
    def times_back(self) -> int:
        """How often the run went back."""
        return sum(event.back_to is not None for event in self.events)

    def __call__(self) -> None:
        """Look at the atoms now.

        Raises:
            GuardStop: if the run must end.
        """
        step = self._calls if self._dynamics is None else int(self._dynamics.nsteps)
        self._calls += 1
        kind = self.calculator.sigma_kind
        forces = self.calculator.get_property(f"forces_{kind}", self.atoms)
        criteria = frame_criteria(forces, float(self.calculator.get_property(f"energy_{kind}", self.atoms)))
        sigma = criteria[self.band.criterion]
        now = Frame.geometry(self.atoms)
        away = self.rules.alone(now)
        trouble = self.rules.trouble(now, sigma, float(self.atoms.get_temperature()), away, self._away)
        if trouble is not None:
            self._answer(Event(step, trouble.kind, sigma, trouble.detail))
            return
        self._away = away
        low = sigma <= self.band.low
        if low or not self._safe_is_low:
            self._safe, self._safe_is_low = _Place.of(self.atoms, step), low
        if low or (self._last_flag is not None and step - self._last_flag < self.spacing):
            return
        self._last_flag = step
        detail = f"{self.band.criterion} σ {sigma:.4g} above {self.band.low:.4g}"
        self.events.append(Event(step, Kind.FLAGGED, sigma, detail))
        info = {"origin": "guard", "step": step, **{f"sigma_{name}": value for name, value in criteria.items()}}
        frame = Frame.from_atoms(self.atoms, info=info, arrays={f"forces_{kind}": np.array(forces)})
        self.flagged.append(frame)
        if self.on_flag is not None:
            self.on_flag(frame)

    def _answer(self, event: Event) -> None:
        """Stop, or go back if there is a frame to go back to and it was not done too often."""
        answer, safe = self.on_high, self._safe
        if isinstance(answer, Stop) or safe is None or self.times_back >= answer.most:
            self.events.append(event)
            raise GuardStop(event)
        if self._dynamics is None:
            raise ValueError("going back needs guard.watch(dynamics), to tell the dynamics about it")
        rng = np.random.default_rng([answer.seed, self.times_back])
        self.events.append(Event(**{**vars(event), "back_to": safe.step}))
        self.atoms.set_cell(safe.cell, scale_atoms=False)
        self.atoms.set_positions(safe.positions, apply_constraint=False)
        self._away = self.rules.alone(Frame.geometry(self.atoms))
        draw_velocities(self.atoms, float(answer.temperature or 0.0), rng)
        jump(self._dynamics)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, in plain values; the flagged frames are not among it."""
        return {
            "events": [asdict(event) for event in self.events],
            "calls": self._calls,
            "last_flag": self._last_flag,
            "safe": None if self._safe is None else self._safe.to_dict(),
            "safe_is_low": self._safe_is_low,
            "away": None if self._away is None else self._away.tolist(),
        }

    def restore(self, state: Mapping[str, Any], flagged: list[Frame]) -> None:
        """Undo :meth:`state`."""
        self.events = [Event(**{**values, "kind": Kind(values["kind"])}) for values in state["events"]]
        self._calls, self._last_flag = state["calls"], state["last_flag"]
        self._safe = None if state["safe"] is None else _Place.from_dict(state["safe"])
        self._safe_is_low = state["safe_is_low"]
        away = state.get("away")  # restart files from before this was looked at have none
        self._away = None if away is None else np.array(away)
        self.flagged = list(flagged)


def run_guarded(dynamics: Any, **arguments: Any) -> Event | None:
    """Call ``dynamics.run(**arguments)``; return the event that ended it early, None if it went through."""
    try:
        dynamics.run(**arguments)
    except GuardStop as stop:
        return stop.event
    return None


@dataclass(frozen=True)
class _Place:
    """A frame to go back to."""

    step: int
    positions: np.ndarray
    cell: np.ndarray

    @classmethod
    def of(cls, atoms: Atoms, step: int) -> _Place:
        return cls(step, atoms.get_positions(), np.array(atoms.cell.array))

    def to_dict(self) -> dict[str, Any]:
        return {"step": self.step, "positions": self.positions.tolist(), "cell": self.cell.tolist()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> _Place:
        return cls(values["step"], np.array(values["positions"]), np.array(values["cell"]))
