"""Long guarded dynamics of the shipped ethanol: memory stays flat, energy too, and the file opens at any moment."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from forcedrop import DropoutCalculator, FrameStore, read_frames, run_md
from forcedrop.md import Band, GuardSettings

DATA = Path(__file__).resolve().parents[2] / "data"
PICOSECONDS = 20.0


def rss_kb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e3


@pytest.mark.slow
def test_memory_is_flat_and_energy_does_not_drift(tmp_path: Path) -> None:
    calculator = DropoutCalculator(DATA / "ethanol.pt", 8, uncertainty_every=10**9)
    memory: list[float] = []

    def look(atoms: Atoms) -> None:
        with FrameStore(tmp_path / "md.h5") as store:
            np.testing.assert_array_equal(store[len(store) - 1].pos, atoms.positions)
        memory.append(rss_kb())

    atoms = read_frames(DATA / "ethanol_300K.h5")[0].to_atoms()
    run = run_md(
        atoms, calculator, tmp_path, steps=round(2000 * PICOSECONDS), timestep=0.5, record_every=40, on_record=look,
        guard=GuardSettings(Band(0.04, 1.0), check_every=20),
    )  # fmt: skip
    assert run.stopped is None
    assert abs(run.drift.mean) < 0.1
    assert run.drift.fluctuation < 1.0
    quarters = [float(np.median(part)) for part in np.array_split(memory, 4)]  # the allocator comes and goes by 10 MB
    assert abs(quarters[3] - quarters[1]) < 12_000, quarters
    assert (tmp_path / "md.h5").stat().st_size < 4000 * len(memory) + 500_000
