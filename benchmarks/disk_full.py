"""A disk that becomes full at any moment must end a command with one line, leave nothing damaged, and cost nothing but time.

    sudo python benchmarks/disk_full.py            # an hour; writes results/disk_full.json, and goes on with it
    sudo python benchmarks/disk_full.py md --sizes 5

``md``, ``train`` and ``active`` run in a file system in memory (tmpfs, which only root may mount) of 40 sizes, from next to
nothing to all that the command needs. Then there is room, and the same command goes on. Copper cells of four atoms, EMT, tiny
networks. Of every size is counted: exit status 1 and one line that says that the disk is full and names a file in it; no
traceback; no half-written file left; every file that is there readable; and whether what the command ends with afterwards is what
it ends with on a large disk: frames, rows, labels and weights, to the same bits.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from ase.build import bulk
from ase.calculators.emt import EMT
from common import environment, read_results, write_results

from forcedrop.files import load_tensors
from forcedrop.structures import Frame, FrameStore, read_frames, write_frames

ROOT = Path(__file__).resolve().parent.parent
SEED = 0
KINDS = ("md", "train", "active")
NETWORK = {"cutoff": 4.0, "n_channels": 4, "n_hidden": 4, "l_message": 1}


def copper(count: int) -> list[Frame]:
    """Return labelled cells of four atoms."""
    rng, frames = np.random.default_rng(SEED), []
    for _ in range(count):
        atoms = bulk("Cu", cubic=True)
        atoms.positions += rng.normal(scale=0.1, size=(len(atoms), 3))
        atoms.calc = EMT()
        frames.append(Frame.from_atoms(atoms, energy=atoms.get_potential_energy(), forces=atoms.get_forces()))
    return frames


class Problem:
    """A command with its inputs, which lie on a disk of their own.

    Args:
        kind: of ``KINDS``.
        folder: for the inputs.
        disk: where the small disk is.
    """

    def __init__(self, kind: str, folder: Path, disk: Path) -> None:
        self.kind, self.disk, self.out = kind, disk, disk / "out"
        write_frames(folder / "copper.h5", copper(40))
        training = {
            "data": {"train": [str(folder / "copper.h5")], "calibration_fraction": 0.2},
            "model": NETWORK, "batch_size": 4, "epochs": 2, "uncertainty": {"functions": 8},
        }  # fmt: skip
        if kind == "active":
            training |= {"data": {"calibration_fraction": 0.2}}
            del training["epochs"]
            values: dict[str, Any] = {
                "state": str(self.out), "start": {"files": [str(folder / "copper.h5")], "frames": 16},
                "oracle": {"name": "emt"}, "training": training, "retraining": {"steps": 20},
                "explore": {
                    "temperatures": [600], "starts": 1, "steps": 24, "timestep": 2.0, "record_every": 4,
                    "ensemble": "nvt", "quantile": 0.1, "stop_above": 50.0,
                },
                "pick": {"batch": 3, "check": 1}, "stop": {"labels": 22, "force_rmse": 0.0001},
            }  # fmt: skip
        else:
            values = {"output": str(self.out if kind == "train" else folder / "model"), **training}
        config = folder / f"{kind}.yaml"
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        if kind == "md":
            self.run(["train", str(config)], folder / "log")
            model = folder / "model" / "model.pt"
            self.command = ["md", str(model), str(folder / "copper.h5"), "--ensemble", "nvt", "--steps", "60"]
            self.command += ["--record-every", "1", "--samples", "4", "--output", str(self.out)]
        else:
            self.command = [kind, str(config)]
        self.again = self.command if kind == "active" else [*self.command, "--resume"]

    def run(self, command: list[str], log: Path) -> tuple[int, str]:
        """Run a command in a process; return its exit status and what it said, without progress bars."""
        start = [sys.executable, "-m", "forcedrop", *command]
        with log.open("wb") as stream:
            code = subprocess.run(start, stdout=stream, stderr=stream, timeout=600, cwd=ROOT, check=False).returncode
        return code, log.read_text(encoding="utf-8", errors="replace")

    def damaged(self) -> list[str]:
        """Return the names of the files that cannot be read."""
        return [path.name for path in sorted(self.out.rglob("*")) if path.is_file() and not _readable(path)]

    def result(self) -> dict[str, Any]:
        """Return what the command has ended with."""
        if self.kind == "md":
            found = [hashlib.sha256((self.out / name).read_bytes()).hexdigest() for name in ("md.csv", "md.xyz")]
            return {"files": found, "frames": FrameStore(self.out / "md.h5").content_hash()}
        found = {"weights": _weights(self.out / "model.pt")}
        if self.kind == "active":
            store = FrameStore(self.out / "labels.h5")
            found |= {"labels": len(store), "frames": store.content_hash()}
        return found


def _readable(path: Path) -> bool:
    try:
        if path.suffix == ".h5":
            list(FrameStore(path))
        elif path.suffix == ".pt":
            load_tensors(path)
        elif path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".jsonl":
            [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        elif path.suffix == ".xyz":
            return path.stat().st_size == 0 or bool(read_frames(path, predictions="keep", tell=lambda _: None))
        elif path.suffix == ".csv":
            rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
            return all(len(row) == len(rows[0]) for row in rows)
        elif path.suffix == ".yaml":
            yaml.safe_load(path.read_text(encoding="utf-8"))
        elif path.suffix == ".png":
            return path.read_bytes()[-12:-4] == b"\x00\x00\x00\x00IEND"
    except (ValueError, OSError):
        return False
    return True


def _weights(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_tensors(path)["weights"].items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[None]:
    """Mount a file system of a size; there is nothing of it afterwards."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def one_size(problem: Problem, kilobytes: int, log: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what happened on a disk of a size."""
    disk = problem.disk
    with small_disk(disk, kilobytes):
        code, said = problem.run(problem.command, log)
        lines = [line for line in re.split(r"[\r\n]+", said) if line.startswith("error:")]
        row = {
            "kB": kilobytes,
            "status": code,
            "one_line": len(lines) == 1 and "the disk is full" in lines[0] and str(disk) in lines[0],
            "file": Path(match.group(1)).name if (match := re.search(r"cannot write ([^,\s]+)", said)) else None,
            "tracebacks": said.count("Traceback"),
            "half_written": len(list(disk.rglob("*.part*"))),
            "damaged": problem.damaged(),
        }
        if code != 0:
            subprocess.run(["mount", "-o", "remount,size=256M", str(disk)], check=True)
            row["status_with_room"], _ = problem.run(problem.again, log)
        row["same"] = problem.result() == wanted if row.get("status_with_room", code) == 0 else False
    right = (code == 1 and row["one_line"]) or code == 0
    row["right"] = bool(right and row["same"] and not (row["tracebacks"] or row["half_written"] or row["damaged"]))
    return row


