import numpy as np
import pytest
import torch

from forcedrop.derive import derive
from forcedrop.graph import batch_graphs
from forcedrop.training.config import LossSection
from forcedrop.training.losses import plain_loss, targets
from tests.conftest import ethanol, graph_of, make_potential, silicon

SCALE = torch.tensor(0.7, dtype=torch.float64)


def batch(with_labels: bool = True):
    labels = {"energy": -30.0, "forces": np.full((9, 3), 0.2)} if with_labels else {}
    crystal = {"energy": -60.0, "stress": np.full(6, 0.01)} if with_labels else {}
    return batch_graphs([graph_of(ethanol(), 4.0, **labels), graph_of(silicon(), 4.0, **crystal)])


def test_plain_loss_by_hand() -> None:
    b = batch()
    out = derive(make_potential(), b)
    weights = LossSection(energy=2.0, forces=3.0, stress=5.0)
    e = ((out.energy - b.energy) / torch.tensor([9.0, 2.0], dtype=torch.float64).sqrt() / SCALE).square().mean()
    f = ((out.forces[:9] - 0.2) / SCALE).square().mean()
    w = ((out.stress[1] - 0.01) * b.volume[1] / 2**0.5 / SCALE).square().mean()
    assert float(plain_loss(out, targets(b), weights, SCALE)) == pytest.approx(float(2 * e + 3 * f + 5 * w), rel=1e-10)


def test_missing_labels_do_not_count() -> None:
    out = derive(make_potential(), batch(False))
    assert float(plain_loss(out, targets(batch(False)), LossSection(), SCALE)) == 0.0


def test_the_ramp_is_of_energy_and_stress() -> None:
    b = batch()
    out = derive(make_potential(), b)
    weights = LossSection(energy=2.0, forces=3.0, stress=5.0)
    none, half, whole = (float(plain_loss(out, targets(b), weights, SCALE, ramp)) for ramp in (0.0, 0.5, 1.0))
    forces = float(plain_loss(out, targets(b), LossSection(energy=0, forces=3.0, stress=0), SCALE))
    assert none == pytest.approx(forces)
    assert half == pytest.approx((none + whole) / 2)
