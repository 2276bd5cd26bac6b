"""Molecular dynamics with error bars along the way."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.md import MolecularDynamics
from ase.md.nose_hoover_chain import IsotropicMTKNPT
from ase.md.velocitydistribution import Stationary, ZeroRotation, thermalize_momenta
from ase.md.verlet import VelocityVerlet
from tqdm import tqdm

from forcedrop.calculator import DropoutCalculator
from forcedrop.structures import Frame, FrameStore, write_frames
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
        """Return the integrator.

        Raises:
            ValueError: if the structure is not periodic in all directions.
        """
        if not atoms.pbc.all():
            raise ValueError(
                f"NPT needs a structure that is periodic in all directions, got pbc = {atoms.pbc.tolist()}"
            )
        return IsotropicMTKNPT(
            atoms,
            timestep * units.fs,
            temperature_K=temperature,
            pressure_au=self.pressure * GPA,
            tdamp=self.thermostat_time * units.fs,
            pdamp=self.barostat_time * units.fs,
        )


@dataclass(frozen=True)
class Drift:
    """How well energy was conserved: slope of a straight line through the total energy [meV/atom/ps].

    Attributes:
        mean: of the potential that moved the atoms.
        fluctuation: standard deviation of the total energy about the line [meV/atom].
    """

    mean: float
    fluctuation: float


@dataclass(frozen=True)
class MDRun:
    """What a run left behind.

    Attributes:
        rows: one per recorded step: time, energies, temperature, σ; see ``md.csv``.
        flagged: times [fs] of the recorded steps whose largest atomic force σ is above the threshold.
        threshold: [eV/Å], if there is one.
        drift: of the total energy; meaningful at constant energy only.
        conserves: whether the ensemble keeps the total energy.
        stopped: the time [fs] at which σ ended the run early, if it did.
        folder: where the files are.
    """

    rows: list[dict[str, float]]
    flagged: list[float]
    threshold: float | None
    drift: Drift
    conserves: bool
    stopped: float | None
    folder: Path

    def summary(self) -> str:
        """Return a few sentences for the terminal."""
        last = self.rows[-1]
        mean = float(np.mean([row["max_force_sigma_eV_A"] for row in self.rows]))
        lines = [f"{last['time_fs'] / 1000:.2f} ps; largest atomic force σ {mean:.3f} eV/Å on average"]
        if self.conserves:
            lines.append(
                f"total energy drifts by {self.drift.mean:.3f} meV/atom/ps and fluctuates by "
                f"{self.drift.fluctuation:.3f} meV/atom"
            )
        if self.stopped is not None:
            lines.append(
                f"stopped at {self.stopped / 1000:.3f} ps: there the largest atomic force σ is "
                f"{last['max_force_sigma_eV_A']:.3f} eV/Å, and what comes after would mean nothing"
            )
        if self.threshold is not None:
            lines.append(
                f"{len(self.flagged)} of {len(self.rows)} recorded steps are flagged (σ above {self.threshold:.3f} eV/Å)"
            )
        if "pressure_GPa" in last:
            pressure = [row["pressure_GPa"] for row in self.rows]
            sigma = float(np.sqrt(np.mean([row["pressure_sigma_GPa"] ** 2 for row in self.rows])))
            lines.append(f"pressure {np.mean(pressure):.2f} GPa on average, model σ {sigma:.2f} GPa")
        return "\n".join([*lines, f"files are in {self.folder}"])


def run_md(
    atoms: Atoms,
    calculator: DropoutCalculator,
    folder: str | Path,
    *,
    ensemble: NVE | NVT | NPT | None = None,
    temperature: float = 300.0,
    steps: int = 1000,
    timestep: float = 0.5,
    record_every: int = 10,
    seed: int = 0,
    threshold: float | None = None,
    stop_above: float | None = None,
    velocities: bool = True,
    on_record: Callable[[Atoms], None] | None = None,
) -> MDRun:
    """Run dynamics and record energies, temperature and error bars.

    The folder receives ``md.csv`` (a row a recorded step), ``md.xyz`` and ``md.h5`` (frames with momenta and σ per atom, for
    other programs and for this one) and ``md.json`` (settings and summary). All but the last are readable at any moment.

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
        threshold: largest atomic force σ [eV/Å] above which a step is flagged.
        stop_above: largest atomic force σ [eV/Å] at a recorded step that ends the run.
        velocities: draw new velocities; otherwise those of ``atoms`` are kept.
        on_record: called with the atoms at every recorded step.

    Raises:
        ValueError: for settings that cannot be, or if the run blows up (positions not finite).
    """
    if steps < 1 or record_every < 1 or timestep <= 0:
        raise ValueError(f"steps, record_every and timestep must be positive, got {steps}, {record_every}, {timestep}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    ensemble = ensemble or NVE()
    rng = np.random.default_rng(seed)
    atoms.calc = calculator
    if velocities:
        thermalize_momenta(atoms, temperature_K=temperature, rng=rng)
        Stationary(atoms)
        if not atoms.pbc.any() and len(atoms) > 2:
            ZeroRotation(atoms)
    dynamics = ensemble.dynamics(atoms, timestep, temperature, rng)
    recorder = _Recorder(atoms, calculator, folder, timestep, threshold, on_record)
    with recorder, tqdm(total=steps, unit="step") as bar:
        recorder.record(0)
        stopped = None
        for done in range(record_every, steps + record_every, record_every):
            chunk = min(record_every, steps - (done - record_every))
            if chunk == 0:
                break
            dynamics.run(chunk)
            bar.update(chunk)
            row = recorder.record(min(done, steps))
            bar.set_postfix_str(recorder.line(row))
            if stop_above is not None and row["max_force_sigma_eV_A"] > stop_above:
                stopped = row["time_fs"]
                break
    settings = {
        "ensemble": {type(ensemble).__name__: asdict(ensemble)}, "temperature_K": temperature, "steps": steps,
        "timestep_fs": timestep, "seed": seed, "n_samples": calculator.n_samples, "mask_seed": calculator.seed,
        "uncertainty_every": calculator.uncertainty_every,
    }  # fmt: skip
    drift = energy_drift(recorder.rows, len(atoms))
    run = MDRun(recorder.rows, recorder.flagged, threshold, drift, ensemble.conserves_energy, stopped, folder)
    summary = {
        "settings": settings, "threshold_eV_A": threshold, "flagged_fs": run.flagged, "drift": asdict(drift),
        "stop_above_eV_A": stop_above, "stopped_fs": stopped,
    }  # fmt: skip
    (folder / "md.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return run


def energy_drift(rows: list[dict[str, float]], n_atoms: int) -> Drift:
    """Return the slope of the total energy and the spread about it."""
    time = np.array([row["time_fs"] for row in rows]) / 1000
    total = 1000 * np.array([row["total_eV"] for row in rows]) / n_atoms
    if len(rows) < 3:
        return Drift(float("nan"), float("nan"))
    slope, offset = np.polyfit(time, total, 1)
    return Drift(float(slope), float(np.std(total - slope * time - offset)))


class _Recorder:
    """Writes a row and a frame at every recorded step, flushed, so that a killed run leaves readable files."""

    def __init__(
        self,
        atoms: Atoms,
        calculator: DropoutCalculator,
        folder: Path,
        timestep: float,
        threshold: float | None,
        on_record: Callable[[Atoms], None] | None,
    ) -> None:
        self.atoms, self.calculator = atoms, calculator
        self.timestep, self.threshold, self.on_record = timestep, threshold, on_record
        self.rows: list[dict[str, float]] = []
        self.flagged: list[float] = []
        self._csv = (folder / "md.csv").open("w", newline="", encoding="utf-8")
        self._writer: csv.DictWriter[str] | None = None
        self._xyz = folder / "md.xyz"
        self._xyz.unlink(missing_ok=True)
        self._store = FrameStore(folder / "md.h5", "w", provenance={"what": "molecular dynamics"})

    def __enter__(self) -> _Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._csv.close()
        self._store.close()

    def record(self, step: int) -> dict[str, float]:
        atoms = self.atoms
        if not np.isfinite(atoms.positions).all():
            raise ValueError(f"the run blew up: positions are not finite at step {step}")
        kind = "std" if self.calculator.model.calibration is None else "uncertainty"
        sigma = self.calculator.get_property(f"forces_{kind}", atoms)
        atomic = np.linalg.norm(sigma, axis=1)
        row = {
            "step": float(step),
            "time_fs": step * self.timestep,
            "potential_eV": float(atoms.get_potential_energy()),
            "kinetic_eV": float(atoms.get_kinetic_energy()),
            "total_eV": float(atoms.get_total_energy()),
            "temperature_K": float(atoms.get_temperature()),
            "energy_sigma_eV": float(self.calculator.get_property(f"energy_{kind}", atoms)),
            "max_force_sigma_eV_A": float(atomic.max()),
            "mean_force_sigma_eV_A": float(atomic.mean()),
        }
        if "stress" in self.calculator.results:
            row |= _pressure(self.calculator, atoms, kind)
        self._write(row)
        if self.threshold is not None and row["max_force_sigma_eV_A"] > self.threshold:
            self.flagged.append(row["time_fs"])
        frame = recorded_frame(atoms, row)
        self._store.append([frame])
        write_frames(self._xyz, [frame], append=True)
        if self.on_record is not None:
            self.on_record(atoms)
        return row

    def _write(self, row: dict[str, float]) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._csv, list(row))
            self._writer.writeheader()
        self.rows.append(row)
        self._writer.writerow(row)
        self._csv.flush()

    def line(self, row: dict[str, float]) -> str:
        """Return what the progress bar shows."""
        text = (
            f"T {row['temperature_K']:.0f} K, E {row['total_eV']:.3f} eV, σ(F) mean {row['mean_force_sigma_eV_A']:.3f}"
            f" max {row['max_force_sigma_eV_A']:.3f} eV/Å"
        )
        if "pressure_GPa" in row:
            text += f", P {row['pressure_GPa']:.2f} ± {row['pressure_sigma_GPa']:.2f} GPa"
        return text + (f", flagged {len(self.flagged)}" if self.threshold is not None else "")


def _pressure(calculator: DropoutCalculator, atoms: Atoms, kind: str) -> dict[str, float]:
    """Return volume, the pressure with its kinetic part, and its σ, which is that of the samples' traces."""
    stress = calculator.get_property("stress", atoms)
    kinetic = 2 * atoms.get_kinetic_energy() / (3 * atoms.get_volume())
    sigma = float(calculator.get_property(f"pressure_{kind}", atoms))
    return {
        "volume_A3": float(atoms.get_volume()),
        "pressure_GPa": float(-np.mean(stress[:3]) + kinetic) / GPA,
        "pressure_sigma_GPa": sigma / GPA,
    }


def recorded_frame(atoms: Atoms, row: dict[str, float]) -> Frame:
    """Return the atoms with everything their calculator knows, for a store or an extended XYZ file."""
    results: dict[str, Any] = atoms.calc.results
    left = ("ensemble", "covariance")  # too much for every frame of a trajectory
    per_atom = {k: v for k, v in results.items() if k.startswith(("forces_", "energies")) and not k.endswith(left)}
    info = {
        k: v for k, v in results.items() if k.startswith(("energy_", "stress_", "pressure_")) and not k.endswith(left)
    }
    return Frame.from_atoms(
        atoms,
        energy=float(results["energy"]),
        forces=np.array(results["forces"]),
        stress=np.array(results["stress"]) if "stress" in results else None,
        info={**{k: np.asarray(v).tolist() for k, v in info.items()}, **row},
        arrays={**{k: np.array(v) for k, v in per_atom.items()}, "momenta": atoms.get_momenta()},
    )
