import numpy as np
import pytest
import torch
from scipy.stats import norm

from forcedrop.derive import Derived, derive
from forcedrop.graph import batch_graphs
from forcedrop.training.config import LossSection
from forcedrop.training.losses import likelihood_loss, plain_loss, targets
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


def test_likelihood_against_scipy() -> None:
    b = batch()
    out = derive(make_potential(), b)
    generator = torch.Generator().manual_seed(0)
    samples = Derived(*(x + 0.1 * torch.randn(6, *x.shape, generator=generator, dtype=x.dtype) for x in out))
    got = likelihood_loss(
        samples, targets(b), LossSection(energy=0, forces=1, stress=0), SCALE, mean_weight=0.0, beta=0.0
    )
    f = samples.forces[:, :9] / SCALE
    sigma = (f.var(0, correction=1) + 1e-6).sqrt()
    expected = -norm.logpdf(0.2 / float(SCALE), f.mean(0), sigma).mean() - 0.5 * np.log(2 * np.pi)
    assert float(got) == pytest.approx(expected, rel=1e-9)
