"""An atom alone has its isolated energy, in every function; closer than ever in training the repulsion is what is left."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from forcedrop.derive import derive
from forcedrop.model import TrainedModel, load_model, save_model
from forcedrop.potential import DropoutRates
from forcedrop.potential.limits import ClosestApproach, Presence
from forcedrop.uncertainty.ensemble import Ensemble
from forcedrop.uncertainty.sampling import predict
from tests.conftest import NONE, SMALL, banked_potential, batch_of, ethanol, make_potential, silicon

MAKERS = {
    "masks": lambda kind: make_potential(kind=kind),
    "bank": lambda kind: banked_potential(kind=kind),
    "edges": lambda kind: make_potential(kind=kind, rates=DropoutRates(edge=0.5)),
    "ensemble": lambda kind: Ensemble([make_potential(kind=kind, rates=NONE, seed=k) for k in range(4)]),
}
kinds = pytest.mark.parametrize("kind", list(SMALL))


@kinds
@pytest.mark.parametrize("maker", list(MAKERS))
def test_an_atom_alone_has_its_isolated_energy(kind: str, maker: str) -> None:
    potential = MAKERS[maker](kind)
    found = predict(potential, batch_of([Atoms("C"), Atoms("O"), Atoms("Si")], 4.0), n_samples=4)
    wanted = torch.tensor([-6.0, -8.0, -14.0], dtype=torch.float64)
    assert torch.equal(found.samples.energy, wanted.expand_as(found.samples.energy))
    assert float(found.std.energy.max()) == 0.0


@kinds
@pytest.mark.parametrize("maker", list(MAKERS))
def test_a_molecule_pulled_apart_ends_at_the_sum(kind: str, maker: str) -> None:
    potential, atoms = MAKERS[maker](kind), ethanol()
    energies = []
    for scale in np.linspace(1.0, 4.2, 300):
        moved = atoms.copy()
        moved.positions *= scale
        energies.append(predict(potential, batch_of([moved], 4.0), n_samples=4).samples.energy[:, 0])
    found = torch.stack(energies)
    assert torch.equal(found[-1], torch.full_like(found[-1], -26.0))  # 2 C, 6 H, O
    assert float((found[0] + 26).abs().min()) > 1e-3
    assert float(found.diff(dim=0).abs().max()) < 0.2 * float((found - found[-1]).abs().max())  # no jump on the way


def test_presence_is_one_beside_a_bond() -> None:
    presence = Presence((1, 6)).double()
    one, nbr = torch.tensor([0, 1]), torch.tensor([[1], [0]])
    r = torch.tensor([[1.09], [1.09]], dtype=torch.float64)  # a C–H bond; covalent radii 0.31 and 0.76 Å
    assert float(presence(r, one, nbr, 5.0)[0]) == pytest.approx(0.999, abs=1e-4)
    assert float(presence(r * 0.1, one, nbr, 5.0)[0]) == pytest.approx(0.999, abs=1e-12)
    for cutoff, reach in ((5.0, 2.5 * 1.07), (2.0, 2.0)):
        r = torch.full((2, 1), reach, dtype=torch.float64)
        assert float(presence(r, one, nbr, cutoff)[0]) == pytest.approx(0.0, abs=1e-12)
        assert 0 < float(presence(0.99 * r, one, nbr, cutoff)[0]) < 1e-3
    r = torch.tensor([[1.09, 9.0], [1.09, 9.0]], dtype=torch.float64)  # an empty slot changes nothing
    two = presence(r, one, torch.tensor([[1, 0], [0, 1]]), 5.0)
    assert torch.equal(two, presence(r[:, :1], one, nbr, 5.0))


def test_closest_approach_follows_then_rests() -> None:
    approach = ClosestApproach(2).double()
    r = torch.linspace(0.05, 3.0, 2000, dtype=torch.float64, requires_grad=True)
    species, nbr = torch.tensor([0, 1]), torch.tensor([[1], [0]])
    assert torch.equal(approach(r[:, None].T.expand(2, -1), species, nbr.expand(2, 2000)), r[None].expand(2, -1))
    approach.set(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    told = approach(r[None].expand(2, -1), species, nbr.expand(2, 2000))[0]
    (slope,) = torch.autograd.grad(told.sum(), r)
    told, r = told.detach(), r.detach()
    assert torch.equal(told[r > 0.9], r[r > 0.9])
    torch.testing.assert_close(told[r < 0.6], torch.full_like(told[r < 0.6], 0.75))
    assert bool((told >= r).all())
    assert bool((slope >= -1e-12).all())
    assert float(slope.max()) < 1 + 1e-12
    step = float(r[1] - r[0])
    torch.testing.assert_close(told.diff() / step, 0.5 * (slope[1:] + slope[:-1]), rtol=0, atol=2e-3)


@kinds
def test_below_the_shortest_distance_the_energy_rises(kind: str) -> None:
    """Whatever the network says of a dimer, closer than six tenths of what it knows only the repulsion changes."""
    potential = banked_potential(kind=kind)
    potential.set_shortest({(1, 6): 1.0, (6, 6): 1.3, (6, 8): 1.2})
    wall = potential.repulsion
    for a, b, shortest in ((6, 1, 1.0), (6, 6, 1.3), (6, 8, 1.2)):
        distances = np.linspace(0.2, 0.59 * shortest, 30)
        images = [Atoms([a, b], positions=[[0, 0, 0], [0, 0, r]]) for r in distances]
        found = predict(potential, batch_of(images, 4.0), n_samples=4)
        r = torch.as_tensor(distances)
        places = [torch.tensor(potential.elements.index(z)) for z in (a, b)]
        own = wall.pair(r, *places, 4.0)
        for energies in found.samples.energy:
            torch.testing.assert_close(energies - energies[0], own - own[0], rtol=1e-9, atol=1e-7)
        push = found.samples.forces[:, 1::2, 2]
        assert bool((push > 0).all())
        assert float(found.std.forces.max()) < 1e-9 * float(push.max())


@kinds
def test_shortest_distances_are_kept_in_the_file(kind: str, tmp_path) -> None:
    potential = banked_potential(kind=kind)
    potential.set_shortest({(1, 6): 1.0})
    potential.set_shortest({(6, 1): 0.9, (8, 6): 1.2})
    potential.set_shortest({(1, 6): 0.95})
    save_model(TrainedModel(potential, None, {"method": "posterior"}, {}), tmp_path / "model.pt")
    loaded = load_model(tmp_path / "model.pt").potential
    assert loaded.approach.known
    table = loaded.approach.shortest
    assert [float(table[i, j]) for i, j in ((0, 1), (1, 0), (1, 2), (0, 0))] == pytest.approx(
        [0.9, 0.9, 1.2, 1.3 * 0.62]
    )
    close = batch_of([Atoms("CH", positions=[[0, 0, 0], [0, 0, 0.5]])], 4.0)
    assert torch.equal(derive(potential, close).forces, derive(loaded, close).forces)


@kinds
@pytest.mark.parametrize("far", [1e4, 1e6])
def test_forces_do_not_depend_on_where_a_structure_is(kind: str, far: float) -> None:
    """Invariant 10: differences of positions are taken in float64, also between images of a periodic structure."""
    potential = banked_potential(kind=kind).float()
    for atoms in (molecule("CH3CH2OH"), silicon()):
        near = derive(potential, batch_of([atoms], 4.0, torch.float32)).forces
        moved = atoms.copy()
        moved.positions += far * np.array([1.0, -0.7, 0.3])
        if atoms.pbc.any():
            moved.positions[1] += 1000 * moved.cell[0] - 500 * moved.cell[2]
        there = derive(potential, batch_of([moved], 4.0, torch.float32)).forces
        assert float((there - near).abs().max()) < 1e-5 * max(1.0, float(near.abs().max()))
