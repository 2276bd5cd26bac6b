"""Exact dropout of a network against least squares of its own labels, and its rule of choice against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forcedrop.derive import derive
from forcedrop.dropout import exact_masks, frozen
from forcedrop.graph import batch_graphs
from forcedrop.uncertainty import exact_dropout as module
from forcedrop.uncertainty.equations import Equations, HeldOut, refit, solve_equations
from forcedrop.uncertainty.exact_dropout import Choice, ExactDropout, frame_scores, solutions
from forcedrop.uncertainty.method import Labels, find_functions
from tests.conftest import NONE, ethanol, graph_of, make_potential
from tests.uncertainty.test_equations import SIX, copper, graphs, labels, rows_by_hand

N = 8


@pytest.mark.parametrize("kind", ["sphere", "painn"])
def test_the_bank_is_least_squares_of_the_labels_for_every_mask(kind: str) -> None:
    """By stacking the labels' rows and the prior's, with the columns of a mask alone: no normal equations."""
    potential, some = copper(kind=kind), labels(12, 3)
    method = ExactDropout(functions=N, rate=0.4, prior=2.0, draw=0.0, seed=3)
    equations = solve_equations(potential, some)
    rows, left = rows_by_hand(potential, some)
    star = potential.read_weights()
    method.fill(potential, some)
    found = potential.correction.bank[:, 0] + potential.correction.weight[0] + star
    keep = exact_masks(N, len(star), 0.4, seed=3)
    strength = (2.0 * equations.prior) ** 0.5
    target = torch.cat([left + rows.T @ star, strength * star])
    expected = torch.zeros(N, len(star), dtype=torch.float64)
    for k, mask in enumerate(keep):
        columns = torch.cat([rows.T, strength * torch.eye(len(star), dtype=torch.float64)])[:, mask]
        expected[k, mask] = torch.linalg.lstsq(columns, target[:, None], driver="gelsd").solution[:, 0]
    mean = star + potential.correction.weight[0]
    expected = expected - expected.mean(0) + mean  # centred at the refitted network
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))
    torch.testing.assert_close(
        potential.correction.bank.mean(0), torch.zeros(1, len(star), dtype=torch.float64), rtol=0, atol=1e-12
    )
    assert 0.25 < 1 - float(keep.double().mean()) < 0.55


def small() -> Equations:
    generator = torch.Generator().manual_seed(0)
    j = torch.randn(12, 40, dtype=torch.float64, generator=generator)
    star, left = (torch.randn(n, dtype=torch.float64, generator=generator) for n in (12, 40))
    held = HeldOut(*(torch.zeros(0),) * 4)
    from forcedrop.uncertainty.equations import Scales

    return Equations(j @ j.T, j @ left, star, 0.7, Scales(1, 1, 1), held, 1)


def test_without_dropout_all_functions_are_ridge_regression() -> None:
    equations = small()
    found = solutions(equations, Choice(0.0, 2.0, 0.0), N, seed=0)
    precision = equations.precision + 1.4 * torch.eye(12, dtype=torch.float64)
    ridge = torch.linalg.solve(precision, precision @ equations.weights + equations.pull)
    torch.testing.assert_close(found, ridge.expand(N, -1), rtol=1e-10, atol=1e-10)


def test_a_strong_prior_gives_masks_of_the_trained_weights() -> None:
    equations = small()
    found = solutions(equations, Choice(0.5, 1e12, 0.0), N, seed=4)
    keep = exact_masks(N, 12, 0.5, seed=4)
    torch.testing.assert_close(found, keep * equations.weights, rtol=1e-8, atol=1e-8)


def test_draws_have_the_covariance_of_the_posterior_given_the_mask() -> None:
    equations = small()
    found = solutions(equations, Choice(0.0, 1.0, 2.0), 4000, seed=0)
    covariance = 4 * torch.linalg.inv(equations.precision + 0.7 * torch.eye(12, dtype=torch.float64))
    torch.testing.assert_close(torch.cov(found.T), covariance, rtol=0, atol=0.12 * float(covariance.abs().max()))
    masked = solutions(equations, Choice(0.5, 1.0, 2.0), N, seed=0)
    assert bool((masked[~exact_masks(N, 12, 0.5, seed=0)] == 0).all())  # what is dropped is dropped


def test_function_k_is_the_same_whatever_their_number_but_for_the_centre() -> None:
    equations = small()
    few, many = (solutions(equations, Choice(0.3, 1.0, 1.0), n, seed=0) for n in (5, 20))
    assert torch.equal(few, many[:5])
    assert not torch.equal(few, solutions(equations, Choice(0.3, 1.0, 1.0), 5, seed=1))


def test_scores_of_frames_against_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [(1, 6), (1, 3), (0, 9), (1, 0)]  # energies and forces of each frame
    frame = torch.tensor([k for k, (e, f) in enumerate(sizes) for _ in range(e + f)])
    is_energy = torch.tensor([kind for e, f in sizes for kind in [True] * e + [False] * f])
    rows = torch.randn(len(frame), 5, dtype=torch.float64, generator=generator)
    error = torch.randn(len(frame), dtype=torch.float64, generator=generator)
    bank = torch.randn(7, 5, dtype=torch.float64, generator=generator)
    found = frame_scores(HeldOut(rows, error, is_energy, frame), error, bank)
    spread = np.array([np.var([float(row @ w) for w in bank], ddof=1) for row in rows])
    e = error.numpy()
    forces = ~is_energy.numpy()
    factor = np.mean([e[i] ** 2 / spread[i] for i in np.flatnonzero(forces)])  # the forces rule
    for number in range(4):
        total = 0.0
        for kind in (True, False):
            own = [i for i in range(len(e)) if int(frame[i]) == number and bool(is_energy[i]) is kind]
            if own:
                total += np.mean([0.5 * (e[i] ** 2 / (factor * spread[i]) + np.log(factor * spread[i])) for i in own])
        assert float(found[number]) == pytest.approx(total, rel=1e-9)


def test_the_default_stays_unless_another_is_better_by_the_standard_error(monkeypatch) -> None:
    """Scores are given: the rule alone is looked at."""
    table: dict[Choice, torch.Tensor] = {}
    base = torch.tensor([1.0, 2.0, 3.0, 4.0])
    monkeypatch.setattr(ExactDropout, "_scores", lambda self, equations, error, choice: table.get(choice, base + 1.0))
    equations = small()
    held = HeldOut(torch.zeros(4, 12), torch.zeros(4), torch.zeros(4, dtype=torch.bool), torch.arange(4))
    equations = Equations(**{**vars(equations), "held": held})
    default = Choice(0.3, 1.0, 1.0)

    def chosen(**settings: float) -> Choice:
        return ExactDropout(functions=4, **settings)._choose(equations, torch.zeros(12), quiet=True)

    table[default] = base
    assert chosen() == default
    table[Choice(0.5, 1.0, 0.0)] = base - torch.tensor([1.0, -0.9, 1.0, -0.9])  # better by less than its noise
    assert chosen() == default
    table[Choice(0.5, 1.0, 0.0)] = base - torch.tensor([0.2, 0.1, 0.2, 0.1])
    assert chosen() == Choice(0.5, 1.0, 0.0)
    table[Choice(0.5, 10.0, 0.0)] = base - 0.3  # the prior comes second, about what was found
    assert chosen() == Choice(0.5, 10.0, 0.0)
    assert chosen(rate=0.3) == default
    table[Choice(0.1, 1.0, 3.0)] = base - 0.1
    assert chosen(rate=0.1, draw=3.0, prior=1.0) == Choice(0.1, 1.0, 3.0)


def test_what_is_chosen_is_the_likelihood_of_held_out_frames() -> None:
    """The whole way, by trying all that may be chosen with everything else fixed."""
    potential, some = copper(), labels(20, 12)
    equations = solve_equations(potential, some)
    mean = refit(potential, some, equations)
    error = equations.held.residual - equations.held.rows @ mean
    method = ExactDropout(functions=N, prior=1.0, draw=1.0)
    scores = {}
    for rate in module.RATES:
        weights = solutions(equations, Choice(rate, 1.0, 1.0), N, 0)
        scores[rate] = frame_scores(equations.held, error, weights - weights.mean(0))
    best = module.RATES[0]
    for rate in module.RATES[1:]:
        gain = scores[best] - scores[rate]
        if float(gain.mean()) > float(gain.std() / len(gain) ** 0.5):
            best = rate
    found = find_functions(potential, method, some)
    assert found["rate"] == best
    assert (found["method"], found["functions"], found["seed"], found["cuts"]) == ("exact_dropout", N, 0, 0)


def test_without_frames_to_choose_by_the_default_stands() -> None:
    assert ExactDropout(functions=4)._choose(small(), torch.zeros(12), quiet=True) == Choice(0.3, 1.0, 1.0)


def test_six_elements_have_five_sets() -> None:
    """Labels of another network: the bank has the form, and every function is smooth in the elements' directions."""
    potential, other = make_potential(SIX, NONE), make_potential(SIX, NONE, seed=4)
    made = []
    for seed in range(6):
        found = derive(other, batch_graphs([graph_of(ethanol(seed), 4.0)]))
        made.append(graph_of(ethanol(seed), 4.0, energy=float(found.energy), forces=found.forces.numpy()))
    said = ExactDropout(functions=4, rate=0.3, prior=1.0, draw=1.0).fill(
        potential, Labels(made[:4], made[4:], quiet=True)
    )
    assert potential.correction.bank.shape == (4, 5, potential.n_features)
    assert (said["sets"], said["weights"]) == (5, 5 * potential.n_features)
    batch = batch_graphs(made)
    every = []
    for k in range(4):
        with frozen(potential, 0, k):
            every.append(derive(potential, batch).energy.detach())
    torch.testing.assert_close(torch.stack(every).mean(0), derive(potential, batch).energy, rtol=1e-12, atol=1e-9)


