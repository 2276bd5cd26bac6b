"""A learning loop that is killed (-9) at random moments must end as one that is left alone.

    python benchmarks/kill_loop.py --kills 20     # a few minutes; writes results/kill_loop.json

Copper cells of four atoms, EMT, a tiny network. A loop is run in peace, then another is killed and started again, with the same
command, and at last left alone. Compared are the labels (which frames, and that each is right), and counted is every call of the
oracle: a frame whose label is on disk must never be computed again.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from common import environment, write_results

from forcedrop.active.audit import audit_rows
from forcedrop.active.state import State, frame_key
from forcedrop.structures import Frame, check_frames, write_frames

ROOT = Path(__file__).resolve().parent.parent
ORACLE = '''
import json
import time
from pathlib import Path
from ase.calculators.emt import EMT


class Counting(EMT):
    """EMT that notes every call, and takes its time."""

    def calculate(self, atoms=None, properties=("energy",), system_changes=()):
        line = {"z": atoms.numbers.tolist(), "pos": atoms.positions.tolist(), "cell": atoms.cell.array.tolist()}
        with (Path(__file__).parent / "calls.jsonl").open("a") as stream:
            stream.write(json.dumps(line) + "\\n")
        time.sleep(PAUSE)
        super().calculate(atoms, properties, system_changes)


def make():
    return Counting()
'''
PAUSE = 0.3
"""Of every label [s], so that kills meet labels, too."""


def main() -> None:
    """Run both loops and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = compare(Path(folder), arguments.kills, arguments.seed)
    print(json.dumps(found, indent=1))
    write_results("kill_loop", {**found, "environment": environment(arguments.seed)})


class Process(Protocol):
    """A loop that runs."""

    pid: int
    returncode: int | None

    def wait(self, timeout: float | None = None) -> int:
        """Return its status; ``subprocess.TimeoutExpired`` if it goes on for longer."""
        ...


Start = Callable[[Path], Process]


def compare(folder: Path, kills: int, seed: int, start: Start | None = None, **changes: Any) -> dict[str, Any]:
    """Return what became of a loop in peace and of those that were killed, as many as it takes for so many kills.

    Args:
        folder: for all.
        kills: how often in all.
        seed: of the moments.
        start: how to start a loop, by default as a command.
        changes: of the file of the loop.
    """
    start = start or begin
    peace = set_up(folder / "peace", changes)
    clock = time.monotonic()
    process = start(peace)
    begun = until_it_works(peace, process)
    if process.wait():
        raise RuntimeError("the loop in peace failed")
    work = time.monotonic() - clock - begun
    rng, reference = np.random.default_rng(seed), judge(peace, [])
    stages: list[str] = []
    wars: list[dict[str, Any]] = []
    while len(stages) < kills:
        war = set_up(folder / f"war-{len(wars)}", changes)
        more, done = kill(war, kills - len(stages), rng, work / min(kills, 10), start)
        stages += more
        wars.append(judge(war, done))
    return {
        "kills": len(stages),
        "killed_in": dict(Counter(stages)),
        "loops_killed": len(wars),
        "seconds_of_work_in_peace": round(work, 1),
        "labels": {"in peace": reference["labels"], "killed": [war["labels"] for war in wars]},
        "same_frames": all(war["keys"] == reference["keys"] for war in wars),
        "same_labels": all(war["hash"] == reference["hash"] for war in wars),
        "valid_store": all(war["valid"] for war in wars),
        "calls": {"in peace": reference["calls"], "killed": [war["calls"] for war in wars]},
        "calls_cut_off": sum(war["calls"] - war["labels"] for war in wars),
        "labelled_twice": sum(war["twice"] for war in wars),
        "attempts_that_failed": sum(war["failures"] for war in wars),
    }


def set_up(folder: Path, changes: dict[str, Any]) -> Path:
    """Write the file of a loop, its oracle and its start frames."""
    folder.mkdir(parents=True)
    (folder / "counting.py").write_text(ORACLE.replace("PAUSE", str(PAUSE)))
    rng = np.random.default_rng(7)
    frames = []
    for _ in range(12):
        atoms = bulk("Cu", a=3.6, cubic=True)
        atoms.positions += rng.normal(scale=0.08, size=(4, 3))
        frames.append(Frame.from_atoms(atoms))
    write_frames(folder / "start.h5", frames)
    values = {
        "state": "state",
        "start": {"files": ["start.h5"]},
        "oracle": {"name": "counting:make"},
        "training": {
            "model": {"cutoff": 4.0, "n_channels": 4, "l_max": 2, "n_radial": 4, "n_hidden": 4},
            "optimiser": {"warmup_steps": 5, "ema_decay": 0.8},
            "data": {"validation_fraction": 0.15, "calibration_fraction": 0.25},
            "batch_size": 4,
            "device": "cpu",
            "checkpoint_seconds": 0,
        },
        "retraining": {"steps": 24},
        "explore": {
            "temperatures": [600], "starts": 2, "steps": 20, "timestep": 2.0, "record_every": 4, "samples": 4,
            "quantile": 0.0, "stop_above": 100.0,
        },
        "pick": {"batch": 4, "check": 1, "min_distance": 0.01},
        "stop": {"labels": 20},
        "device": "cpu",
        **changes,
    }  # fmt: skip
    (folder / "loop.yaml").write_text(yaml.safe_dump(values))
    return folder


