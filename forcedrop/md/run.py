"""Molecular dynamics with error bars along the way, under guard, killed and resumed at will."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.md.md import MolecularDynamics
from tqdm import tqdm

from forcedrop.calculator import DropoutCalculator
from forcedrop.door import door
from forcedrop.files import claim, make_folder, write_text
from forcedrop.md.astray import runaway
from forcedrop.md.band import Band
from forcedrop.md.ensembles import NVE, Ensemble, draw_velocities
from forcedrop.md.guard import Event, Guard, GuardStop, RollBack, Stop
from forcedrop.md.recorder import Drift, Recorder, Row, energy_drift, line, read_rows
from forcedrop.md.restart import Restart, fingerprint
from forcedrop.md.start import check_settings, check_start, start_digest
from forcedrop.structures import Frame

SYNC_SECONDS = 1.0
"""Between waits for the disk."""


@dataclass(frozen=True)
class GuardSettings:
    """How ``run_md`` watches σ; see :class:`~forcedrop.md.guard.Guard`.

    Attributes:
        band: thresholds.
        on_high: what to do about trouble; the temperature of a ``RollBack`` is the run's if it has none.
        spacing: time between flagged frames, at least [fs].
        check_every: steps between looks; the run's ``record_every`` if None.
        runaway: instantaneous temperature over that of the run, beyond which it has run away; None:
            :func:`~forcedrop.md.astray.runaway`.
    """

    band: Band
    on_high: Stop | RollBack = field(default_factory=Stop)
    spacing: float = 50.0
    check_every: int | None = None
    runaway: float | None = None

    def build(self, calculator: DropoutCalculator, atoms: Atoms, temperature: float, timestep: float) -> Guard:
        """Return the guard of a run."""
        on_high = self.on_high
        if isinstance(on_high, RollBack) and on_high.temperature is None:
            on_high = replace(on_high, temperature=temperature)
        factor = (
            runaway(max(1, atoms.get_number_of_degrees_of_freedom() // 3)) if self.runaway is None else self.runaway
        )
        return Guard(
            calculator, atoms, self.band, spacing=max(1, round(self.spacing / timestep)), on_high=on_high,
            temperature_limit=factor * temperature if temperature > 0 else None,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        values = {**asdict(self), "on_high": {type(self.on_high).__name__: asdict(self.on_high)}}
        values["band"]["high"] = self.band.high if np.isfinite(self.band.high) else None  # JSON knows no infinity
        return values


@dataclass(frozen=True)
class MDRun:
    """What a run left behind.

    Attributes:
        rows: one per recorded step: time, energies, temperature, σ; see ``md.csv``.
        band: thresholds of σ, if it was guarded.
        events: what the guard saw and did.
        flagged_frames: frames inside the band, apart in time, for the training set; also in ``flagged.h5``.
        drift: of the total energy; meaningful at constant energy only.
        conserves: whether the ensemble keeps the total energy.
        stopped: the time [fs] at which the guard ended the run early, if it did.
        timestep: [fs].
        n_atoms: number of atoms.
        folder: where the files are.
    """

    rows: list[Row]
    band: Band | None
    events: list[Event]
    flagged_frames: list[Frame]
    drift: Drift
    conserves: bool
    stopped: float | None
    timestep: float
    n_atoms: int
    folder: Path

    @property
    def threshold(self) -> float | None:
        """σ above which a frame is flagged, if the run was guarded."""
        return None if self.band is None else self.band.low

    @property
    def flagged(self) -> list[float]:
        """Times [fs] of the recorded steps whose σ is above the band's lower threshold."""
        if self.band is None:
            return []
        return [row["time_fs"] for row in self.rows if self.sigma(row) > self.band.low]

    def sigma(self, row: Row) -> float:
        """Return σ of a row by the criterion of the band."""
        criterion = "max_force" if self.band is None else self.band.criterion
        return (
            row["energy_sigma_eV"] / self.n_atoms if criterion == "energy_per_atom" else row[f"{criterion}_sigma_eV_A"]
        )

    def summary(self) -> str:
        """Return a few sentences for the terminal."""
        last = self.rows[-1]
        mean = float(np.mean([row["max_force_sigma_eV_A"] for row in self.rows]))
        lines = [
            f"{last['time_fs'] / 1000:.2f} ps; largest atomic force σ {mean:.3f} eV/Å on average; the samples "
            f"disagree by {last['sample_drift_meV_atom']:.2f} meV/atom on the change of the energy"
        ]
        if self.conserves:
            lines.append(
                f"total energy drifts by {self.drift.mean:.3f} meV/atom/ps and fluctuates by "
                f"{self.drift.fluctuation:.3f} meV/atom"
            )
        lines += self._guard_lines()
        if "pressure_GPa" in last:
            pressure = [row["pressure_GPa"] for row in self.rows]
            sigma = float(np.sqrt(np.mean([row["pressure_sigma_GPa"] ** 2 for row in self.rows])))
            lines.append(f"pressure {np.mean(pressure):.2f} GPa on average, model σ {sigma:.2f} GPa")
        return "\n".join([*lines, f"files are in {self.folder}"])

    def _guard_lines(self) -> list[str]:
        if self.band is None:
            return []
        lines = [self.band.note] if self.band.note else []
        lines.append(
            f"{len(self.flagged)} of {len(self.rows)} recorded steps are flagged (σ above {self.band.low:.3g}); "
            f"{len(self.flagged_frames)} frames, apart in time, are in flagged.h5"
        )
        back = [event for event in self.events if event.back_to is not None]
        if back:
            lines.append(f"went back {len(back)} times, the last time from {back[-1].sentence()}")
        if self.stopped is not None:
            lines.append(
                f"stopped at {self.stopped / 1000:.3f} ps: {self.events[-1].detail}; what comes after would mean nothing"
            )
        return lines


