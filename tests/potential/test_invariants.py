"""The invariants of the design, for every kind of network, every sample and every site, on a molecule, crystals and a slab."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from forcedrop.derive import VOIGT, Derived, derive, derive_functions, geometry
from forcedrop.dropout import SphericalDropout, frozen
from forcedrop.potential import KINDS, DropoutRates, EnergyModel
from forcedrop.testing import assert_conservative, assert_equivariant, assert_smooth
from forcedrop.uncertainty.ensemble import Ensemble
from forcedrop.uncertainty.sampling import predict, require_functions
from tests.conftest import NONE, RATES, SMALL, STRUCTURES, banked_potential, batch_of, ethanol, make_potential, silicon

K = 4


def cut_bank(kind: str) -> EnergyModel:
    """Cut radii and weights of its own for each function, as exact dropout with cuts leaves them."""
    potential = banked_potential(kind=kind)
    site, generator = potential.edges, torch.Generator().manual_seed(3)
    radii = 1.0 + 3.0 * torch.rand(8, site.kinds, dtype=torch.float64, generator=generator)
    site.bank = torch.where(radii < 3.0, radii, 1e6)
    site.p = 0.5
    return potential


def too_close(kind: str) -> EnergyModel:
    """Functions above a pair potential, of a network that knows larger distances than some of those in the test's structures."""
    potential = banked_potential(kind=kind)
    z = potential.elements
    potential.set_shortest({(a, b): {2: 1.0, 7: 1.4, 12: 2.0}.get(a + b, 2.9) for a in z for b in z})
    weight = torch.randn(len(z), len(z), dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    potential.repulsion.bond.copy_(weight + weight.T)
    return potential


CASES: dict[str, Callable[[str], EnergyModel]] = {
    "every mask": lambda kind: make_potential(kind=kind, rates=RATES),
    "bank": lambda kind: banked_potential(kind=kind),
    "edge cuts": lambda kind: make_potential(kind=kind, rates=DropoutRates(edge=0.6)),
    "bank with cuts": cut_bank,
    "too close": too_close,
    "ensemble": lambda kind: Ensemble([make_potential(kind=kind, rates=NONE, seed=k) for k in range(8)]),
}
every = [f"{kind}: {case}" for kind in KINDS if kind in SMALL for case in CASES]


@cache
def network(name: str) -> EnergyModel:
    kind, _, case = name.partition(": ")
    return CASES[case](kind).eval()


functions = pytest.mark.parametrize("name", every)
"""Every kind of network with every kind of function."""


def samples_of(potential: EnergyModel, atoms: Atoms, k: int = K) -> Derived:
    """The first k functions; of a bank energies are those of all functions."""
    found = predict(potential, batch_of([atoms], potential.cutoff), n_samples=k).samples
    return found._replace(energy=found.energy[:k], energies=found.energies[:k])


def evaluator(potential: EnergyModel):
    def evaluate(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        out = samples_of(potential, atoms)
        return out.energy[:, 0].detach().numpy(), out.forces.detach().numpy()

    return evaluate


@functions
def test_equivariance_of_every_sample(name: str, structure: Atoms) -> None:
    """Rotation with inversion, translation, permutation: edge cuts belong to elements and distances, not to atoms."""
    assert_equivariant(evaluator(network(name)), structure)


@pytest.mark.parametrize("shape", [{"l_message": 1}, {"l_message": 3}, {"n_layers": 3}, {"l_max": 1}], ids=str)
def test_equivariance_of_other_shapes(shape: dict[str, int]) -> None:
    assert_equivariant(evaluator(make_potential(**shape)), ethanol())
    assert_equivariant(evaluator(banked_potential(**shape)), ethanol())


@functions
def test_forces_are_gradients_of_every_sample(name: str, structure: Atoms) -> None:
    assert_conservative(evaluator(network(name)), structure, tolerance=1e-7, directions=2)


@functions
@pytest.mark.parametrize("cell", ["silicon", "copper"])
def test_stress_against_strained_cells(name: str, cell: str) -> None:
    potential, atoms, step = network(name), STRUCTURES[cell](), 1e-4
    stress = samples_of(potential, atoms).stress[:, 0].detach().numpy()
    for component, (a, b) in enumerate(zip(*VOIGT, strict=True)):
        energies = []
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[a, b] += 0.5 * sign * step
            strain[b, a] += 0.5 * sign * step
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
            energies.append(samples_of(potential, strained).energy[:, 0].detach().numpy())
        slope = (energies[0] - energies[1]) / (2 * step) / atoms.get_volume()
        np.testing.assert_allclose(stress[:, component], slope, atol=1e-7)


@functions
def test_supercell_has_eight_times_energy_and_sigma(name: str) -> None:
    potential, cell = network(name), silicon()
    one, eight = (predict(potential, batch_of([a], 4.0), n_samples=8) for a in (cell, cell.repeat(2)))
    torch.testing.assert_close(eight.samples.energy, 8 * one.samples.energy, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(eight.mean.energy, 8 * one.mean.energy, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(eight.std.energy, 8 * one.std.energy, rtol=1e-8, atol=1e-9)
    for copy in range(8):
        torch.testing.assert_close(eight.std.forces[2 * copy : 2 * copy + 2], one.std.forces, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(eight.std.stress, one.std.stress, rtol=1e-8, atol=1e-10)
    assert float(one.std.energy) > 1e-3


@functions
def test_two_far_copies_have_twice_the_energy_and_sigma(name: str) -> None:
    potential, one = network(name), ethanol()
    far = one.copy()
    far.translate([50, 0, 0])
    single, double = (predict(potential, batch_of([a], 4.0), n_samples=K) for a in (one, one + far))
    torch.testing.assert_close(double.mean.energy, 2 * single.mean.energy, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(double.std.energy, 2 * single.std.energy, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(double.std.forces[: len(one)], single.std.forces, rtol=1e-9, atol=1e-10)


@functions
def test_smooth_through_the_cutoff_for_every_sample(name: str) -> None:
    sampled_potential = network(name)

    def along(x: float) -> np.ndarray:
        atoms = Atoms("COH", positions=[[0, 0, 0], [1.2, 0, 0], [x, 0.3, 0]])
        out = samples_of(sampled_potential, atoms)
        return np.concatenate([out.energy.detach().numpy().ravel(), out.forces.detach().numpy().ravel()])

    assert_smooth(along, 3.8, 4.2)
    beyond = along(5.5)
    np.testing.assert_allclose(along(7.0), beyond, atol=1e-12)


@functions
def test_batch_of_many_equals_one_by_one(name: str) -> None:
    potential = network(name)
    images = [make() for make in STRUCTURES.values()]
    together = predict(potential, batch_of(images, 4.0), n_samples=K)
    first = 0
    for b, atoms in enumerate(images):
        alone = predict(potential, batch_of([atoms], 4.0), n_samples=K)
        mine = slice(first, first + len(atoms))
        first += len(atoms)
        torch.testing.assert_close(together.samples.energy[:, b], alone.samples.energy[:, 0], rtol=0, atol=1e-10)
        torch.testing.assert_close(together.samples.forces[:, mine], alone.samples.forces, rtol=0, atol=1e-10)
        torch.testing.assert_close(together.std.stress[b], alone.std.stress[0], rtol=0, atol=1e-10)


@functions
def test_same_seed_same_bits_whatever_came_before(name: str) -> None:
    potential = network(name)
    batch, other = batch_of([ethanol()], 4.0), batch_of([silicon()], 4.0)
    first = predict(potential, batch, n_samples=K, seed=3)
    torch.rand(3)
    predict(potential, other, n_samples=7, seed=1)
    again = predict(potential, batch, n_samples=K, seed=3)
    for a, b in zip(first.samples, again.samples, strict=True):
        assert torch.equal(a, b)
    drawn = potential.n_functions is None
    assert torch.equal(first.samples.energy, predict(potential, batch, n_samples=K, seed=4).samples.energy) is not drawn


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in SMALL])
def test_rates_of_zero_are_the_plain_network(kind: str) -> None:
    batch = batch_of([ethanol()], 4.0)
    plain, masked = (make_potential(kind=kind, rates=rates) for rates in (NONE, RATES))
    with frozen(plain, 0, 1):
        unmasked = derive(plain, batch)
    for a, b in zip(derive(plain, batch), unmasked, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)
    for a, b in zip(derive(plain, batch), derive(masked, batch), strict=True):
        assert torch.equal(a, b)  # rates are nothing to the plain network
    with frozen(masked, 0, 1):
        assert abs(float(derive(masked, batch).energy - derive(plain, batch).energy)) > 1e-6


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in SMALL])
def test_every_site_changes_the_result(kind: str) -> None:
    """A site that is named but not used would be an error bar that lies."""
    potential, batch = make_potential(kind=kind), batch_of([ethanol()], 4.0)
    plain, rates = derive(potential, batch), {name: site.p for name, site in potential.inner_sites.items()}
    assert sum(rate > 0 for rate in rates.values()) >= 4
    for name in [name for name, rate in rates.items() if rate]:
        for other, site in potential.inner_sites.items():
            site.p = rates[other] if other == name else 0.0
        energies = []
        for k in range(K):
            with frozen(potential, 0, k):
                energies.append(float(derive(potential, batch).energy))
        assert max(abs(e - float(plain.energy)) for e in energies) > 1e-6, name


@functions
def test_samples_equal_single_passes(name: str) -> None:
    potential, batch = network(name), batch_of([ethanol(), silicon()], 4.0)
    chosen = [3, 0, 2]
    _, together = derive_functions(potential, batch, chosen, seed=5)
    for place, k in enumerate(chosen):
        with frozen(potential, 5, k):
            own = derive(potential, batch)
        row = k if potential.centred else place  # of a bank energies are those of all functions
        torch.testing.assert_close(own.energy.detach(), together.energy[row].detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(own.forces, together.forces[place].detach(), rtol=0, atol=1e-10)
        torch.testing.assert_close(own.stress, together.stress[place].detach(), rtol=0, atol=1e-10)


def test_no_site_no_error_bar() -> None:
    potential = make_potential(rates=NONE)
    assert potential.n_functions == 0
    with pytest.raises(ValueError, match="no dropout site"):
        require_functions(potential)
    with pytest.raises(ValueError, match="no dropout site"):
        predict(potential, batch_of([ethanol()], 4.0), n_samples=4)


@pytest.mark.parametrize("layers", [1, 3])
def test_depths(layers: int) -> None:
    rates = RATES if layers > 1 else DropoutRates(edge=0.3, readout=0.5)
    assert_conservative(
        evaluator(make_potential(rates=rates, n_layers=layers)), ethanol(), tolerance=1e-6, directions=2
    )


@functions
def test_one_atom_and_two_far_atoms(name: str) -> None:
    potential = network(name)
    single = predict(potential, batch_of([Atoms("O")], 4.0), n_samples=K)
    assert not bool(single.mean.forces.any())
    far = predict(potential, batch_of([Atoms("OO", positions=[[0, 0, 0], [9, 0, 0]])], 4.0), n_samples=K)
    assert not bool(far.mean.forces.any())
    torch.testing.assert_close(far.samples.energy, 2 * single.samples.energy, rtol=0, atol=1e-10)
    assert torch.isfinite(far.std.stress).all()


def test_unknown_element_is_named() -> None:
    potential = make_potential(elements=(1, 6, 8))
    with pytest.raises(ValueError, match=r"atom 0 has atomic number 14.*\[1, 6, 8\]"):
        derive(potential, batch_of([silicon()], 4.0))


def test_norms_depend_on_the_first_batch_only() -> None:
    potential = make_potential()
    before = {k: v.clone() for k, v in potential.state_dict().items()}
    predict(potential, batch_of([silicon()], 4.0), n_samples=2)
    assert all(torch.equal(v, before[k]) for k, v in potential.state_dict().items())


def test_masks_act_about_the_typical_atom() -> None:
    """In a perfect crystal every atom is the typical one of its element: no mask changes anything, until an atom moves."""
    potential, crystal = make_potential(rates=DropoutRates(update=0.3, readout=0.5)), bulk("Si")
    batch = batch_of([crystal.repeat(2)], potential.cutoff)
    assert float(predict(potential, batch, n_samples=K).std.energy) > 1e-3
    graph, vec = geometry(potential, batch)
    potential.measure_centres(vec, graph)
    about = predict(potential, batch, n_samples=K)
    torch.testing.assert_close(about.mean.energy, derive(potential, batch).energy, rtol=0, atol=1e-9)
    assert float(about.std.energy) < 1e-9
    moved = crystal.repeat(2)
    moved.positions[0] += [0.1, 0.0, 0.2]
    assert float(predict(potential, batch_of([moved], potential.cutoff), n_samples=K).std.energy) > 1e-3


def test_masks_act_about_centres_that_are_means_of_each_element() -> None:
    potential, batch = make_potential(), batch_of([ethanol(), silicon()], 4.0)
    graph, vec = geometry(potential, batch)
    site, seen = potential.hidden_dropout, []
    hook = site.register_forward_pre_hook(lambda own, args: seen.append(args[0]))
    potential(vec, graph)
    hook.remove()
    potential.measure_centres(vec, graph)
    for place in graph.species.unique().tolist():
        torch.testing.assert_close(site.centre[place], seen[0][0, graph.species == place].mean(0).detach())
    other = SphericalDropout(0, 4, 0.5)
    assert other.centre is None


@functions
def test_a_lone_atom_of_each_element_is_lone_for_every_function(name: str) -> None:
    """No neighbours: no forces, and the same energy in any cell that is wide enough."""
    potential = network(name)
    for z in (1, 8, 29):
        free = predict(potential, batch_of([Atoms([z])], 4.0), n_samples=K)
        boxed = predict(potential, batch_of([Atoms([z], cell=[9.0] * 3, pbc=True)], 4.0), n_samples=K)
        torch.testing.assert_close(free.samples.energy, boxed.samples.energy, rtol=0, atol=1e-11)
        assert not bool(free.samples.forces.any())
        assert not bool(boxed.samples.stress.any())
