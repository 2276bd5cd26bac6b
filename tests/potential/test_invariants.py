"""The invariants of the design, for every sample, on a molecule, a triclinic cell, a one-atom cell and a slab."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from forcedrop.derive import VOIGT, Derived, derive, derive_samples
from forcedrop.graph import pair_vectors
from forcedrop.potential import DropoutRates, Potential, require_samples
from forcedrop.potential.layers import CentredMask
from forcedrop.sampling import draw_masks, predict
from forcedrop.testing import assert_conservative, assert_equivariant, assert_smooth
from tests.conftest import (
    FEATURES_ONLY,
    RATES,
    STRUCTURES,
    batch_of,
    ethanol,
    make_potential,
    posterior_potential,
    silicon,
)

K = 4


def samples_of(potential: Potential, atoms: Atoms, k: int = K) -> Derived:
    batch = batch_of([atoms], potential.config.cutoff)
    return predict(potential, batch, n_samples=k).samples


def evaluator(potential: Potential):
    def evaluate(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        out = samples_of(potential, atoms)
        return out.energy[:, 0].detach().numpy(), out.forces.detach().numpy()

    return evaluate


def test_equivariance_of_every_sample(structure: Atoms) -> None:
    """Edge bits belong to atom numbers, so a permutation is a symmetry of the feature sites only."""
    assert_equivariant(evaluator(make_potential(rates=FEATURES_ONLY)), structure)
    assert_equivariant(evaluator(posterior_potential()), structure)


@pytest.mark.parametrize("shape", [{"l_message": 1}, {"l_message": 3}, {"n_layers": 3}, {"l_max": 1}], ids=str)
def test_equivariance_of_other_shapes(shape: dict[str, int]) -> None:
    assert_equivariant(evaluator(make_potential(rates=FEATURES_ONLY, **shape)), ethanol())
    assert_equivariant(evaluator(posterior_potential(**shape)), ethanol())


def test_rotation_with_edge_dropout(structure: Atoms) -> None:
    potential = make_potential()
    energy, forces = evaluator(potential)(structure)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    turned = structure.copy()
    turned.set_cell(structure.cell.array @ rotation)
    turned.positions = structure.positions @ rotation
    new_energy, new_forces = evaluator(potential)(turned)
    np.testing.assert_allclose(new_energy, energy, atol=1e-9)
    np.testing.assert_allclose(new_forces, forces @ rotation, atol=1e-9)


def test_forces_are_gradients_of_every_sample(structure: Atoms, sampled_potential: Potential) -> None:
    assert_conservative(evaluator(sampled_potential), structure, tolerance=1e-7)


@pytest.mark.parametrize("name", ["silicon", "copper"])
def test_stress_against_strained_cells(name: str, sampled_potential: Potential) -> None:
    potential, atoms, step = sampled_potential, STRUCTURES[name](), 1e-4
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


NO_EDGES = {
    "all features": make_potential(rates=FEATURES_ONLY),
    "readout": make_potential(rates=DropoutRates(edge=0, message=0, update=0, readout=0.5)),
    "posterior": posterior_potential(),
}


@pytest.mark.parametrize("potential", NO_EDGES.values(), ids=list(NO_EDGES))
def test_supercell_has_eight_times_energy_and_sigma(potential: Potential) -> None:
    cell = silicon()
    one, eight = (predict(potential, batch_of([a], 4.0), n_samples=K) for a in (cell, cell.repeat(2)))
    torch.testing.assert_close(eight.mean.energy, 8 * one.mean.energy, rtol=1e-10, atol=1e-9)
    torch.testing.assert_close(eight.std.energy, 8 * one.std.energy, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(eight.std.forces[:2], one.std.forces, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(eight.std.stress, one.std.stress, rtol=1e-8, atol=1e-10)
    assert float(one.std.energy) > 1e-3


@pytest.mark.parametrize("potential", NO_EDGES.values(), ids=list(NO_EDGES))
def test_two_far_copies_have_twice_the_energy_and_sigma(potential: Potential) -> None:
    one = ethanol()
    far = one.copy()
    far.translate([50, 0, 0])
    single, double = (predict(potential, batch_of([a], 4.0), n_samples=K) for a in (one, one + far))
    torch.testing.assert_close(double.mean.energy, 2 * single.mean.energy, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(double.std.energy, 2 * single.std.energy, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(double.std.forces[: len(one)], single.std.forces, rtol=1e-9, atol=1e-10)


def test_smooth_through_the_cutoff_for_every_sample(sampled_potential: Potential) -> None:
    def along(x: float) -> np.ndarray:
        atoms = Atoms("COH", positions=[[0, 0, 0], [1.2, 0, 0], [x, 0.3, 0]])
        out = samples_of(sampled_potential, atoms)
        return np.concatenate([out.energy.detach().numpy().ravel(), out.forces.detach().numpy().ravel()])

    assert_smooth(along, 3.8, 4.2)
    beyond = along(5.5)
    np.testing.assert_allclose(along(7.0), beyond, atol=1e-12)


def test_batch_of_many_equals_one_by_one(sampled_potential: Potential) -> None:
    potential = sampled_potential
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


def test_same_seed_same_bits_whatever_came_before(sampled_potential: Potential) -> None:
    potential = sampled_potential
    batch, other = batch_of([ethanol()], 4.0), batch_of([silicon()], 4.0)
    first = predict(potential, batch, n_samples=K, seed=3)
    torch.rand(3)
    predict(potential, other, n_samples=7, seed=1)
    again = predict(potential, batch, n_samples=K, seed=3)
    for a, b in zip(first.samples, again.samples, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.samples.energy, predict(potential, batch, n_samples=K, seed=4).samples.energy)


def test_masks_of_ones_are_the_plain_network() -> None:
    potential, batch = make_potential(), batch_of([ethanol()], 4.0)
    masks = {name: torch.ones_like(mask[0]) for name, mask in draw_masks(potential, batch, 0, 2).items()}
    for a, b in zip(derive(potential, batch, masks), derive(potential, batch), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_every_site_changes_the_result() -> None:
    """A site that is named but not used would be an error bar that lies."""
    potential, batch = make_potential(), batch_of([ethanol()], 4.0)
    plain = derive(potential, batch)
    masks = draw_masks(potential, batch, 0, K)
    assert set(masks) == {site.name for site in potential.sites}
    assert len(masks) == 5
    for name, mask in masks.items():
        energies = [float(derive(potential, batch, {name: m}).energy) for m in mask]
        assert max(abs(e - float(plain.energy)) for e in energies) > 1e-6, name


def test_samples_equal_single_passes() -> None:
    potential, batch = make_potential(), batch_of([ethanol(), silicon()], 4.0)
    masks = draw_masks(potential, batch, 0, K)
    together = derive_samples(potential, batch, masks)
    for k in range(K):
        for a, b in zip(derive(potential, batch, {n: m[k] for n, m in masks.items()}), together, strict=True):
            torch.testing.assert_close(a, b[k].detach(), rtol=0, atol=1e-10)


def test_no_site_no_error_bar() -> None:
    potential = make_potential(rates=DropoutRates(edge=0, message=0, update=0, readout=0))
    assert potential.sites == ()
    with pytest.raises(ValueError, match="no dropout site"):
        require_samples(potential)
    with pytest.raises(ValueError, match="no dropout site"):
        predict(potential, batch_of([ethanol()], 4.0), n_samples=4)


@pytest.mark.parametrize("layers", [1, 3])
def test_depths(layers: int) -> None:
    rates = RATES if layers > 1 else DropoutRates(edge=0.1, message=0, update=0, readout=0.5)
    assert_conservative(
        evaluator(make_potential(rates=rates, n_layers=layers)), ethanol(), tolerance=1e-6, directions=2
    )


def test_one_atom_and_two_far_atoms() -> None:
    potential = make_potential()
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
    batch = batch_of([crystal.repeat(2)], potential.config.cutoff)
    assert float(predict(potential, batch, n_samples=K).std.energy) > 1e-3
    potential.measure_centres(potential.inputs(batch), pair_vectors(batch, 2 * potential.config.cutoff))
    about = predict(potential, batch, n_samples=K)
    torch.testing.assert_close(about.mean.energy, derive(potential, batch).energy, rtol=0, atol=1e-9)
    assert float(about.std.energy) < 1e-9
    moved = crystal.repeat(2)
    moved.positions[0] += [0.1, 0.0, 0.2]
    assert float(predict(potential, batch_of([moved], potential.config.cutoff), n_samples=K).std.energy) > 1e-3


def test_centred_masks_keep_the_mean_and_ones_keep_the_bits() -> None:
    layer = CentredMask(2, 5).double()
    layer.centre.copy_(torch.randn(2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    one_hot = torch.eye(2, dtype=torch.float64)[[0, 1, 1]]
    assert torch.equal(layer(x, one_hot, torch.ones(5, dtype=torch.float64)), x)
    torch.testing.assert_close(layer(x, one_hot, torch.zeros(5, dtype=torch.float64)), layer.centre[[0, 1, 1]])
    two = [layer(x, one_hot, torch.full((5,), value, dtype=torch.float64)) for value in (0.0, 2.0)]
    torch.testing.assert_close((two[0] + two[1]) / 2, x)
    layer.measuring = True
    layer(x, one_hot, None)
    torch.testing.assert_close(layer.centre, torch.stack([x[0], x[1:].mean(0)]))
