"""The posterior of the readouts against closed forms and against networks whose weights are moved by hand."""

from copy import deepcopy

import pytest
import torch

from forcedrop.derive import derive, derive_samples
from forcedrop.graph import NeighbourFinder, batch_graphs, build_graph, pair_vectors
from forcedrop.potential import READOUT_SHIFT, DropoutRates, Potential
from forcedrop.sampling import draw_shifts, predict
from forcedrop.training import posterior
from forcedrop.training.posterior import fit_posterior, jacobian, readout_weights
from tests.conftest import batch_of, emt_frames, ethanol, make_potential

NONE = DropoutRates(0, 0, 0, 0)


def copper(**settings: object) -> Potential:
    return make_potential(elements=(29,), rates=NONE, **settings)


def graphs(n: int, seed: int):
    finder = NeighbourFinder(4.0)
    return [build_graph(frame, finder, torch.float64) for frame in emt_frames(n, seed=seed)]


def shifted(potential: Potential, shift: torch.Tensor) -> Potential:
    """The same network with the weights of its hidden channels moved by hand, the last of each element's, which must be equal."""
    n_species, h = len(potential.config.elements), potential.config.n_hidden
    own = shift.detach().unflatten(-1, (n_species, -1))[:, -h:]
    assert bool((own == own[0]).all())
    moved = deepcopy(potential)
    with torch.no_grad():
        moved.output.weight += own[0][:, None]
    return moved