def test_each_set_of_cuts_has_equations_of_its_own() -> None:
    """Function k reads, with weights that were solved for its own radii, the features that these radii leave."""
    potential, some = copper(), labels(8, 3)
    method = ExactDropout(functions=6, rate=0.3, prior=1.0, draw=0.0, cuts=2, cut_rate=0.7)
    method.fill(potential, some)
    radii = potential.edges.bank
    assert radii.shape == (6, 1)
    assert torch.equal(radii[::2], radii[:1].expand(3, -1))
    assert torch.equal(radii[1::2], radii[1:2].expand(3, -1))
    plain, bank = potential.correction.weight.clone(), potential.correction.bank.clone()
    potential.set_functions(None, None)
    for number in range(2):
        with frozen(potential, 0, number):
            equations = solve_equations(potential, some, held=False)
        expected = solutions(equations, Choice(0.3, 1.0, 0.0), 6, 0)[number::2] - equations.weights
        found = (bank[number::2] + plain).flatten(1)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"functions": 1}, "`functions` must be at least 2, got 1"),
        ({"functions": 513}, "`functions` must be at most 512, got 513"),
        ({"rate": 1.0}, r"`rate` must lie in \[0, 1\), got 1.0"),
        ({"cut_rate": -0.1}, r"`cut_rate` must lie in \[0, 1\)"),
        ({"prior": 0.0}, "`prior` must be positive"),
        ({"draw": -1.0}, "`draw` must not be negative"),
        ({"cuts": 65}, r"`cuts` must lie in \[0, functions\]"),
        ({"frames": 0}, "`frames` be positive"),
    ],
)
def test_mistakes(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ExactDropout(**settings)


def test_a_kind_without_edge_dropout_cannot_be_cut(monkeypatch) -> None:
    potential, some = copper(), Labels(graphs(6, 0), graphs(3, 5), quiet=True)
    equations = solve_equations(potential, some)
    monkeypatch.setattr(module, "refit", lambda *arguments: torch.zeros(potential.n_features, dtype=torch.float64))
    potential.edges = None  # as in a network that never called `add_edges`
    with pytest.raises(ValueError, match="'sphere' has no edge dropout to sample"):
        ExactDropout(functions=4, rate=0.3, prior=1.0, draw=0.0, cuts=2).fill(potential, some, equations)
