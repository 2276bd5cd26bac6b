"""What a run leaves on disk: a row and a frame at every recorded step, in all files or in none, readable at any moment."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms

from forcedrop.calculator import DropoutCalculator
from forcedrop.door import door
from forcedrop.files import append_bytes, cut, sync, write_bytes
from forcedrop.structures import Frame, FrameStore, write_frames
from forcedrop.structures.predictions import mark
from forcedrop.uncertainty.calibration import difference_sigma
from forcedrop.units import GPA

Row = dict[str, float]


@dataclass(frozen=True)
class Drift:
    """How well energy was conserved: slope of a straight line through the total energy [meV/atom/ps].

    Attributes:
        mean: of the potential that moved the atoms.
        fluctuation: standard deviation of the total energy about the line [meV/atom].
    """

    mean: float
    fluctuation: float


def energy_drift(rows: list[Row], n_atoms: int) -> Drift:
    """Return the slope of the total energy and the spread about it."""
    time = np.array([row["time_fs"] for row in rows]) / 1000
    total = 1000 * np.array([row["total_eV"] for row in rows]) / n_atoms
    if len(rows) < 3:
        return Drift(float("nan"), float("nan"))
    slope, offset = np.polyfit(time, total, 1)
    return Drift(float(slope), float(np.std(total - slope * time - offset)))


def read_rows(path: str | Path) -> list[Row]:
    """Return the rows of an ``md.csv``, bit for bit.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    with door(path), Path(path).open(newline="", encoding="utf-8") as stream:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(stream)]


class Recorder:
    """Writes ``md.csv``, ``md.xyz``, ``md.h5`` and, of a guarded run, ``flagged.h5``.

    Args:
        atoms: those that move.
        calculator: theirs, or the one that theirs is made from; it must keep its samples.
        folder: for the files.
        timestep: [fs].
        on_record: called with the atoms at every recorded step.
        flagged: whether there will be flagged frames.
        state: of :meth:`state`, to go on from there; what was written after it is cut off.
    """

    def __init__(
        self,
        atoms: Atoms,
        calculator: DropoutCalculator,
        folder: Path,
        timestep: float,
        *,
        on_record: Callable[[Atoms], None] | None = None,
        flagged: bool = False,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.atoms, self.calculator, self.timestep, self.on_record = atoms, calculator, timestep, on_record
        self.path, self._xyz = folder / "md.csv", folder / "md.xyz"
        self._first: np.ndarray | None = None
        mode: Any = "w" if state is None else "a"
        what = {"what": "molecular dynamics"}
        self._store = FrameStore(folder / "md.h5", mode, what, compressed=False)
        self._flagged = None
        if flagged:
            self._flagged = FrameStore(folder / "flagged.h5", mode, {"what": "flagged frames"}, compressed=False)
        if state is None:
            write_bytes(self._xyz, b"")
            write_bytes(self.path, b"")
        else:
            self._cut(state)
            self._first = np.array(state["first"])

    def _cut(self, state: Mapping[str, Any]) -> None:
        """Forget what was written after a state."""
        cut(self.path, state["csv"])
        cut(self._xyz, state["xyz"])
        self._store.truncate(state["frames"])
        if self._flagged is not None:
            self._flagged.truncate(state["flagged"])

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, *exception: object) -> None:
        if exception[0] is None:
            self.sync()
        self._store.close()
        if self._flagged is not None:
            self._flagged.close()

    def sync(self) -> None:
        """Wait until all that was written is on the disk.

        Raises:
            WriteError: if it does not get there.
        """
        files = (self.path, self._xyz, self._store.path, *((self._flagged.path,) if self._flagged is not None else ()))
        for path in files:
            sync(path)

    def state(self) -> dict[str, Any]:
        """Return how far the files go, and the energies that the samples started from."""
        return {
            "csv": self.path.stat().st_size,
            "xyz": self._xyz.stat().st_size,
            "frames": len(self._store),
            "flagged": 0 if self._flagged is None else len(self._flagged),
            "first": [] if self._first is None else self._first.tolist(),
        }

    def record(self, step: int) -> Row:
        """Write the step, to all files or to none.

        Raises:
            ValueError: if positions are not finite.
            WriteError: if it cannot be written.
        """
        atoms, calculator = self.atoms, self.calculator
        if not np.isfinite(atoms.positions).all():
            raise ValueError(f"the run blew up: positions are not finite at step {step}")
        kind = calculator.sigma_kind
        atomic = np.linalg.norm(calculator.get_property(f"forces_{kind}", atoms), axis=1)
        samples = np.array(calculator.get_property("energy_ensemble", atoms))
        if self._first is None:
            self._first = samples
        row = {
            "step": float(step),
            "time_fs": step * self.timestep,
            "potential_eV": float(atoms.get_potential_energy()),
            "kinetic_eV": float(atoms.get_kinetic_energy()),
            "total_eV": float(atoms.get_total_energy()),
            "temperature_K": float(atoms.get_temperature()),
            "energy_sigma_eV": float(calculator.get_property(f"energy_{kind}", atoms)),
            "max_force_sigma_eV_A": float(atomic.max()),
            "mean_force_sigma_eV_A": float(atomic.mean()),
            "sample_drift_meV_atom": 1000 * difference_sigma(samples, self._first) / len(atoms),
        }
        if "stress" in calculator.results:
            row |= _pressure(calculator, atoms, kind)
        self._write(row, recorded_frame(atoms, row))
        if self.on_record is not None:
            self.on_record(atoms)
        return row

    def keep(self, frame: Frame) -> None:
        """Write a flagged frame."""
        if self._flagged is not None:
            self._flagged.append([frame])

    def flagged(self) -> list[Frame]:
        """Return the flagged frames that are on disk."""
        return [] if self._flagged is None else list(self._flagged)

    def _write(self, row: Row, frame: Frame) -> None:
        sizes, text = {path: path.stat().st_size for path in (self.path, self._xyz)}, io.StringIO(newline="")
        frames, writer = len(self._store), csv.DictWriter(text, list(row))
        if sizes[self.path] == 0:
            writer.writeheader()
        writer.writerow(row)
        try:
            append_bytes(self.path, text.getvalue().encode())
            write_frames(self._xyz, [frame], append=True)
            self._store.append([frame])  # last, as the others can be cut on a full disk too
        except OSError:
            with suppress(OSError, ValueError), FrameStore(self._store.path) as store:
                if len(store) == frames:  # else the disk was lost at the very end: the frame counts
                    for path, size in sizes.items():
                        cut(path, size)
            raise


