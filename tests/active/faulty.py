"""Oracles that go wrong in every way there is, told apart by the number of atoms, and note every call in a file."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from ase.calculators.calculator import all_changes
from ase.calculators.emt import EMT

RAISES, HANGS, DIES, NAN, HUGE, PRINTS = 1, 2, 3, 5, 6, 7


class Faulty(EMT):
    def __init__(self, log: str, healthy: bool = False, unlucky: int = 0) -> None:
        super().__init__()
        self.log, self.healthy, self.unlucky = log, healthy, unlucky

    def calculate(self, atoms: Any = None, properties: Any = ("energy",), system_changes: Any = all_changes) -> None:
        with Path(self.log).open("a") as stream:
            stream.write(f"{len(atoms)} {np.round(atoms.positions, 6).tolist()}\n")
        if Path(f"{self.log}.broken").exists():
            raise RuntimeError("no such program")
        n = 0 if self.healthy else len(atoms)
        if n == RAISES or (self.unlucky and round(1e6 * np.abs(atoms.positions).sum()) % self.unlucky == 0):
            raise RuntimeError("SCF not converged in 250 cycles")
        if n == HANGS:
            program = subprocess.Popen(["sleep", "3600"])
            Path(f"{self.log}.program").write_text(str(program.pid))
            program.wait()
        if n == DIES:
            os.write(2, b"out of memory\n")
            os._exit(3)
        super().calculate(atoms, properties, system_changes)
        if n == NAN:
            self.results["forces"][0] = np.nan
        if n == HUGE:
            self.results["forces"] = self.results["forces"] + 1e4
        if n == PRINTS:
            os.write(1, b"what a calculator has to say\n" * 100)


def oracle(log: str, healthy: bool = False, unlucky: int = 0) -> Faulty:
    return Faulty(log, healthy, unlucky)


def calls(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []
