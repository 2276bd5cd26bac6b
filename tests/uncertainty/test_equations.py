"""The normal equations against closed forms, loops, and networks whose weights are moved by hand."""

from __future__ import annotations

from copy import deepcopy

import numpy as np
import pytest
import torch

from forcedrop.derive import derive, geometry
from forcedrop.dropout import frozen
from forcedrop.graph import AtomicGraph, NeighbourFinder, batch_graphs, build_graph
from forcedrop.potential import DropoutRates, EnergyModel
from forcedrop.uncertainty import equations as module
from forcedrop.uncertainty.equations import (
    element_basis,
    held_errors,
    jacobian,
    refit,
    solve_equations,
    trained_weights,
)
from forcedrop.uncertainty.method import Labels
from tests.conftest import NONE, batch_of, emt_frames, ethanol, graph_of, make_potential, silicon

SIX = (1, 6, 8, 14, 26, 29)
KINDS = pytest.mark.parametrize("kind", ["sphere", "painn"])


def copper(**settings: object) -> EnergyModel:
    return make_potential(elements=(29,), rates=NONE, **settings)


def graphs(n: int, seed: int) -> list[AtomicGraph]:
    finder = NeighbourFinder(4.0)
    return [build_graph(frame, finder, torch.float64) for frame in emt_frames(n, seed=seed)]


def labels(train: int = 4, held: int = 3) -> Labels:
    return Labels(graphs(train, seed=0), graphs(held, seed=5), quiet=True)


