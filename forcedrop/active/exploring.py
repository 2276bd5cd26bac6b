"""Dynamics with the model of a round: where it goes, and what of that may be labelled."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from forcedrop.active.config import ExploreSection
from forcedrop.active.processes import at_once
from forcedrop.active.state import frame_key, read_json, write_json
from forcedrop.calculator import DropoutCalculator
from forcedrop.devices import pick_device
from forcedrop.files import whole_folder
from forcedrop.md import NPT, NVE, NVT, run_md
from forcedrop.md.astray import Rules, closest_allowed
from forcedrop.model import TrainedModel, load_model
from forcedrop.structures import Frame, FrameStore

DONE = "run.json"


@dataclass(frozen=True)
class Run:
    """One trajectory to compute.

    Attributes:
        name: of its folder.
        temperature: [K].
        seed: of velocities and thermostat.
        start: key of the structure that it starts from.
    """

    name: str
    temperature: float
    seed: int
    start: str


@dataclass(frozen=True)
class Limits:
    """Where frames are flagged and where a run ends.

    Attributes:
        threshold: σ of a flagged frame [eV/Å].
        stop_above: σ at which a run ends [eV/Å].
        hottest: temperature, in units of the target's.
        closest: distance, in units of the sum of covalent radii.
        cutoff: of the network [Å]; it knows next to nothing of an atom whose neighbours are all near it or beyond.
    """

    threshold: float
    stop_above: float
    hottest: float
    closest: float
    cutoff: float

    def rules(self, temperature: float, elements: Collection[int]) -> Rules:
        """Return the rules of a run at a temperature [K], of atoms with these atomic numbers."""
        closest = closest_allowed(elements, share=self.closest)
        return Rules(self.stop_above, closest, self.hottest * temperature, self.cutoff)


@dataclass(frozen=True)
class Seen:
    """A frame that an exploration came by.

    Attributes:
        frame: the structure alone.
        run: what it is of.
        time: [fs].
        sigma: its largest atomic force σ [eV/Å].
    """

    frame: Frame
    run: Run
    time: float
    sigma: float


def plan_runs(settings: ExploreSection, starts: Sequence[Frame], seed: int, number: int) -> list[tuple[Run, Frame]]:
    """Return the runs of round ``number`` and their start structures, drawn anew for each temperature."""
    rng = np.random.default_rng([seed, number])
    plan: list[tuple[Run, Frame]] = []
    for temperature in settings.temperatures:
        chosen = rng.choice(len(starts), size=settings.starts, replace=len(starts) < settings.starts)
        for start in chosen:
            for _ in range(settings.seeds):
                name = f"{len(plan):03d}_{temperature:g}K"
                own = int(rng.integers(2**31))
                plan.append((Run(name, temperature, own, frame_key(starts[start])), starts[start]))
    return plan


def explore(
    plan: Sequence[tuple[Run, Frame]],
    model: Path,
    folder: Path,
    settings: ExploreSection,
    limits: Limits,
    device: str,
) -> list[dict[str, Any]]:
    """Compute the runs that are not in ``folder`` yet; return a summary of each (``run.json``)."""
    left = [Job(run, start, model, folder, settings, limits, device) for run, start in plan if not _over(run, folder)]
    at_once(explore_one, left, settings.workers)
    return [read_json(folder / run.name / DONE) for run, _ in plan]


def _over(run: Run, folder: Path) -> bool:
    """Return whether a run is complete; one of other settings in its place is removed."""
    found = read_json(folder / run.name / DONE)
    if found is not None and all(found[name] == value for name, value in asdict(run).items()):
        return True
    shutil.rmtree(folder / run.name, ignore_errors=True)
    return False


@dataclass(frozen=True)
class Job:
    """A run, where it starts, the file of the model, the folder of all runs, how, up to where, and on what device."""

    run: Run
    start: Frame
    model: Path
    folder: Path
    settings: ExploreSection
    limits: Limits
    device: str


def explore_one(job: Job) -> None:
    """Compute one run; its folder appears when it is over."""
    run, folder = job.run, job.folder
    with whole_folder(folder / run.name) as part:  # one that outlived a kill may be there first, with the same numbers
        summary = {**asdict(run), **dynamics(run, job.start, job.model, part, job.settings, job.limits, job.device)}
        write_json(part / DONE, summary)


def dynamics(
    run: Run, start: Frame, model: Path, folder: Path, settings: ExploreSection, limits: Limits, device: str
) -> dict[str, Any]:
    """Run molecular dynamics; the one place that calls it.

    Returns:
        ``stopped`` (the time [fs] at which σ ended the run, or None) and ``exploded`` (what went wrong, or None).
    """
    calculator = DropoutCalculator(
        _model(model, model.stat().st_mtime_ns, device), settings.samples, uncertainty_every=settings.record_every
    )
    ensembles: dict[str, NVE | NVT | NPT] = {
        "nve": NVE(),
        "nvt": NVT(settings.friction),
        "npt": NPT(settings.pressure),
    }
    stopped, exploded = None, None
    try:
        stopped = run_md(
            start.to_atoms(),
            calculator,
            folder,
            ensemble=ensembles[settings.ensemble],
            temperature=run.temperature,
            steps=settings.steps,
            timestep=settings.timestep,
            record_every=settings.record_every,
            seed=run.seed,
            threshold=limits.threshold,
            stop_above=limits.stop_above,
        ).stopped
    except ValueError as error:
        if not _recorded(folder):  # it did not even start: the settings are at fault
            raise
        exploded = str(error)[:300]
    return {"stopped": stopped, "exploded": exploded}


def _recorded(folder: Path) -> int:
    path = folder / "md.h5"
    if not path.exists():
        return 0
    with FrameStore(path) as store:
        return len(store)


@lru_cache(maxsize=1)
def _model(path: Path, changed: int, device: str) -> TrainedModel:
    """Load a model once for all runs of a process."""
    return load_model(path, pick_device(device))


def acceptable(folder: Path, run: Run, limits: Limits) -> Iterator[Seen]:
    """Yield the frames of a run up to the first that shows that it went astray, without the start.

    Astray is what :class:`~forcedrop.md.astray.Rules` say: σ above the limit, atoms nearer than any bond, an absurd temperature,
    an atom that has gone out of sight of the others. Frames with an atom that was so from the start are left out, no more.
    """
    with FrameStore(folder / run.name / "md.h5") as store:
        frames = store[:]
    rules = limits.rules(run.temperature, {int(z) for frame in frames for z in frame.z})
    always = rules.alone(frames[0]) if frames else None
    for frame in frames:
        away = rules.alone(frame)
        sigma, temperature = frame.info["max_force_sigma_eV_A"], frame.info["temperature_K"]
        if rules.trouble(frame, sigma, temperature, away, always) is not None:
            return
        if frame.info["step"] > 0 and away is not None and not away.any():
            alone = Frame(z=frame.z, pos=frame.pos, cell=frame.cell, pbc=frame.pbc)
            yield Seen(alone, run, float(frame.info["time_fs"]), float(frame.info["max_force_sigma_eV_A"]))


def explored(found: Mapping[str, Any], folder: Path, limits: Limits) -> list[Seen]:
    """Return all acceptable frames of all runs of an exploration; ``found`` as :func:`summary` gives it."""
    runs = [Run(**{f.name: details[f.name] for f in fields(Run)}) for details in found["details"]]
    return [seen for run in runs for seen in acceptable(folder, run, limits)]


def credible(labelled: Sequence[Frame], threshold: float) -> float:
    """Return the σ [eV/Å] from which on a network knows nothing of a frame: as large as the forces themselves.

    That is the root mean square of the atoms' forces in the median labelled frame (a few absurd labels must not raise it), but at
    least twice the threshold of flagging, as frames near equilibrium have none.
    """
    forces = [np.sqrt(np.mean(np.sum(f.forces**2, axis=1))) for f in labelled if f.forces is not None and len(f) > 1]
    return max(float(np.median(forces)) if forces else 0.0, 2 * threshold)


def before_high(seen: Sequence[Seen], most: float) -> list[Seen]:
    """Return the frames of every run before the first with a σ above ``most`` [eV/Å]."""
    over: set[str] = set()
    kept = []
    for one in seen:
        if one.sigma > most:
            over.add(one.run.name)
        if one.run.name not in over:
            kept.append(one)
    return kept


def summary(runs: Sequence[dict[str, Any]], folder: Path, limits: Limits) -> dict[str, Any]:
    """Return the numbers of an exploration."""
    total = 0.0
    for run in runs:
        last = (folder / run["name"] / "md.csv").read_text(encoding="utf-8").splitlines()
        column = last[0].split(",").index("time_fs")
        total += float(last[-1].split(",")[column])
    return {
        "threshold": limits.threshold,
        "stop_above": limits.stop_above,
        "runs": len(runs),
        "ps": round(total / 1000, 4),
        "stopped": sum(run["stopped"] is not None for run in runs),
        "exploded": sum(run["exploded"] is not None for run in runs),
        "details": list(runs),
    }
