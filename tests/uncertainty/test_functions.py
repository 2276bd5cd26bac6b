"""The law of functions, for every method and every site: what the calculator samples is the network frozen to function k."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from ase import Atoms

from forcedrop import DropoutCalculator
from forcedrop.derive import derive, geometry
from forcedrop.dropout import frozen, mc_samples
from forcedrop.graph import AtomicGraph, batch_graphs
from forcedrop.model import TrainedModel, committee, load_model, save_model
from forcedrop.potential import DropoutRates, EnergyModel
from forcedrop.testing import assert_conservative
from forcedrop.uncertainty.exact_dropout import ExactDropout
from forcedrop.uncertainty.masks import Heads, TrainedMasks
from forcedrop.uncertainty.method import Labels, Method, find_functions
from forcedrop.uncertainty.posterior import Posterior
from forcedrop.uncertainty.sampling import predict
from tests.conftest import NONE, batch_of, ethanol, graph_of, make_potential, silicon

FUNCTIONS, SEED = 6, 5
ELEMENTS = (1, 6, 8, 14)


def labelled(count: int, seed: int) -> list[AtomicGraph]:
    """Rattled ethanol and silicon with the labels of another network, and noise."""
    other, generator, graphs = make_potential(ELEMENTS, NONE, seed=9), np.random.default_rng(seed), []
    for k in range(count):
        atoms = silicon(seed + k) if k % 3 == 2 else ethanol(seed + k)
        found = derive(other, batch_of([atoms], 4.0))
        forces = found.forces.numpy() + generator.normal(scale=0.05, size=(len(atoms), 3))
        graphs.append(graph_of(atoms, 4.0, energy=float(found.energy) + generator.normal(scale=0.05), forces=forces))
    return graphs


def filled(method: Method, rates: DropoutRates = NONE) -> TrainedModel:
    potential = make_potential(ELEMENTS, rates)
    method.prepare(potential)
    if not method.keeps_masks:
        potential.set_rates(NONE)
    found = find_functions(potential, method, Labels(labelled(9, 0), labelled(6, 50), quiet=True))
    return TrainedModel(potential.eval(), None, found)


def masks(**rates: float) -> Callable[[], TrainedModel]:
    return lambda: filled(TrainedMasks(functions=FUNCTIONS, seed=SEED), DropoutRates(**rates))


def several(banked: bool) -> TrainedModel:
    models = [TrainedModel(make_potential(ELEMENTS, NONE, seed=k)) for k in range(FUNCTIONS)]
    for number, model in enumerate(models):
        model.potential.isolated += 0.1 * number  # each has zeros of its own
    for number, model in enumerate(models if banked else []):
        site = model.potential.correction
        noise = torch.randn(4, *site.weight.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        model.potential.set_functions(0.1 * noise[0], 0.1 * (noise - noise.mean(0)))
    return committee(models)


EXACT = {"rate": 0.3, "prior": 1.0, "draw": 1.0}
METHODS: dict[str, Callable[[], TrainedModel]] = {
    "exact dropout": lambda: filled(ExactDropout(functions=FUNCTIONS, seed=SEED, **EXACT)),
    "exact dropout with cuts": lambda: filled(
        ExactDropout(functions=FUNCTIONS, seed=SEED, cuts=3, cut_rate=0.5, **EXACT)
    ),
    "posterior": lambda: filled(Posterior(functions=FUNCTIONS, seed=SEED)),
    "heads": lambda: filled(Heads(functions=FUNCTIONS, seed=SEED)),
    "edge": masks(edge=0.5),
    "message": masks(message=0.3),
    "update": masks(update=0.3),
    "readout": masks(readout=0.5),
    "every mask": masks(edge=0.3, message=0.1, update=0.2, readout=0.5),
    "ensemble": lambda: several(banked=False),
    "ensemble of models with functions": lambda: several(banked=True),
}
CENTRED = ("exact dropout", "posterior", "heads")
made = cache(lambda name: METHODS[name]())


@pytest.fixture(params=list(METHODS))
def model(request: pytest.FixtureRequest) -> TrainedModel:
    return made(request.param)


@pytest.fixture(params=list(CENTRED))
def centred(request: pytest.FixtureRequest) -> TrainedModel:
    return made(request.param)


def plain(potential: EnergyModel, seed: int, k: int, atoms: Atoms):
    """Energy, forces and stress of function k, by what anybody's dropout layer does."""
    batch = batch_of([atoms], potential.cutoff)
    with frozen(potential, seed, k):
        own = derive(potential, batch)
        graph, vec = geometry(potential, batch)
        local = potential(vec, graph).double() + potential.isolated_energy(graph.species)
    return float(local.sum().detach()), own