def of_hidden(potential: Potential, n: int, seed: int = 0) -> torch.Tensor:
    """Shifts of the hidden channels alone, alike for every element."""
    c, h = potential.config, potential.config.n_hidden
    shift = torch.zeros(n, len(c.elements), potential.n_readout // len(c.elements), dtype=torch.float64)
    shift[:, :, -h:] = torch.randn(n, 1, h, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return shift.flatten(1)


def test_a_shift_of_hidden_channels_moves_the_readout_weights() -> None:
    potential, batch = make_potential(), batch_of([ethanol()], 4.0)
    shift = of_hidden(potential, 2)
    got = derive_samples(potential, batch, {READOUT_SHIFT: shift})
    for k in range(2):
        expected = derive(shifted(potential, shift[k]), batch)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a[k], b, rtol=0, atol=1e-9)


def test_a_shift_reads_features_with_weights_of_each_element() -> None:
    potential, batch = make_potential(), batch_of([ethanol()], 4.0)
    graph = potential.inputs(batch)
    features = potential.features(pair_vectors(batch, 8.0), graph).detach()
    assert features.shape == (9, 2 * 3 * 6 + 8)
    shift = torch.randn(potential.n_readout, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = derive(potential, batch, {READOUT_SHIFT: shift}).energies - derive(potential, batch).energies
    weights = shift.reshape(5, -1)
    expected = [float(features[i] @ weights[(1, 6, 8, 14, 29).index(int(z))]) for i, z in enumerate(batch.z)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)
    per_atom = derive(potential, batch, {READOUT_SHIFT: shift.expand(9, -1)})
    torch.testing.assert_close(per_atom.energies, derive(potential, batch, {READOUT_SHIFT: shift}).energies)


@pytest.mark.parametrize("size", [1, 2])
def test_jacobian_against_shifts(size: int) -> None:
    """Forward mode against reverse mode, in a batch of structures of different sizes and elements."""
    potential = make_potential()
    atoms = ethanol()
    batch = batch_of([atoms, atoms[:5]][:size], 4.0)
    energy, forces = jacobian(potential, batch)
    assert energy.shape == (potential.n_readout, size)
    base = derive(potential, batch)
    per_element = potential.n_readout // 5
    for f in (0, 7, per_element - 1, per_element + 20, 3 * per_element - 1):
        unit = torch.zeros(potential.n_readout, dtype=torch.float64)
        unit[f] = 1.0
        moved = derive(potential, batch, {READOUT_SHIFT: unit})
        torch.testing.assert_close(energy[f], moved.energy - base.energy, rtol=0, atol=1e-9)
        torch.testing.assert_close(forces[f], moved.forces - base.forces, rtol=0, atol=1e-9)
    assert float(forces[:per_element].abs().max()) > 1e-3


def test_covariance_is_that_of_linear_regression() -> None:
    potential, training, held = copper(), graphs(4, seed=0), graphs(3, seed=5)
    root = fit_posterior(potential, training, held, quiet=True)
    errors = derive(potential, batch := batch_graphs(held))
    sigma_e = ((errors.energy - batch.energy) / 2.0).square().mean().sqrt()  # four atoms each
    sigma_f = (errors.forces - batch.forces).square().mean().sqrt()
    energy, forces = jacobian(potential, batch_graphs(training))
    rows = torch.cat([energy / 2.0 / sigma_e, forces.flatten(1) / sigma_f], dim=1)
    precision = rows @ rows.T
    precision += torch.eye(len(precision), dtype=torch.float64) / readout_weights(potential).square().mean()
    torch.testing.assert_close(
        root @ root.T @ precision, torch.eye(len(precision), dtype=torch.float64), rtol=0, atol=1e-5
    )


def test_half_of_the_frames_stand_for_all() -> None:
    potential, held = copper(), graphs(3, seed=5)
    some = graphs(3, seed=0)
    whole = fit_posterior(potential, [g for g in some for _ in range(2)], held, quiet=True)
    half = fit_posterior(potential, [g for g in some for _ in range(2)], held, frames=3, quiet=True)
    torch.testing.assert_close(half @ half.T, whole @ whole.T, rtol=1e-4, atol=1e-9)


def test_frames_are_evenly_chosen_and_bounded_by_their_atoms(monkeypatch) -> None:
    some = graphs(30, seed=0)

    def numbers(frames: int) -> list[int]:
        return [[g is other for other in some].index(True) for g in posterior._evenly(some, frames)]

    assert numbers(3) == [0, 10, 20]
    assert numbers(100) == list(range(30))
    monkeypatch.setattr(posterior, "ATOMS", 4 * 15)
    assert numbers(100) == list(range(0, 30, 2))
    monkeypatch.setattr(posterior, "ATOMS", 4)
    assert len(numbers(100)) == 10


def test_samples_have_the_spread_of_the_covariance() -> None:
    potential = copper()
    with pytest.raises(ValueError, match="no posterior of its readouts"):
        predict(potential, batch_graphs(graphs(1, seed=0)), n_samples=4)
    potential.posterior = 1e-3 * torch.randn(potential.n_readout, potential.n_readout, dtype=torch.float64)
    batch = batch_graphs(graphs(1, seed=0))
    found = predict(potential, batch, n_samples=1000, chunk=250)
    energy, forces = jacobian(potential, batch)
    covariance = potential.posterior @ potential.posterior.T
    exact = torch.einsum("fnc,fg,gnc->nc", forces, covariance, forces).sqrt()
    torch.testing.assert_close(found.std.forces / exact, torch.ones_like(exact), rtol=0, atol=0.12)
    assert float(found.std.energy / (energy.T @ covariance @ energy).sqrt()) == pytest.approx(1.0, abs=0.12)


def test_draws_leave_the_mean_where_the_plain_network_has_it_whatever_the_chunk() -> None:
    potential, batch = copper(), batch_graphs(graphs(1, seed=0))
    potential.posterior = torch.randn(potential.n_readout, potential.n_readout, dtype=torch.float64)
    found, plain = predict(potential, batch, n_samples=5, chunk=2), derive(potential, batch)
    for a, b in zip(found.mean, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert float(found.std.forces.min()) > 0
    again = predict(potential, batch, n_samples=5)
    torch.testing.assert_close(again.samples.forces, found.samples.forces, rtol=0, atol=1e-10)
    assert not torch.equal(draw_shifts(potential, 1, 5), draw_shifts(potential, 0, 5))
