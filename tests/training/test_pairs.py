"""The pair potential below a network is the best one: of labels that a pair potential made, nothing is left."""

import numpy as np
import pytest
import torch
from ase.build import bulk, molecule
from ase.calculators.morse import MorsePotential

from forcedrop.derive import derive, geometry, pair_forces
from forcedrop.graph import batch_graphs
from forcedrop.model import TrainedModel, load_model, save_model
from forcedrop.potential.contract import lengths
from forcedrop.training.pairs import fit_bonds
from tests.conftest import NONE, batch_of, graph_of, make_potential


def morse_frames(n: int = 12, seed: int = 0, **labels: bool) -> list:
    """Rattled copper cells whose labels are a Morse potential's, with 2.5 eV for every atom alone."""
    generator, graphs = np.random.default_rng(seed), []
    for _ in range(n):
        atoms = bulk("Cu", a=3.6, cubic=True)
        atoms.set_cell(atoms.cell.array * generator.uniform(0.95, 1.08), scale_atoms=True)
        atoms.positions += generator.normal(scale=0.12, size=(4, 3))
        atoms.calc = MorsePotential(epsilon=0.3, r0=2.6, rho0=4.0, rcut1=2.9, rcut2=3.9)
        wanted = {"energy": float(atoms.get_potential_energy()) + 4 * 2.5, "forces": atoms.get_forces()}
        graphs.append(graph_of(atoms, 4.0, **{k: v for k, v in wanted.items() if labels.get(k, True)}))
    return graphs


@pytest.mark.parametrize("labels", [{}, {"energy": False}, {"forces": False}])
def test_coefficients_that_made_the_labels_are_found(labels: dict[str, bool]) -> None:
    """Labels of the repulsion and two known coefficients, with energies of atoms alone that nobody told."""
    source = make_potential(elements=(1, 6), rates=NONE)
    wanted = torch.tensor([[0.0, -1.3], [-1.3, -0.8]], dtype=torch.float64)
    source.repulsion.bond.copy_(wanted)
    graphs = []
    for seed in range(30):
        atoms = molecule("C2H6" if seed % 2 else "CH4")
        atoms.rattle(0.1, seed=seed)
        batch = batch_of([atoms], 4.0)
        inputs, vec = geometry(source, batch)
        energies = source.repulsion(lengths(vec), inputs.species, inputs.nbr, 4.0)
        made = {"energy": float(energies.sum() + source.isolated_energy(inputs.species).sum() + 3.0 * len(atoms))}
        made["forces"] = pair_forces(source, batch).numpy()
        graphs.append(graph_of(atoms, 4.0, **{k: v for k, v in made.items() if labels.get(k, True)}))
    potential = make_potential(elements=(1, 6, 8), rates=NONE)
    fit_bonds(potential, graphs)
    found = potential.repulsion.bond
    torch.testing.assert_close(found[:2, :2], wanted, rtol=0, atol=1e-3 if labels.get("forces", True) else 0.05)
    assert not found[2].any()  # of oxygen there is nothing to learn
    assert torch.equal(found, found.T)


def test_a_metal_leaves_little() -> None:
    train, test = morse_frames(24), batch_graphs(morse_frames(6, seed=1))
    potential = make_potential(elements=(29,), rates=NONE)
    fit_bonds(potential, train)
    left = (test.forces - pair_forces(potential, test)).square().mean().sqrt()
    assert float(left) < 0.7 * float(test.forces.square().mean().sqrt())


def test_where_pairs_explain_nothing_there_is_a_wall_inside_alone() -> None:
    """Labels that no pair makes: in training nothing changes, closer than there atoms are pushed apart."""
    generator, graphs = np.random.default_rng(0), []
    for seed in range(12):
        atoms = bulk("Si", a=5.43, cubic=True)
        atoms.rattle(0.1, seed=seed)
        graphs.append(graph_of(atoms, 4.0, energy=0.0, forces=generator.normal(size=(8, 3))))
    potential = make_potential(elements=(8, 14), rates=NONE)
    fit_bonds(potential, graphs)
    wall, batch = potential.repulsion, batch_graphs(graphs)
    assert not pair_forces(potential, batch).any()
    shortest = float(wall.start[1, 1])
    _, vec = geometry(potential, batch)
    assert shortest == pytest.approx(float(lengths(vec).min()), abs=1e-12)
    r = torch.linspace(0.2, shortest + 0.5, 4000, dtype=torch.float64, requires_grad=True)
    places = torch.tensor(1)
    energy = wall.pair(r, places, places, 4.0)
    (slope,) = torch.autograd.grad(energy.sum(), r, create_graph=True)
    (bend,) = torch.autograd.grad(slope.sum(), r)
    inside = r.detach() < shortest
    assert bool((slope[inside] < 0).all())
    assert not energy[~inside].any()
    assert float(energy[0].detach()) > 1000
    step = float((r[1] - r[0]).detach())
    for value in (energy, slope, bend):  # no jump anywhere, of the curvature neither
        near = value.detach()[(r.detach() - shortest).abs() < 3 * step]
        assert float(near.abs().max()) < 1e-2 * float(value.detach().abs().max())
    torch.testing.assert_close(
        energy.detach().diff() / step, 0.5 * (slope[1:] + slope[:-1]).detach(), rtol=1e-2, atol=1e-2
    )


def test_without_bonds_the_wall_is_inside_whatever_the_labels_say() -> None:
    potential, train = make_potential(elements=(29,), rates=NONE, bonds=False), morse_frames(6)
    fit_bonds(potential, train)
    assert float(potential.repulsion.start) > 2.0
    assert not pair_forces(potential, batch_graphs(train)).any()


def test_without_labels_or_repulsion_there_is_none() -> None:
    potential = make_potential(rates=NONE)
    fit_bonds(potential, [graph_of(bulk("Cu"), 4.0)])
    assert not potential.repulsion.bond.any()
    bare = make_potential(rates=NONE, repulsion=False)
    fit_bonds(bare, morse_frames(2))
    assert bare.repulsion is None


def test_it_is_in_the_file(tmp_path) -> None:
    potential = make_potential(elements=(29,), rates=NONE)
    fit_bonds(potential, morse_frames(6))
    save_model(TrainedModel(potential, None, {"method": "none"}, {}), tmp_path / "model.pt")
    loaded, batch = load_model(tmp_path / "model.pt").potential, batch_of([bulk("Cu", a=3.5, cubic=True)], 4.0)
    assert loaded.repulsion.bond.any()
    assert torch.equal(derive(loaded, batch).energy, derive(potential, batch).energy)