@pytest.mark.parametrize("make", [ethanol, silicon])
def test_sample_k_of_the_calculator_is_the_network_frozen_to_function_k(model: TrainedModel, make) -> None:
    atoms = make()
    calculator = DropoutCalculator(model, FUNCTIONS, keep_samples=True)
    assert calculator.seed == model.seed
    calculator.calculate(atoms)
    energies = []
    for k in range(FUNCTIONS):
        energy, own = plain(model.potential, model.seed, k, atoms)
        energies.append(energy)
        assert calculator.results["energy_ensemble"][k] == pytest.approx(energy, abs=1e-10)
        assert float(own.energy.detach()) == pytest.approx(energy, abs=1e-10)
        forces = own.forces.detach().numpy()
        np.testing.assert_allclose(
            calculator.results["forces_ensemble"][k], forces, atol=1e-10 * max(1, np.abs(forces).max())
        )
        if atoms.pbc.any():
            np.testing.assert_allclose(
                calculator.results["stress_ensemble"][k], own.stress[0].detach().numpy(), atol=1e-10
            )
    assert np.ptp(energies) > 1e-6
    assert len({round(e, 9) for e in energies}) > 1


def test_mc_samples_gives_all_of_them(model: TrainedModel) -> None:
    potential, atoms = model.potential, ethanol()
    graph, vec = geometry(potential, batch_of([atoms], 4.0))
    with torch.no_grad():
        every = mc_samples(potential, (vec, graph), FUNCTIONS, model.seed)
    assert every.shape == (FUNCTIONS, 9)
    for k in range(FUNCTIONS):
        energy, _ = plain(potential, model.seed, k, atoms)
        own = float((every[k].double() + potential.isolated_energy(graph.species)).sum())
        assert own == pytest.approx(energy, abs=1e-10)


def test_a_function_for_each_structure_by_row(model: TrainedModel) -> None:
    """As training and dynamics of many do it: an index for every atom."""
    potential, images = model.potential, [ethanol(), silicon(), ethanol(1)]
    batch = batch_of(images, 4.0)
    chosen = torch.tensor([3, 0, 1])
    with frozen(potential, model.seed, chosen[batch.batch]):
        together = derive(potential, batch)
    first = 0
    for number, atoms in enumerate(images):
        energy, own = plain(potential, model.seed, int(chosen[number]), atoms)
        assert float(together.energy[number].detach()) == pytest.approx(energy, abs=1e-9)
        forces = together.forces[first : first + len(atoms)]
        torch.testing.assert_close(forces, own.forces, rtol=1e-10, atol=1e-9)
        first += len(atoms)


def test_function_k_has_the_same_bits_whatever_k_is_and_whatever_came_before(model: TrainedModel) -> None:
    potential, batch, other = model.potential, batch_of([ethanol()], 4.0), batch_of([silicon(), ethanol(1)], 4.0)
    alone = plain(potential, model.seed, 2, ethanol())
    few = predict(potential, batch, n_samples=4, seed=model.seed).samples
    torch.rand(5)
    predict(potential, other, n_samples=FUNCTIONS, seed=model.seed)
    again = predict(potential, batch, n_samples=4, seed=model.seed).samples
    for a, b in zip(few, again, strict=True):
        assert torch.equal(a, b)
    assert plain(potential, model.seed, 2, ethanol())[0] == alone[0]
    whole = predict(potential, batch, n_samples=FUNCTIONS, seed=model.seed).samples
    assert torch.equal(whole.energy[:4], few.energy[:4])
    torch.testing.assert_close(whole.forces[:4], few.forces, rtol=1e-12, atol=1e-11)