def measure(kind: str, count: int, before: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what happened at all sizes so far, after each; those of before are not tried again."""
    with tempfile.TemporaryDirectory() as name:
        folder, disk = Path(name), Path(name) / "disk"
        (folder / "inputs").mkdir()
        problem = Problem(kind, folder / "inputs", disk)
        with small_disk(disk, 256 * 1024):
            start = time.monotonic()
            code, said = problem.run(problem.command, folder / "log")
            if code != 0:
                raise SystemExit(said)
            wanted, seconds = problem.result(), time.monotonic() - start
            used = os.statvfs(disk)
            needed = (used.f_blocks - used.f_bavail) * used.f_frsize // 1024
        rows = list(before.get("rows", []))
        needed = before.get("needed_kB", needed)
        for size in 8 + (0.98 * needed - 8) * np.linspace(0, 1, count) ** 2:
            kilobytes = int(size) // 4 * 4
            if any(row["kB"] == kilobytes for row in rows):
                continue
            rows.append(one_size(problem, kilobytes, folder / "log", wanted))
            print(kind, rows[-1], flush=True)
            yield {
                "needed_kB": needed,
                "seconds_undisturbed": round(seconds, 1),
                "sizes": len(rows),
                "right": sum(row["right"] for row in rows),
                "files_that_did_not_fit": sorted({row["file"] for row in rows if row["file"]}),
                "rows": rows,
            }


def main() -> None:
    """Measure the kinds that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--sizes", type=int, default=40)
    parser.add_argument("--again", action="store_true", help="do not go on from the results that are there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = read_results("disk_full") | {"environment": environment(SEED)}
    for kind in arguments.kinds:
        before = {} if arguments.again or arguments.sizes < 40 else results.get(kind, {})
        for found in measure(kind, arguments.sizes, before):
            results[kind] = found
            if arguments.sizes >= 40:
                write_results("disk_full", results)
        print(f"{kind}: {results[kind]['right']} of {results[kind]['sizes']} sizes are right")


if __name__ == "__main__":
    main()
