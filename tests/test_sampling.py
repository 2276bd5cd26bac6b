import pytest
import torch

from forcedrop import sampling
from forcedrop.derive import derive, derive_samples
from forcedrop.potential import DropoutRates, Potential
from forcedrop.sampling import (
    committee,
    draw_masks,
    predict,
    predict_graphs,
    reduce_samples,
    sampled,
    samples_at_once,
)
from tests.conftest import batch_of, ethanol, graph_of, make_potential, silicon
from tests.shapes import check_derived


def test_mean_and_std_are_those_of_the_samples() -> None:
    potential, batch = make_potential(), batch_of([ethanol(), silicon()], 4.0)
    out = predict(potential, batch, n_samples=5)
    check_derived(out.samples, 2, 11, samples=5)
    check_derived(out.mean, 2, 11)
    for samples, mean, std in zip(out.samples, out.mean, out.std, strict=True):
        torch.testing.assert_close(mean, sum(samples) / 5)
        torch.testing.assert_close(std, (((samples - mean) ** 2).sum(0) / 4).sqrt())


def with_posterior(potential: Potential) -> Potential:
    """Give a network without sites something to sample."""
    potential.posterior = 1e-2 * torch.eye(potential.n_readout, dtype=torch.float64)
    return potential


@pytest.mark.parametrize("masked", [True, False])
def test_little_memory_means_fewer_samples_at_once_and_the_same_result(masked, monkeypatch) -> None:
    potential = make_potential() if masked else with_posterior(make_potential(rates=DropoutRates()))
    batch = batch_of([ethanol()], 4.0)
    at_once = []

    def counted(potential, batch, masks):
        at_once.append(len(next(iter(masks.values()))))
        return derive_samples(potential, batch, masks)

    monkeypatch.setattr(sampling, "derive_samples", counted)
    whole = predict(potential, batch, n_samples=7)
    one = 1.0 / samples_at_once(potential, batch, 1.0)  # GiB of a sample, to rounding
    three = predict(potential, batch, n_samples=7, max_memory=3.01 * one)
    least = predict(potential, batch, n_samples=7, max_memory=1e-9)
    assert at_once == [7, 3, 3, 1, *[1] * 7]
    for parts in (three, least):
        for a, b in zip(whole.samples, parts.samples, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="must be positive"):
        predict(potential, batch, n_samples=7, max_memory=0)


def test_one_sample_has_no_spread() -> None:
    potential, batch = make_potential(), batch_of([ethanol()], 4.0)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        predict(potential, batch, n_samples=1)
    samples = predict(potential, batch, n_samples=2).samples
    with pytest.raises(ValueError, match="at least 2"):
        reduce_samples(type(samples)(*(x[:1] for x in samples)))


def test_edge_masks_are_symmetric_and_independent_of_the_batch() -> None:
    potential = make_potential()
    alone, joined = batch_of([ethanol()], 4.0), batch_of([silicon(), ethanol()], 4.0)
    a = draw_masks(potential, alone, 0, 3)["layers.0.edges"]
    b = draw_masks(potential, joined, 0, 3)["layers.0.edges"]
    flat = a.flatten(1)
    assert torch.equal(flat[:, alone.nbr_reverse.reshape(-1)], flat)
    assert torch.equal(a[:, alone.nbr_used], b[:, 2:][:, joined.nbr_used[2:]])


def test_graphs_in_groups_equal_one_by_one() -> None:
    potential = make_potential()
    images = [ethanol(0), silicon(), ethanol(1), ethanol(2)]
    graphs = [graph_of(a, 4.0) for a in images]
    for batch_atoms in (1, 12, 1000):
        found = list(predict_graphs(sampled(potential, 3, 0), graphs, batch_atoms=batch_atoms))
        assert len(found) == len(images)
        for atoms, p in zip(images, found, strict=True):
            batch = batch_of([atoms], 4.0)
            expected, plain = predict(potential, batch, n_samples=3), derive(potential, batch)
            assert p.mean["energy"] == pytest.approx(float(expected.mean.energy), abs=1e-10)
            assert abs(p.std["forces"] - expected.std.forces.numpy()).max() < 1e-10
            assert abs(p.plain["stress"] - plain.stress[0].numpy()).max() < 1e-10


def test_a_committee_is_its_members() -> None:
    potentials = [make_potential(seed=k) for k in range(3)]
    batch = batch_of([ethanol(), silicon()], 4.0)
    prediction, plain = committee(potentials)(batch)
    forces = torch.stack([derive(p, batch).forces for p in potentials])
    torch.testing.assert_close(prediction.samples.forces, forces)
    torch.testing.assert_close(plain.forces, forces.mean(0))
    torch.testing.assert_close(prediction.std.forces, forces.std(0, correction=1))