def begin(folder: Path) -> Process:
    """Start the loop, or go on with it: always the same command."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with (folder / "stderr").open("ab") as stderr:
        return subprocess.Popen(
            [sys.executable, "-m", "forcedrop", "active", str(folder / "loop.yaml")],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )


def kill(
    folder: Path, most: int, rng: np.random.Generator, between: float, start: Start
) -> tuple[list[str], list[tuple[set[str], Counter[str]]]]:
    """Kill a loop at random moments until it is over, or as often as asked, and then let it end.

    Args:
        folder: of the loop.
        most: kills at most.
        rng: of the moments.
        between: time that a loop works until it is killed, on average [s].
        start: how to start a loop.

    Returns:
        The stage that each kill met, and the labels that were done then, with the calls for each.
    """
    stages, done = [], []
    while len(stages) < most:
        process = start(folder)
        until_it_works(folder, process)
        try:
            status = process.wait(rng.uniform(0, 2 * between))
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            stages.append(stage(folder))
            done.append((labels_done(folder), calls(folder)))
            continue
        if status:
            raise RuntimeError(f"the loop ended with status {status}")
        break
    for _ in range(2):  # to its end, and once more: then there is nothing left to do
        if start(folder).wait():
            raise RuntimeError("the loop failed after the last kill")
        done.append((labels_done(folder), calls(folder)))
    return stages, done


def until_it_works(folder: Path, process: Process) -> float:
    """Wait until a loop that was just started writes its first file, or ends; return how long it took [s]."""
    clock, path = time.monotonic(), folder / "state" / "loop.json"
    before = path.stat().st_mtime_ns if path.exists() else 0
    while not (path.exists() and path.stat().st_mtime_ns > before):
        try:
            process.wait(0.01)
            break
        except subprocess.TimeoutExpired:
            continue
    return time.monotonic() - clock


def stage(folder: Path) -> str:
    """Return the stage that is not over."""
    state = State(folder / "state")
    number = max(state.rounds(), default=0)
    order = ("pick", "append") if number == 0 else ("train", "explore", "pick", "label", "judge", "append")
    for name in order:
        if state.result(number, name) is None:
            return name if number else "start"
    return "between rounds"


def labels_done(folder: Path) -> set[str]:
    """Return the frames whose label is on disk."""
    state = State(folder / "state")
    return {k for n in state.rounds() for k, record in state.records(n).items() if record.get("status") == "labelled"}


def calls(folder: Path) -> Counter[str]:
    """Return how often the oracle was called for each frame."""
    path = folder / "calls.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    keys: Counter[str] = Counter()
    for line in lines:
        try:
            values = json.loads(line)
        except json.JSONDecodeError:  # killed while writing it
            continue
        atoms = Atoms(numbers=values["z"], positions=values["pos"], cell=values["cell"], pbc=True)
        keys[frame_key(Frame.from_atoms(atoms))] += 1
    return keys


def judge(folder: Path, done: list[tuple[set[str], Counter[str]]]) -> dict[str, Any]:
    """Return what is in the store, whether it is right, and how often the oracle was called."""
    state = State(folder / "state")
    frames = state.frames()
    keys = [frame_key(frame) for frame in frames]
    valid = not check_frames(frames) and len(set(keys)) == len(keys)
    for frame in frames:
        atoms = frame.to_atoms()
        atoms.calc = EMT()
        valid &= abs(atoms.get_potential_energy() - frame.energy) < 1e-9
        valid &= bool(np.abs(atoms.get_forces() - frame.forces).max() < 1e-9)
        valid &= bool(np.abs(atoms.get_stress() - frame.stress).max() < 1e-9)
    last = calls(folder)
    # a frame that had its label at some moment must not have been computed after it
    twice = {key for labelled, counts in done for key in labelled if last[key] > counts[key]}
    rows = audit_rows(state)
    return {
        "labels": len(keys),
        "keys": sorted(keys),
        "hash": sorted((key, frame.energy) for key, frame in zip(keys, frames, strict=True)),
        "valid": bool(valid),
        "calls": sum(last.values()),
        "twice": len(twice),
        "failures": sum(bool(row["failures"]) for row in rows),
    }


if __name__ == "__main__":
    main()
