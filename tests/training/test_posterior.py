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
from tests.conftest import batch_of, emt_frames, ethanol, make_potential, silicon

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
    energy, forces, _ = jacobian(potential, batch)
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


def test_jacobian_of_virials_against_shifts() -> None:
    """In triclinic cells, one smaller than the cutoff; the stress of a shifted network comes from reverse mode."""
    potential = make_potential(elements=(14, 29), rates=NONE)
    batch = batch_of([silicon(), silicon(1).repeat((2, 1, 1))], 4.0)
    virial = jacobian(potential, batch).virial
    base = derive(potential, batch)
    for f in (0, 5, 40):
        unit = torch.zeros(potential.n_readout, dtype=torch.float64)
        unit[f] = 1.0
        moved = derive(potential, batch, {READOUT_SHIFT: unit})
        expected = (moved.stress - base.stress) * batch.volume[:, None]
        torch.testing.assert_close(virial[f], expected, rtol=0, atol=1e-9)
        assert float(expected.abs().max()) > 1e-4


def rows_by_hand(potential: Potential, training, held) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives and residuals of energies, forces and virials over the errors of the held-out frames; 4 atoms each."""
    errors = derive(potential, batch := batch_graphs(held))
    volume = batch.volume[:, None]
    sigma = [
        ((errors.energy - batch.energy) / 2.0).square().mean().sqrt(),
        (errors.forces - batch.forces).square().mean().sqrt(),
        ((errors.stress - batch.stress) * volume / 2.0).square().mean().sqrt(),
    ]
    whole = batch_graphs(training)
    energy, forces, virial = jacobian(potential, whole)
    now = derive(potential, whole)
    rows = [energy / 2.0, forces.flatten(1), virial.flatten(1) / 2.0]
    left = [
        (whole.energy - now.energy) / 2.0,
        (whole.forces - now.forces).flatten(),
        ((whole.stress - now.stress) * whole.volume[:, None] / 2.0).flatten(),
    ]
    scaled = [torch.cat([x / s for x, s in zip(part, sigma, strict=True)], dim=-1) for part in (rows, left)]
    return scaled[0].detach(), scaled[1].detach()


def test_posterior_is_that_of_linear_regression() -> None:
    potential, training, held = copper(), graphs(4, seed=0), graphs(3, seed=5)
    found = fit_posterior(potential, training, held, quiet=True)
    rows, left = rows_by_hand(potential, training, held)
    prior = torch.eye(len(rows), dtype=torch.float64) / readout_weights(potential).square().mean()
    one = torch.eye(len(rows), dtype=torch.float64)
    torch.testing.assert_close(found.root @ found.root.T @ (rows @ rows.T + prior), one, rtol=0, atol=1e-5)
    if float(found.mean.abs().max()):
        expected = torch.linalg.solve(rows @ rows.T + prior / posterior.WIDE, rows @ left)
        torch.testing.assert_close(found.mean, expected, rtol=1e-5, atol=1e-9)


def test_regression_finds_weights_that_explain_the_labels_and_is_dropped_where_it_harms() -> None:
    """Labels are those of the network with shifted weights: the mean restores them on frames that it never saw."""
    potential = copper()
    truth = 0.3 * torch.randn(potential.n_readout, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def labelled(some):
        for graph in some:
            found = derive(potential, batch_graphs([graph]), {READOUT_SHIFT: truth})
            graph.energy, graph.forces, graph.stress = (
                found.energy.detach(),
                found.forces.detach(),
                found.stress.detach(),
            )
        return some

    training, held, fresh = labelled(graphs(40, seed=0)), labelled(graphs(3, seed=5)), labelled(graphs(3, seed=9))
    found = fit_posterior(potential, training, held, quiet=True)
    before = derive(potential, batch := batch_graphs(fresh)).forces - batch.forces
    potential.refit = found.mean
    after = derive(potential, batch).forces - batch.forces
    assert float(after.square().mean()) < 0.01 * float(before.square().mean())
    potential.refit = None
    wrong = graphs(3, seed=5)
    for graph in wrong:  # held-out labels that the network has right already: any change is a harm
        now = derive(potential, batch_graphs([graph]))
        graph.energy, graph.forces, graph.stress = (now.energy + 1e-3).detach(), now.forces.detach() + 1e-3, now.stress
    assert float(fit_posterior(potential, training, wrong, quiet=True).mean.abs().max()) == 0


def test_refit_weights_are_part_of_every_function() -> None:
    potential, batch = copper(), batch_graphs(graphs(2, seed=0))
    shift = torch.randn(2, potential.n_readout, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    both = derive(potential, batch, {READOUT_SHIFT: shift[0] + shift[1]})
    alone = derive(potential, batch, {READOUT_SHIFT: shift[0]})
    potential.refit = shift[0]
    torch.testing.assert_close(derive(potential, batch).forces, alone.forces)
    torch.testing.assert_close(derive(potential, batch, {READOUT_SHIFT: shift[1]}).forces, both.forces)


def test_half_of_the_frames_stand_for_all() -> None:
    potential, held = copper(), graphs(3, seed=5)
    some = graphs(3, seed=0)
    twice = [g for g in some for _ in range(2)]
    whole = fit_posterior(potential, twice, held, quiet=True).root
    half = fit_posterior(potential, twice, held, frames=3, quiet=True).root
    torch.testing.assert_close(half @ half.T, whole @ whole.T, rtol=1e-4, atol=1e-9)


def test_frames_are_evenly_chosen_and_bounded_by_their_atoms() -> None:
    some = graphs(30, seed=0)

    def numbers(frames: int, atoms: float) -> list[int]:
        return [[g is other for other in some].index(True) for g in posterior._evenly(some, frames, atoms)]

    assert numbers(3, 1e6) == [0, 10, 20]
    assert numbers(100, 1e6) == list(range(30))
    assert numbers(100, 4 * 15) == list(range(0, 30, 2))
    assert len(numbers(100, 4)) == 10


def test_samples_have_the_spread_of_the_covariance() -> None:
    potential = copper()
    with pytest.raises(ValueError, match="no posterior of its readouts"):
        predict(potential, batch_graphs(graphs(1, seed=0)), n_samples=4)
    potential.posterior = 1e-3 * torch.randn(potential.n_readout, potential.n_readout, dtype=torch.float64)
    batch = batch_graphs(graphs(1, seed=0))
    found = predict(potential, batch, n_samples=1000)
    energy, forces, _ = jacobian(potential, batch)
    covariance = potential.posterior @ potential.posterior.T
    exact = torch.einsum("fnc,fg,gnc->nc", forces, covariance, forces).sqrt()
    torch.testing.assert_close(found.std.forces / exact, torch.ones_like(exact), rtol=0, atol=0.12)
    assert float(found.std.energy / (energy.T @ covariance @ energy).sqrt()) == pytest.approx(1.0, abs=0.12)


def test_draws_leave_the_mean_where_the_plain_network_has_it_whatever_fits_at_once() -> None:
    potential, batch = copper(), batch_graphs(graphs(1, seed=0))
    potential.posterior = torch.randn(potential.n_readout, potential.n_readout, dtype=torch.float64)
    found, plain = predict(potential, batch, n_samples=5, max_memory=1e-9), derive(potential, batch)
    for a, b in zip(found.mean, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert float(found.std.forces.min()) > 0
    again = predict(potential, batch, n_samples=5)
    torch.testing.assert_close(again.samples.forces, found.samples.forces, rtol=0, atol=1e-10)
    assert not torch.equal(draw_shifts(potential, 1, 5), draw_shifts(potential, 0, 5))
