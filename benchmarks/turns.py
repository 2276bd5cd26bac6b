"""Programs that take turns: each measures in a process of its own that does nothing while the others do.

A machine is never quiet for long, so only ratios of medians over rounds mean anything. A script calls :func:`take_turns`; the
processes run the same script with ``--worker KIND`` and end in :func:`serve`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Measured = Mapping[str, Callable[[], Any]]
"""What is timed, by name."""


def options(doc: str | None, data: Path, workers: Iterable[str] | None = None) -> argparse.ArgumentParser:
    """Return the options of a script whose workers take turns."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=data, help="extended XYZ file of 3BPA")
    parser.add_argument("--mace-python", type=Path, help="interpreter of the environment with mace-torch")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--quick", action="store_true", help="to try the script: small and short, writes nothing")
    parser.add_argument("--worker", choices=workers and list(workers), help=argparse.SUPPRESS)
    return parser


def commands(script: str, kinds: Iterable[str], given: argparse.Namespace) -> dict[str, list[str]]:
    """Return the command of each kind of worker; those that start with MACE have an interpreter of their own, or are left out."""
    rest = ["--data", str(given.data), "--threads", str(given.threads), *(["--quick"] if given.quick else [])]
    pythons = {kind: given.mace_python if kind.startswith("MACE") else Path(sys.executable) for kind in kinds}
    return {kind: [str(python), script, "--worker", kind, *rest] for kind, python in pythons.items() if python}


def take_turns(commands: Mapping[str, Sequence[str]], given: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Start a process for each kind, let them measure in turn, return medians [ms] by kind and by what was measured."""
    workers = {kind: _Worker(command) for kind, command in commands.items()}
    times: dict[str, dict[str, list[float]]] = {kind: {} for kind in workers}
    for _ in range(1 if given.quick else given.rounds):
        for kind, worker in workers.items():
            for what, values in worker.turn().items():
                times[kind].setdefault(what, []).extend(values)
    for worker in workers.values():
        worker.end()
    return {
        kind: {what: round(1e3 * statistics.median(v), 3) for what, v in rows.items()} for kind, rows in times.items()
    }


class _Worker:
    """A process that measures when it is asked to."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(list(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._read()  # warm

    def turn(self) -> dict[str, list[float]]:
        """Return the times [s] of one round, by what was measured."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self._read()

    def end(self) -> None:
        """Let the process come to its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _read(self) -> dict[str, list[float]]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                found: dict[str, list[float]] = json.loads(line)
                return found
        raise RuntimeError("a worker ended without an answer; its error is above")


def serve(measured: Measured, threads: int, calls: int = 5) -> None:
    """Warm up, say so, then measure a round for each line that comes in."""
    import torch

    torch.set_num_threads(threads)
    for function in measured.values():
        for _ in range(3):
            function()
    print("{}", flush=True)
    for _ in sys.stdin:
        found = {what: [_timed(function) for _ in range(calls)] for what, function in measured.items()}
        print(json.dumps(found), flush=True)


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as text."""
    columns = list(rows[0])
    cells = [columns, *([str(row[c]) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)) for line in cells)
