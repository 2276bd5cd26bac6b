import pytest
import torch

from forcedrop.derive import derive, derive_functions
from forcedrop.potential import EnergyModel
from forcedrop.uncertainty import sampling
from forcedrop.uncertainty.sampling import predict, predict_graphs, reduce_samples, require_functions, samples_at_once
from tests.conftest import NONE, SAMPLED, banked_potential, batch_of, ethanol, graph_of, make_potential, silicon
from tests.shapes import check_derived


def test_mean_and_std_are_those_of_the_samples() -> None:
    potential, batch = make_potential(), batch_of([ethanol(), silicon()], 4.0)
    out = predict(potential, batch, n_samples=5)
    check_derived(out.samples, 2, 11, samples=5)
    check_derived(out.mean, 2, 11)
    for samples, mean, std in zip(out.samples, out.mean, out.std, strict=True):
        torch.testing.assert_close(mean, sum(samples) / 5)
        torch.testing.assert_close(std, (((samples - mean) ** 2).sum(0) / 4).sqrt())


def test_of_a_bank_energies_are_those_of_all_functions_and_the_mean_is_the_plain_network() -> None:
    potential, batch = banked_potential(n=8), batch_of([ethanol(), silicon()], 4.0)
    out, whole, plain = (
        predict(potential, batch, n_samples=3),
        predict(potential, batch, n_samples=8),
        derive(potential, batch),
    )
    check_derived(out.mean, 2, 11)
    assert out.samples.energy.shape == (8, 2)
    assert out.samples.energies.shape == (8, 11)
    assert (out.samples.forces.shape, out.samples.stress.shape) == ((3, 11, 3), (3, 2, 6))
    for name in ("energy", "energies"):
        torch.testing.assert_close(getattr(out.samples, name), getattr(whole.samples, name), rtol=0, atol=1e-11)
        torch.testing.assert_close(
            getattr(out.std, name), getattr(whole.samples, name).std(0, correction=1), rtol=0, atol=1e-11
        )
    torch.testing.assert_close(out.samples.energies.sum(1), out.samples.energy.sum(1), rtol=0, atol=1e-9)
    torch.testing.assert_close(out.std.forces, whole.samples.forces[:3].std(0, correction=1), rtol=0, atol=1e-11)
    for name in ("energy", "energies", "forces", "stress"):
        torch.testing.assert_close(getattr(out.mean, name), getattr(plain, name), rtol=1e-12, atol=1e-12)
        assert not torch.equal(getattr(out.samples, name)[:3].mean(0), getattr(plain, name))


@pytest.mark.parametrize("kind", list(SAMPLED))
def test_little_memory_means_fewer_samples_at_once_and_the_same_result(kind: str, monkeypatch) -> None:
    potential, batch, at_once = SAMPLED[kind](), batch_of([ethanol()], 4.0), []

    def counted(potential: EnergyModel, batch, samples, seed):
        at_once.append(len(samples))
        return derive_functions(potential, batch, samples, seed)

    monkeypatch.setattr(sampling, "derive_functions", counted)
    whole = predict(potential, batch, n_samples=7)
    one = 1.0 / samples_at_once(potential, batch, 1.0)  # GiB of a sample, to rounding
    three = predict(potential, batch, n_samples=7, max_memory=3.01 * one)
    least = predict(potential, batch, n_samples=7, max_memory=1e-9)
    assert at_once == [7, 3, 3, 1, *[1] * 7]
    for parts in (three, least):
        for a, b in zip(
            (*whole.samples, *whole.mean, *whole.std), (*parts.samples, *parts.mean, *parts.std), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    with pytest.raises(ValueError, match="must be positive"):
        predict(potential, batch, n_samples=7, max_memory=0)


@pytest.mark.parametrize("kind", list(SAMPLED))
def test_one_sample_has_no_spread(kind: str) -> None:
    potential, batch = SAMPLED[kind](), batch_of([ethanol()], 4.0)
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        predict(potential, batch, n_samples=1)
    samples = predict(potential, batch, n_samples=2).samples
    with pytest.raises(ValueError, match="at least 2"):
        reduce_samples(type(samples)(*(x[:1] for x in samples)))


def test_what_a_network_does_not_have_is_said_with_what_to_do() -> None:
    with pytest.raises(
        ValueError, match=r"no bank of functions and no dropout site.*`forcedrop fill MODEL --data FRAMES"
    ):
        require_functions(make_potential(rates=NONE))
    with pytest.raises(
        ValueError, match=r"bank holds 8 functions, asked for 9; `forcedrop fill MODEL .*--functions 9`"
    ):
        require_functions(banked_potential(n=8), 9)
    require_functions(banked_potential(n=8), 8)
    require_functions(make_potential(), 1000)  # masks can be drawn


@pytest.mark.parametrize("kind", list(SAMPLED))
def test_graphs_in_groups_equal_one_by_one(kind: str) -> None:
    potential = SAMPLED[kind]()
    images = [ethanol(0), silicon(), ethanol(1), ethanol(2)]
    graphs = [graph_of(a, 4.0) for a in images]
    for batch_atoms in (1, 12, 1000):
        found = list(predict_graphs(potential, graphs, n_samples=3, batch_atoms=batch_atoms))
        assert len(found) == len(images)
        for atoms, p in zip(images, found, strict=True):
            batch = batch_of([atoms], 4.0)
            expected, plain = predict(potential, batch, n_samples=3), derive(potential, batch)
            assert p.mean["energy"] == pytest.approx(float(expected.mean.energy), abs=1e-10)
            assert abs(p.std["forces"] - expected.std.forces.numpy()).max() < 1e-10
            assert abs(p.plain["stress"] - plain.stress[0].numpy()).max() < 1e-10
            assert p.samples["energies"].shape == tuple(expected.samples.energies.shape)
            assert p.error_bars is p.std


def test_seeds_draw_other_masks() -> None:
    potential, graphs = make_potential(), [graph_of(ethanol(), 4.0)]
    one, two = (next(iter(predict_graphs(potential, graphs, n_samples=3, seed=seed))) for seed in (0, 1))
    assert one.samples["energy"].tolist() != two.samples["energy"].tolist()