def line(row: Row) -> str:
    """Return what the progress bar shows."""
    text = (
        f"T {row['temperature_K']:.0f} K, E {row['total_eV']:.3f} eV, σ(F) mean {row['mean_force_sigma_eV_A']:.3f}"
        f" max {row['max_force_sigma_eV_A']:.3f} eV/Å"
    )
    if "pressure_GPa" in row:
        text += f", P {row['pressure_GPa']:.2f} ± {row['pressure_sigma_GPa']:.2f} GPa"
    return text


def _pressure(calculator: DropoutCalculator, atoms: Atoms, kind: str) -> Row:
    """Return volume, the pressure with its kinetic part, and its σ, which is that of the samples' traces."""
    stress = calculator.get_property("stress", atoms)
    kinetic = 2 * atoms.get_kinetic_energy() / (3 * atoms.get_volume())
    sigma = float(calculator.get_property(f"pressure_{kind}", atoms))
    return {
        "volume_A3": float(atoms.get_volume()),
        "pressure_GPa": float(-np.mean(stress[:3]) + kinetic) / GPA,
        "pressure_sigma_GPa": sigma / GPA,
    }


def recorded_frame(atoms: Atoms, row: Row) -> Frame:
    """Return the atoms with everything their calculator knows, marked as predictions, for a store or an extended XYZ file."""
    results: dict[str, Any] = atoms.calc.results
    left = ("ensemble", "covariance")  # too much for every frame of a trajectory
    per_atom = {k: v for k, v in results.items() if k.startswith(("forces_", "energies")) and not k.endswith(left)}
    info = {
        k: v for k, v in results.items() if k.startswith(("energy_", "stress_", "pressure_")) and not k.endswith(left)
    }
    frame = Frame.from_atoms(
        atoms,
        energy=float(results["energy"]),
        forces=np.array(results["forces"]),
        stress=np.array(results["stress"]) if "stress" in results else None,
        info={**{k: np.asarray(v).tolist() for k, v in info.items()}, **row},
        arrays={**{k: np.array(v) for k, v in per_atom.items()}, "momenta": atoms.get_momenta()},
    )
    return mark(frame)
