"""Long guarded dynamics of the shipped ethanol model at constant energy: does memory stay flat, does energy, does the file open?

    python benchmarks/guarded_md.py --picoseconds 1000

Kill it at any moment and start it again: it goes on where it was, and a larger ``--picoseconds`` makes the run longer. While it
runs, every record reads the trajectory back from its file. Files go to ``runs/guarded_md``, numbers and a picture to
``benchmarks/results/guarded_md.json`` and ``.png``.
"""

from __future__ import annotations

import argparse
import csv
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from ase import Atoms
from common import RESULTS, environment, write_results
from matplotlib.figure import Figure

from forcedrop import DropoutCalculator, FrameStore, load_model, read_frames, run_md
from forcedrop.md import NVE, GuardSettings, Kind, MDRun, RollBack, band_from_calibration, energy_drift
from forcedrop.report import run_figure, save_figure

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "guarded_md"
TIMESTEP, CHECK, RECORD, SAMPLES, SEED = 0.5, 20, 100, 16, 0
FLAGS, STOPS = 0.5, 0.001
"""Accepted false alarms per ps."""


def main() -> None:
    """Run, or go on, and write what was found so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picoseconds", type=float, default=1000.0)
    steps = round(parser.parse_args().picoseconds * 1000 / TIMESTEP)
    model = load_model(ROOT / "data" / "ethanol.pt")
    band = band_from_calibration(model.calibration, flags_per_ps=FLAGS, stops_per_ps=STOPS, interval=CHECK * TIMESTEP)
    atoms = read_frames(ROOT / "data" / "ethanol_300K.h5")[0].to_atoms()
    # σ costs all samples, so it is computed where the guard or a record asks for it, and the mean moves the atoms
    calculator = DropoutCalculator(model, SAMPLES, uncertainty_every=10**9)
    FOLDER.mkdir(parents=True, exist_ok=True)
    with Watcher(FOLDER / "memory.csv") as watcher:
        run = run_md(
            atoms, calculator, FOLDER, ensemble=NVE(), temperature=300.0, steps=steps, timestep=TIMESTEP,
            record_every=RECORD, seed=SEED, resume=True, on_record=watcher,
            guard=GuardSettings(band, RollBack(most=1000), spacing=100.0, check_every=CHECK),
        )  # fmt: skip
    print(run.summary())
    memory = read_memory(FOLDER / "memory.csv")
    results = {
        "what": "ethanol at constant energy, about 300 K, with data/ethanol.pt, under guard",
        "environment": environment(SEED), "samples": SAMPLES, "timestep_fs": TIMESTEP, "check_every": CHECK,
        "record_every": RECORD, **found(run), "memory": flatness(memory),
        "file_MB": {path.name: path.stat().st_size / 1e6 for path in sorted(FOLDER.glob("*.*")) if path.suffix != ".png"},
    }  # fmt: skip
    save_figure(run_figure(run), FOLDER / "md.png")
    save_figure(picture(run, memory), RESULTS / "guarded_md.png")
    print(write_results("guarded_md", results).relative_to(ROOT))


class Watcher:
    """Notes memory and time at every record, in a file of its own, and opens the trajectory that is being written."""

    def __init__(self, path: Path) -> None:
        self.path, self.start = path, time.time()
        new = not path.exists()
        self.session = 0 if new else 1 + int(max((row["session"] for row in read_memory(path)), default=-1))
        self.stream = path.open("a", newline="", encoding="utf-8")
        self.writer = csv.writer(self.stream)
        if new:
            self.writer.writerow(["session", "seconds", "rss_MB", "frames"])

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stream.close()

    def __call__(self, atoms: Atoms) -> None:
        """Write a row."""
        with FrameStore(FOLDER / "md.h5") as store:
            frames = len(store)
            if not np.array_equal(store[frames - 1].pos, atoms.positions):
                raise ValueError(f"frame {frames - 1} on disk is not the one that was just recorded")
        self.writer.writerow([self.session, time.time() - self.start, rss(), frames])
        self.stream.flush()


def rss() -> float:
    """Return the resident memory of this process [MB]."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 1e6


def read_memory(path: Path) -> list[dict[str, float]]:
    """Return the rows of a watcher."""
    with path.open(newline="", encoding="utf-8") as stream:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(stream)]