@pytest.mark.filterwarnings("ignore:.*vmap:RuntimeWarning")
def test_more_functions_than_there_are_is_an_error_that_says_how_many(model: TrainedModel) -> None:
    potential, too_many = model.potential, FUNCTIONS + 1
    if potential.n_functions is None:
        with pytest.warns(
            UserWarning, match=f"trained with the {FUNCTIONS} masks of seed {SEED}, asked for {too_many}"
        ):
            DropoutCalculator(model, too_many)
        return
    batch = batch_of([ethanol()], 4.0)
    graph, vec = geometry(potential, batch)
    for ask in (
        lambda: DropoutCalculator(model, too_many),
        lambda: predict(potential, batch, n_samples=too_many),
        lambda: mc_samples(potential, (vec, graph), too_many),
        lambda: plain(potential, 0, FUNCTIONS, ethanol()),
    ):
        with pytest.raises(ValueError, match=rf"\b{FUNCTIONS}\b"):
            ask()


def test_default_is_all_functions_of_a_small_bank(model: TrainedModel) -> None:
    assert DropoutCalculator(model).n_samples == FUNCTIONS
    with pytest.raises(ValueError, match="at least 2 samples, got 1"):
        model.functions_for(1)


def test_the_seed_draws_masks_and_a_bank_does_not_look_at_it(model: TrainedModel) -> None:
    batch = batch_of([ethanol()], 4.0)
    one, two = (predict(model.potential, batch, n_samples=FUNCTIONS, seed=seed).samples for seed in (1, 2))
    if model.potential.n_functions is None:
        assert not torch.equal(one.energy, two.energy)
    else:
        assert torch.equal(one.energy, two.energy)
        assert torch.equal(one.forces, two.forces)