def moved(potential: EnergyModel, weight: torch.Tensor) -> EnergyModel:
    """The same network with weights (R, F) added to those of its features."""
    made = deepcopy(potential)
    made.set_functions(weight, None)
    return made


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@KINDS
def test_weights_read_features_of_each_element(kind: str) -> None:
    potential, batch = make_potential(kind=kind), batch_of([ethanol()], 4.0)
    graph, vec = geometry(potential, batch)
    features = potential.features(vec, graph).detach()
    weight = normal(*potential.correction.weight.shape)
    got = derive(moved(potential, weight), batch).energies - derive(potential, batch).energies
    expected = [float(features[i] @ weight[(1, 6, 8, 14, 29).index(int(z))]) for i, z in enumerate(batch.z)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def test_weights_of_six_elements_are_shared_by_the_basis() -> None:
    potential, batch = make_potential(elements=SIX), batch_of([ethanol(), silicon()], 4.0)
    graph, vec = geometry(potential, batch)
    features = potential.features(vec, graph).detach()
    weight, basis = normal(5, potential.n_features), normal(6, 5, seed=1)
    assert potential.correction.weight.shape == (5, potential.n_features)
    before = derive(potential, batch).energies
    potential.set_functions(weight, None, basis)
    own = [SIX.index(int(z)) for z in batch.z]
    expected = torch.stack([features[i] @ (basis[s] @ weight) for i, s in enumerate(own)])
    torch.testing.assert_close(derive(potential, batch).energies - before, expected, rtol=0, atol=1e-9)


@KINDS
@pytest.mark.parametrize("elements", [(1, 6, 8, 14, 29), SIX], ids=["five", "six"])
@pytest.mark.parametrize("size", [1, 2])
def test_jacobian_against_moved_weights(size: int, elements, kind: str) -> None:
    """Forward mode against reverse mode, in a batch of structures of different sizes and elements."""
    potential, atoms = make_potential(elements, kind=kind), ethanol()
    potential.basis = element_basis(potential)
    batch = batch_of([atoms, atoms[:5]][:size], 4.0)
    energy, forces, _ = jacobian(potential, batch)
    shape = potential.correction.weight.shape
    assert energy.shape == (shape.numel(), size)
    base = derive(potential, batch)
    per_set = shape[1]
    for f in (0, 7, per_set - 1, per_set + 11, 3 * per_set - 1):
        unit = torch.zeros(shape.numel(), dtype=torch.float64)
        unit[f] = 1.0
        changed = derive(moved(potential, unit.reshape(shape)), batch)
        torch.testing.assert_close(energy[f], changed.energy - base.energy, rtol=0, atol=1e-9)
        torch.testing.assert_close(forces[f], changed.forces - base.forces, rtol=0, atol=1e-9)
    assert float(forces[:per_set].abs().max()) > 1e-3


def test_jacobian_of_virials_against_moved_weights() -> None:
    """In triclinic cells, one smaller than the cutoff; the stress of a moved network comes from reverse mode."""
    potential = make_potential(elements=(14, 29), rates=NONE)
    batch = batch_of([silicon(), silicon(1).repeat((2, 1, 1))], 4.0)
    virial, base = jacobian(potential, batch).virial, derive(potential, batch)
    shape = potential.correction.weight.shape
    for f in (0, 5, 40):
        unit = torch.zeros(shape.numel(), dtype=torch.float64)
        unit[f] = 1.0
        expected = (derive(moved(potential, unit.reshape(shape)), batch).stress - base.stress) * batch.volume[:, None]
        torch.testing.assert_close(virial[f], expected, rtol=0, atol=1e-9)
        assert float(expected.abs().max()) > 1e-4


def test_jacobian_of_a_frozen_network_is_of_its_features() -> None:
    """Edge cuts at inference: each set of radii has features of its own."""
    potential, batch = make_potential(rates=DropoutRates(edge=0.5)), batch_of([ethanol()], 4.0)
    with frozen(potential, 0, 3):
        energy, base = jacobian(potential, batch).energy, derive(potential, batch)
        unit = torch.zeros_like(potential.correction.weight)
        unit[1, 4] = 1.0
        potential.set_functions(unit, None)
        changed = derive(potential, batch)
    found = energy[potential.n_features + 4]
    torch.testing.assert_close(found, (changed.energy - base.energy).detach(), rtol=0, atol=1e-9)
    potential.set_functions(None, None)
    assert abs(float(found - jacobian(potential, batch).energy[potential.n_features + 4])) > 1e-6


def rows_by_hand(potential: EnergyModel, some: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """Derivatives and residuals of energies, forces and virials over the errors of the held-out frames; 4 atoms each."""
    errors = derive(potential, batch := batch_graphs(some.held))
    volume = batch.volume[:, None]
    sigma = [
        ((errors.energy - batch.energy) / 2.0).square().mean().sqrt(),
        (errors.forces - batch.forces).square().mean().sqrt(),
        ((errors.stress - batch.stress) * volume / 2.0).square().mean().sqrt(),
    ]
    whole = batch_graphs(some.train)
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


@KINDS
def test_equations_are_those_of_linear_regression(kind: str) -> None:
    potential, some = copper(kind=kind), labels()
    found = solve_equations(potential, some)
    rows, left = rows_by_hand(potential, some)
    scale = float(found.precision.abs().max())
    torch.testing.assert_close(found.precision, rows @ rows.T, rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(found.pull, rows @ left, rtol=1e-8, atol=1e-8 * float(found.pull.abs().max()))
    torch.testing.assert_close(found.weights, potential.read_weights())
    readouts = getattr(potential, "trained_readouts", potential.read_weights)()
    assert found.prior == pytest.approx(1 / float(readouts.square().mean()))
    assert found.frames == 4
    mean = refit(potential, some, found)
    if bool(mean.any()):
        narrow = torch.eye(len(rows), dtype=torch.float64) * found.prior
        expected = torch.linalg.solve(rows @ rows.T + narrow, rows @ left)
        torch.testing.assert_close(rows.T @ mean, rows.T @ expected, rtol=1e-4, atol=1e-5)
    assert potential.n_functions == 0  # the network is left as it was
    assert not bool(potential.correction.weight.any())


def test_held_out_rows_are_those_of_a_loop() -> None:
    potential, some = copper(), labels()
    found = solve_equations(potential, some)
    held, sigma = found.held, held_errors(potential, some.held, True)
    place = 0
    for number, graph in enumerate(some.held):
        batch = batch_graphs([graph])
        parts, now = jacobian(potential, batch), derive(potential, batch)
        own = slice(place, place + 13)
        place += 13
        assert held.frame[own].tolist() == [number] * 13
        assert held.is_energy[own].tolist() == [True] + [False] * 12
        torch.testing.assert_close(held.rows[own][0], parts.energy[:, 0] / 2 / sigma.energy)
        torch.testing.assert_close(held.rows[own][1:].T, parts.forces.flatten(1) / sigma.forces)
        assert float(held.residual[own][0]) == pytest.approx(float(batch.energy - now.energy) / 2 / sigma.energy)
        torch.testing.assert_close(held.residual[own][1:], ((batch.forces - now.forces) / sigma.forces).flatten())
    assert len(held.rows) == place
    assert float(held.residual[held.is_energy].square().mean()) == pytest.approx(1.0)


def test_regression_finds_weights_that_explain_the_labels_and_is_dropped_where_it_harms() -> None:
    """Labels are those of the network with moved weights: regression restores them on frames that it never saw."""
    potential = copper()
    other = moved(potential, 0.3 * normal(*potential.correction.weight.shape))

    def labelled(some: list[AtomicGraph]) -> list[AtomicGraph]:
        for graph in some:
            found = derive(other, batch_graphs([graph]))
            graph.energy, graph.forces, graph.stress = (x.detach() for x in (found.energy, found.forces, found.stress))
        return some

    some = Labels(labelled(graphs(40, seed=0)), labelled(graphs(3, seed=5)), quiet=True)
    batch = batch_graphs(labelled(graphs(3, seed=9)))
    equations = solve_equations(potential, some)
    mean = refit(potential, some, equations)
    before, after = (
        (derive(p, batch).forces - batch.forces).square().mean()
        for p in (potential, moved(potential, mean.reshape(potential.correction.weight.shape)))
    )
    assert float(after) < 0.2 * float(before)  # the prior holds back what is far from the trained readouts
    wrong = graphs(3, seed=5)
    for graph in wrong:  # held-out labels that the network has right already: any change is a harm
        now = derive(potential, batch_graphs([graph]))
        graph.energy, graph.forces, graph.stress = (now.energy + 1e-3).detach(), now.forces.detach() + 1e-3, now.stress
    harmful = Labels(some.train, wrong, quiet=True)
    assert not bool(refit(potential, harmful, solve_equations(potential, harmful)).any())


def test_half_of_the_frames_stand_for_all() -> None:
    potential, held = copper(), graphs(3, seed=5)
    twice = Labels([g for g in graphs(3, seed=0) for _ in range(2)], held, quiet=True)
    whole, half = solve_equations(potential, twice), solve_equations(potential, twice, frames=3)
    assert (whole.frames, half.frames) == (6, 3)
    scale = float(whole.precision.abs().max())
    torch.testing.assert_close(half.precision, whole.precision, rtol=1e-9, atol=1e-12 * scale)
    torch.testing.assert_close(half.pull, whole.pull, rtol=1e-8, atol=1e-8 * float(whole.pull.abs().max()))


def test_labels_that_are_not_there_do_not_count() -> None:
    """Frames without forces, without energies, and without stress, beside those that have them, by a sum over each kind."""
    potential, parts, whole = copper(), [], []
    for number, frame in enumerate(emt_frames(6, seed=0)):
        given = {"energy": frame.energy, "forces": frame.forces, "stress": frame.stress}
        del given[("energy", "forces", "stress")[number % 3]]
        parts.append(graph_of(frame.to_atoms(), 4.0, **given))
        whole.append((frame, given))
    held = graphs(3, seed=5)
    found = solve_equations(potential, Labels(parts, held, quiet=True))
    expected, of_stress = torch.zeros_like(found.precision), torch.zeros_like(found.precision)
    for frame, given in whole:
        for name in given:
            one = graph_of(frame.to_atoms(), 4.0, **{name: given[name]})
            alone = Labels([one], held, quiet=True)
            own = solve_equations(potential, alone).precision
            expected += own
            of_stress += own if name == "stress" else 0
    torch.testing.assert_close(found.precision, expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))
    without = solve_equations(potential, Labels(parts, held, stress=False, quiet=True))
    assert without.scales.virial == 0
    assert bool(of_stress.any())
    torch.testing.assert_close(
        without.precision, expected - of_stress, rtol=1e-9, atol=1e-9 * float(of_stress.abs().max())
    )


def test_frames_are_evenly_chosen_and_bounded_by_their_atoms() -> None:
    some = graphs(30, seed=0)

    def numbers(frames: int, atoms: float) -> list[int]:
        return [[g is other for other in some].index(True) for g in module._evenly(some, frames, atoms)]

    assert numbers(3, 1e6) == [0, 10, 20]
    assert numbers(100, 1e6) == list(range(30))
    assert numbers(100, 4 * 15) == list(range(0, 30, 2))
    assert len(numbers(100, 4)) == 10


@KINDS
@pytest.mark.parametrize("elements", [(29,), (1, 6, 8, 14, 29), SIX, (1, 3, 6, 7, 8, 14, 26, 29)], ids=len)
def test_the_basis_is_orthogonal_and_holds_what_all_elements_have_in_common(elements, kind: str) -> None:
    potential = make_potential(elements, NONE, kind=kind)
    basis, n = element_basis(potential), len(elements)
    assert basis.shape == (n, min(n, 5)) == potential.basis.shape
    scale = 1 if n <= 5 else n
    torch.testing.assert_close(
        basis.T @ basis, scale * torch.eye(basis.shape[1], dtype=torch.float64), rtol=0, atol=1e-12
    )
    shared = basis @ trained_weights(potential, basis).reshape(basis.shape[1], -1)
    for row in shared:  # every element reads with w*
        torch.testing.assert_close(row, potential.read_weights(), rtol=0, atol=1e-13)


def test_elements_that_the_network_finds_alike_share_their_weights() -> None:
    potential = make_potential(SIX, NONE)
    with torch.no_grad():
        for layer in potential.layers:  # iron has learned what copper has
            layer.update.species.weight.copy_(normal(*layer.update.species.weight.shape))
            layer.update.species.weight[4] = layer.update.species.weight[5]
    basis = element_basis(potential)
    torch.testing.assert_close(basis[4], basis[5], rtol=0, atol=1e-8)
    assert float((basis[0] - basis[1]).abs().max()) > 0.1


def test_memory_of_a_bank_is_that_of_five_elements() -> None:
    potential = make_potential(tuple(range(1, 21)), NONE)
    assert potential.correction.weight.shape[0] == 5
    assert np.shape(potential.basis) == (20, 5)
