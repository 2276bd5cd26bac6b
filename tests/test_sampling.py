import pytest
import torch

from forcedrop.derive import derive
from forcedrop.sampling import committee, draw_masks, predict, predict_graphs, reduce_samples, sampled
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


def test_chunks_change_nothing() -> None:
    potential, batch = make_potential(), batch_of([ethanol()], 4.0)
    whole, parts = (predict(potential, batch, n_samples=7, chunk=chunk) for chunk in (None, 3))
    for a, b in zip(whole.samples, parts.samples, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


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