def run_md(
    atoms: Atoms,
    calculator: DropoutCalculator,
    folder: str | Path,
    *,
    ensemble: Ensemble | None = None,
    temperature: float = 300.0,
    steps: int = 1000,
    timestep: float = 0.5,
    record_every: int = 10,
    seed: int = 0,
    guard: GuardSettings | None = None,
    threshold: float | None = None,
    stop_above: float | None = None,
    velocities: bool = True,
    on_record: Callable[[Atoms], None] | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> MDRun:
    """Run dynamics and record energies, temperature and error bars.

    The folder receives ``md.csv`` (a row a recorded step), ``md.xyz`` and ``md.h5`` (frames with momenta and σ per atom, for
    other programs and for this one), ``flagged.h5`` (of a guarded run), ``restart.pt`` and ``md.json`` (settings and summary).
    All but the last are readable at any moment.

    Args:
        atoms: start; moved in place.
        calculator: with its masks fixed; σ is computed at recorded steps even where ``uncertainty_every`` skips it.
        folder: for the files; made if missing.
        ensemble: ``NVE()`` by default.
        temperature: of the thermostat and of the first velocities [K].
        steps: number of steps.
        timestep: [fs].
        record_every: steps between records.
        seed: of velocities and thermostat.
        guard: what to do about large σ.
        threshold: short for a guard that flags above this largest atomic force σ [eV/Å].
        stop_above: short for a guard that stops above this largest atomic force σ [eV/Å].
        velocities: draw new velocities; otherwise those of ``atoms`` are kept.
        on_record: called with the atoms at every recorded step.
        resume: go on from the last recorded step in ``folder``, to the same numbers as if nothing had happened; a folder
            without a restart file starts from the beginning. ``steps`` counts from the first start and may be larger than
            before.
        overwrite: remove the run that is in ``folder``.

    Constraints of the start are obeyed, in NVE and NVT; see ``forcedrop.md.ensembles.IN_DYNAMICS``.

    Raises:
        ValueError: for settings or a start that cannot be or differ on resuming, a folder that holds a run already, or if the run
            blows up (positions not finite).
    """
    guard = _guard_settings(guard, threshold, stop_above)
    ensemble, folder = ensemble or NVE(), Path(folder)
    check_settings(ensemble, temperature, timestep, steps, record_every)
    if guard is not None:
        calculator.model.need_calibration(calculator.n_samples)
    check_start(atoms, ensemble, temperature, draw=velocities)
    path = folder / "restart.pt"
    start = Restart.load(path) if resume and path.exists() else None
    if start is None:
        claim_folder(folder, overwrite=overwrite, resume=resume)
    elif overwrite:
        raise ValueError("either go on with the run or overwrite it (--resume, --overwrite), not both")
    make_folder(folder)
    settings = {
        "ensemble": {type(ensemble).__name__: asdict(ensemble)}, "temperature_K": temperature, "steps": steps,
        "timestep_fs": timestep, "record_every": record_every, "seed": seed, **calculator.describe(),
        "model": fingerprint(calculator.potential), "velocities": velocities, "numbers": atoms.numbers.tolist(),
        "start": start_digest(atoms, with_velocities=not velocities),
        "guard": None if guard is None else guard.to_dict(),
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    atoms.calc = calculator
    if start is not None:
        start.require(settings, np.array_equal(start.positions, atoms.positions))
        start.apply(atoms)
    else:
        for name in FILES:
            (folder / name).unlink(missing_ok=True)
        if velocities:
            draw_velocities(atoms, temperature, rng)
    dynamics = ensemble.dynamics(atoms, timestep, temperature, rng)
    watch = None if guard is None else guard.build(calculator, atoms, temperature, timestep)
    recorder = Recorder(
        atoms, calculator, folder, timestep, on_record=on_record, flagged=guard is not None,
        state=None if start is None else start.recorder,
    )  # fmt: skip
    with _keeping_samples(calculator), recorder:
        run = _Run(settings, ensemble, dynamics, recorder, watch, path, start)
        stopped = run.to(steps, record_every, guard.check_every or record_every if guard else record_every)
        flagged = recorder.flagged()
    return _finished(settings, recorder, ensemble, guard, watch, flagged, stopped, folder)


FILES = ("restart.pt", "md.csv", "md.xyz", "md.h5", "flagged.h5", "md.json", "md.png")
"""What a run leaves in its folder; ``md.png`` is the command's."""


def claim_folder(folder: Path, *, overwrite: bool = False, resume: bool = False) -> None:
    """Refuse a folder that holds a run.

    One that was killed before it had anything to resume from may be started again with ``resume``.

    Raises:
        ValueError: naming the file that is there.
    """
    if resume and not (folder / "restart.pt").exists() and _hardly_begun(folder):
        return
    words = "--resume goes on with the run, --overwrite removes it"
    if resume:
        words = "the run cannot be resumed without restart.pt; --overwrite removes it"
    claim([folder / name for name in FILES], overwrite=overwrite, otherwise=words)


def _hardly_begun(folder: Path) -> bool:
    """Return whether a folder holds no more than the first record of a run, or nothing."""
    table = folder / "md.csv"
    lines = table.read_bytes().count(b"\n") if table.is_file() else 0
    frames = folder / "md.xyz"
    empty = not frames.exists() or frames.stat().st_size == 0
    return lines <= 2 and not (folder / "md.json").exists() and (lines > 0 or empty)


class _Run:
    """Dynamics, records and guard in step with each other."""

    def __init__(
        self,
        settings: dict[str, Any],
        ensemble: Ensemble,
        dynamics: MolecularDynamics,
        recorder: Recorder,
        guard: Guard | None,
        path: Path,
        start: Restart | None,
    ) -> None:
        self.settings, self.ensemble, self.dynamics, self.recorder = settings, ensemble, dynamics, recorder
        self.guard, self.path = guard, path
        self.recorded, self.stopped, self.synced = -1, False, time.monotonic()
        if start is not None:
            self.recorded, self.stopped, dynamics.nsteps = start.step, start.stopped, start.step
            with door(path, "resume from"):
                ensemble.restore(dynamics, start.dynamics)
        if guard is not None:
            guard.follow(dynamics)
            guard.on_flag = recorder.keep
            if start is not None and start.guard is not None:
                with door(path, "resume from"):
                    guard.restore(start.guard, recorder.flagged())

    def to(self, steps: int, record_every: int, check_every: int) -> bool:
        """Run to a step; return whether the guard ended the run."""
        if self.stopped or self.recorded == steps:
            return self.stopped
        with tqdm(total=steps, initial=max(self.recorded, 0), unit="step") as bar:

            def observe() -> None:
                step = self.dynamics.nsteps
                if step == self.recorded:  # where a resumed run starts
                    return
                due = step % record_every == 0 or step == steps
                if due:
                    self.record(bar)
                if self.guard is not None and step % check_every == 0:
                    self.guard()
                if due:
                    self.save()

            self.dynamics.attach(observe)
            try:
                self.dynamics.run(steps - self.dynamics.nsteps)
            except GuardStop:
                self.stopped = True
                if self.dynamics.nsteps != self.recorded:
                    self.record(bar)
                self.save()
        return self.stopped

    def record(self, bar: tqdm[Any]) -> None:
        step = self.dynamics.nsteps
        row = self.recorder.record(step)
        bar.update(step - max(self.recorded, 0))
        self.recorded = step
        seen = "" if self.guard is None else f", flagged {len(self.guard.flagged)}, back {self.guard.times_back}"
        bar.set_postfix_str(line(row) + seen)

    def save(self) -> None:
        """Write the restart file; what was recorded is on the disk by then, but for the last second."""
        if time.monotonic() - self.synced > SYNC_SECONDS:
            self.recorder.sync()
            self.synced = time.monotonic()
        atoms = self.dynamics.atoms
        Restart(
            self.settings, self.recorded, atoms.get_positions(), atoms.get_momenta(), np.array(atoms.cell.array),
            self.ensemble.state(self.dynamics), self.recorder.state(), self.guard.state() if self.guard else None,
            self.stopped,
        ).save(self.path)  # fmt: skip


def _finished(
    settings: dict[str, Any],
    recorder: Recorder,
    ensemble: Ensemble,
    guard: GuardSettings | None,
    watch: Guard | None,
    flagged: list[Frame],
    stopped: bool,
    folder: Path,
) -> MDRun:
    """Read the rows back, so that a long run holds none of them in memory, and write the summary."""
    rows, n_atoms = read_rows(recorder.path), len(recorder.atoms)
    run = MDRun(
        rows, None if guard is None else guard.band, [] if watch is None else watch.events, flagged,
        energy_drift(rows, n_atoms), ensemble.conserves_energy, rows[-1]["time_fs"] if stopped else None,
        recorder.timestep, n_atoms, folder,
    )  # fmt: skip
    summary = {
        "settings": settings, "flagged_fs": run.flagged, "drift": asdict(run.drift), "stopped_fs": run.stopped,
        "events": [asdict(event) for event in run.events],
    }  # fmt: skip
    write_text(folder / "md.json", json.dumps(summary, indent=1))
    return run


def _guard_settings(
    guard: GuardSettings | None, threshold: float | None, stop_above: float | None
) -> GuardSettings | None:
    if threshold is None and stop_above is None:
        return guard
    if guard is not None:
        raise ValueError("give a guard, or `threshold` and `stop_above`, not both")
    high = float("inf") if stop_above is None else stop_above
    return GuardSettings(Band(min(high, threshold) if threshold is not None else high, high))


@contextmanager
def _keeping_samples(calculator: DropoutCalculator) -> Iterator[None]:
    """Let the calculator keep its samples, of which the energies are recorded as a drift, for the length of a run."""
    before, calculator.keep_samples = calculator.keep_samples, True
    if not before:
        calculator.reset()
    try:
        yield
    finally:
        calculator.keep_samples = before