def found(run: MDRun) -> dict[str, Any]:
    """Return what the run says of energy, temperature, σ and alarms."""
    length = run.rows[-1]["time_fs"] / 1000
    back = [event for event in run.events if event.back_to is not None]
    flags = [event for event in run.events if event.kind is Kind.FLAGGED]
    part = longest(run)
    sigma = [row["max_force_sigma_eV_A"] for row in run.rows]
    drift = energy_drift(part, run.n_atoms)
    band = run.band
    return {
        "picoseconds": length,
        "temperature_K": float(np.mean([row["temperature_K"] for row in run.rows])),
        "undisturbed_ps": (part[-1]["time_fs"] - part[0]["time_fs"]) / 1000,
        "drift_meV_atom_ps": finite(drift.mean), "fluctuation_meV_atom": finite(drift.fluctuation),
        "sample_drift_meV_atom": run.rows[-1]["sample_drift_meV_atom"],
        "max_force_sigma_eV_A": {"mean": float(np.mean(sigma)), "largest": float(np.max(sigma))},
        "band": None if band is None else {"low": band.low, "high": band.high, "how": band.note},
        "flags_per_ps": {"accepted": FLAGS, "found": len(flags) / length},
        "back_per_ps": {"accepted": STOPS, "found": len(back) / length},
        "why_back": [event.sentence() for event in back[:10]], "stopped_fs": run.stopped,
    }  # fmt: skip


def longest(run: MDRun) -> list[dict[str, float]]:
    """Return the rows of the longest stretch in which energy should be conserved: between two times of going back."""
    ends = [-1.0, *(event.step for event in run.events if event.back_to is not None), float("inf")]
    parts = [[row for row in run.rows if low < row["step"] <= high] for low, high in pairwise(ends)]
    return max(parts, key=len)


def flatness(memory: list[dict[str, float]]) -> dict[str, Any]:
    """Return the growth of memory with the frames written, over the second half of the longest session."""
    sessions = {row["session"] for row in memory}
    rows = max(([row for row in memory if row["session"] == s] for s in sessions), key=len)
    late = rows[len(rows) // 2 :]
    frames, rss = ([row[name] for row in late] for name in ("frames", "rss_MB"))
    slope = float(np.polyfit(frames, rss, 1)[0]) if len(late) > 2 else None
    return {
        "sessions": len(sessions), "records": len(rows), "start_MB": rows[0]["rss_MB"], "end_MB": rows[-1]["rss_MB"],
        "median_MB_by_quarter": [float(np.median(part)) for part in np.array_split([row["rss_MB"] for row in rows], 4)],
        "kB_per_frame": None if slope is None else 1e3 * slope,
    }  # fmt: skip


def finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if np.isfinite(value) else None


def picture(run: MDRun, memory: list[dict[str, float]]) -> Figure:
    """Return total energy, temperature, σ and memory along the run."""
    time_ps = np.array([row["time_fs"] for row in run.rows]) / 1000
    figure = Figure(figsize=(8.4, 7.2), layout="constrained")
    axes = figure.subplots(4, 1)
    total = 1000 * np.array([row["total_eV"] for row in run.rows]) / run.n_atoms
    axes[0].plot(time_ps, total - total[0], color="black", lw=0.8)
    axes[0].set_ylabel("total energy − start\n[meV/atom]")
    axes[1].plot(time_ps, [row["temperature_K"] for row in run.rows], color="#c0392b", lw=0.5)
    axes[1].set_ylabel("temperature [K]")
    axes[2].plot(time_ps, [row["max_force_sigma_eV_A"] for row in run.rows], color="#2c6fbb", lw=0.5)
    if run.band is not None:
        axes[2].axhline(run.band.low, color="#e67e22", lw=0.8, ls="--", label="flagged above")
        axes[2].axhline(run.band.high, color="#c0392b", lw=0.8, ls="--", label="goes back above")
        axes[2].legend(fontsize=7, loc="upper right", ncols=2)
    axes[2].set_ylabel("largest atomic\nforce σ [eV/Å]")
    for k, axis in enumerate(axes[:3]):
        for event in run.events:
            if event.back_to is not None:
                axis.axvline(event.step * run.timestep / 1000, color="#888888", lw=0.5, ls=":")
        if k == 2:
            axis.set_xlabel("time [ps]")
    for session in sorted({row["session"] for row in memory}):
        rows = [row for row in memory if row["session"] == session]
        axes[3].plot([row["frames"] for row in rows], [row["rss_MB"] for row in rows], lw=1)
    top = 1.2 * max(row["rss_MB"] for row in memory)
    axes[3].set(xlabel="frames written (a colour for each start of the program)", ylabel="memory [MB]", ylim=(0, top))
    return figure


if __name__ == "__main__":
    matplotlib.use("agg")
    main()
