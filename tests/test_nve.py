"""Two picoseconds of ethanol at constant energy, with the model that ships in ``data/``: the mean and every sample."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import units
from ase.data import atomic_masses

from forcedrop import DropoutCalculator, load_model, read_frames, run_md
from forcedrop.derive import derive
from forcedrop.dropout import frozen
from forcedrop.graph import NeighbourFinder, batch_graphs, build_graph
from forcedrop.md import energy_drift
from forcedrop.model import TrainedModel
from forcedrop.structures import Frame

DATA = Path(__file__).resolve().parent.parent / "data"
STEPS, STEP_FS, SAMPLES = 4000, 0.5, 4
MOST = 1.0  # meV/atom/ps


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return load_model(DATA / "ethanol.pt")


@pytest.fixture(scope="module")
def start() -> Frame:
    return read_frames(DATA / "ethanol_300K.h5")[0]


def test_the_mean_conserves_energy(model: TrainedModel, start: Frame, tmp_path: Path) -> None:
    calculator = DropoutCalculator(model, n_samples=SAMPLES)
    run = run_md(start.to_atoms(), calculator, tmp_path, steps=STEPS, timestep=STEP_FS, record_every=20)
    assert abs(run.drift.mean) < MOST
    assert run.drift.fluctuation < 1.0
    temperature = np.mean([row["temperature_K"] for row in run.rows])
    assert 150 < temperature < 450  # it moved, and did not explode


def test_every_sample_conserves_energy(model: TrainedModel, start: Frame) -> None:
    """Each of K molecules moves in the potential of its own function, all at once."""
    potential, finder = model.potential, NeighbourFinder(model.potential.cutoff)
    mass = np.tile(atomic_masses[start.z], SAMPLES)[:, None]
    velocity = np.random.default_rng(0).normal(size=(len(mass), 3)) * np.sqrt(units.kB * 300 / mass)

    def evaluate(pos: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        images = [Frame(**{**vars(start), "pos": part}) for part in np.split(pos, SAMPLES)]
        batch = batch_graphs([build_graph(image, finder, model.dtype) for image in images])
        with frozen(potential, model.seed, batch.batch):  # the k-th of the molecules in function k
            out = derive(potential, batch)
        return out.energy.detach().numpy(), out.forces.detach().double().numpy()

    pos = np.tile(start.pos, (SAMPLES, 1))
    energy, forces = evaluate(pos)
    assert np.ptp(energy) > 0  # they are different functions
    dt = STEP_FS * units.fs
    total = []
    for step in range(STEPS):
        velocity = velocity + 0.5 * dt * forces / mass
        pos = pos + dt * velocity
        energy, forces = evaluate(pos)
        velocity = velocity + 0.5 * dt * forces / mass
        if step % 20 == 0:
            kinetic = 0.5 * (mass * velocity**2).reshape(SAMPLES, -1).sum(1)
            total.append(np.append(step * STEP_FS, energy + kinetic))
    for k, column in enumerate(np.array(total).T[1:]):
        rows = [{"time_fs": t, "total_eV": e} for t, e in zip(np.array(total)[:, 0], column, strict=True)]
        drift = energy_drift(rows, len(start))
        assert abs(drift.mean) < MOST, (k, drift)
        assert drift.fluctuation < 1.0, (k, drift)
    assert torch.isfinite(torch.as_tensor(pos)).all()