@pytest.mark.parametrize("make", [ethanol, silicon])
def test_the_mean_of_the_bank_is_the_plain_network(centred: TrainedModel, make) -> None:
    potential, batch = centred.potential, batch_of([make()], 4.0)
    assert potential.centred
    expected = derive(potential, batch)
    scale = float(expected.forces.abs().max())
    for k in (3, FUNCTIONS):
        found = predict(potential, batch, n_samples=k)
        for name in ("energy", "energies", "forces", "stress"):
            torch.testing.assert_close(
                getattr(found.mean, name), getattr(expected, name), rtol=1e-12, atol=1e-12 * scale
            )
        assert found.samples.energy.shape == (FUNCTIONS, 1)  # of energies the whole bank
        assert found.samples.forces.shape[0] == k
    for name in ("energy", "energies", "forces", "stress"):
        mean = getattr(found.samples, name).mean(0)
        torch.testing.assert_close(mean, getattr(expected, name), rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("name", ["ensemble", "ensemble of models with functions"])
def test_an_ensemble_is_its_members_and_their_mean(name: str) -> None:
    ensemble, batch = made(name).potential, batch_of([ethanol(), silicon()], 4.0)
    prediction, whole = predict(ensemble, batch, n_samples=FUNCTIONS), derive(ensemble, batch)
    for property_ in ("energy", "forces", "stress"):
        own = torch.stack([getattr(derive(member, batch), property_) for member in ensemble.each()])
        torch.testing.assert_close(getattr(prediction.samples, property_), own, rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(getattr(whole, property_), own.mean(0), rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(getattr(prediction.std, property_), own.std(0, correction=1), rtol=1e-9, atol=1e-11)
    graph, vec = geometry(ensemble, batch)
    with torch.no_grad():
        torch.testing.assert_close(
            ensemble(vec, graph), ensemble.gradients(vec, graph).energies, rtol=1e-12, atol=1e-11
        )


@pytest.mark.parametrize("name", [*METHODS])
@pytest.mark.parametrize("every", [1, 2])
def test_energies_and_forces_of_the_calculator_are_of_one_potential_for_few_functions(name: str, every: int) -> None:
    """Also at steps without σ, where the calculator takes another path."""
    calculator = DropoutCalculator(made(name), 3, uncertainty_every=every)

    def evaluate(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        calculator.calculate(atoms)
        return np.array([calculator.results["energy"]]), calculator.results["forces"][None]

    assert_conservative(evaluate, ethanol(), tolerance=1e-6, directions=2)


def test_models_of_every_method_come_back_the_same(model: TrainedModel, tmp_path) -> None:
    save_model(model, tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt")
    assert (loaded.n_functions, loaded.seed, loaded.uncertainty) == (model.n_functions, model.seed, model.uncertainty)
    assert loaded.potential.centred == model.potential.centred
    batch = batch_of([ethanol(), silicon()], 4.0)
    for k in (3, FUNCTIONS):
        one, two = (predict(m.potential, batch, n_samples=k, seed=m.seed) for m in (model, loaded))
        for a, b in zip((*one.samples, *one.mean), (*two.samples, *two.mean), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(derive(model.potential, batch), derive(loaded.potential, batch), strict=True):
        assert torch.equal(a, b)


def test_forgetting_leaves_the_network_as_it_was_trained(model: TrainedModel) -> None:
    from copy import deepcopy

    potential = deepcopy(model.potential)
    if potential.correction is None:
        pytest.skip("an ensemble has no functions of its own to forget")
    batch = batch_of([ethanol()], 4.0)
    potential.forget_functions()
    assert potential.n_functions == 0
    assert not potential.centred
    expected = make_potential(ELEMENTS, NONE)
    if model.uncertainty["method"] == "heads":
        expected.load_state_dict({**expected.state_dict(), "basis": potential.basis})
    for a, b in zip(derive(potential, batch), derive(expected, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_functions_of_a_batch_are_those_of_one_by_one(model: TrainedModel) -> None:
    potential, images = model.potential, [silicon(), ethanol()]
    together = predict(potential, batch_of(images, 4.0), n_samples=4, seed=model.seed)
    for number, (atoms, mine) in enumerate(zip(images, (slice(0, 2), slice(2, 11)), strict=True)):
        alone = predict(potential, batch_of([atoms], 4.0), n_samples=4, seed=model.seed)
        torch.testing.assert_close(together.samples.energy[:, number], alone.samples.energy[:, 0], rtol=0, atol=1e-10)
        torch.testing.assert_close(together.samples.forces[:, mine], alone.samples.forces, rtol=0, atol=1e-9)
        torch.testing.assert_close(together.samples.energies[:, mine], alone.samples.energies, rtol=0, atol=1e-10)


def test_methods_are_told_what_they_need(monkeypatch) -> None:
    labels = Labels(labelled(3, 0), labelled(3, 50), quiet=True)
    potential = make_potential(ELEMENTS, NONE)
    potential.correction = None  # what a kind of network without features is
    for method in (ExactDropout(functions=4), Posterior(functions=4)):
        with pytest.raises(ValueError, match=r"'sphere' has no features that its energy is read from linearly"):
            method.fill(potential, labels)
    with pytest.raises(ValueError, match=r"`uncertainty.method: heads` needs features"):
        Heads().prepare(potential)
    with pytest.raises(ValueError, match="has no features"):
        potential.set_functions(None, None)
    bare = [graph_of(ethanol(), 4.0)]
    with pytest.raises(ValueError, match="needs held-out frames with energies or forces"):
        Posterior(functions=4).fill(make_potential(ELEMENTS, NONE), Labels(labelled(3, 0), bare, quiet=True))
    assert batch_graphs(bare).num_graphs == 1
