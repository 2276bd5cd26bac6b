"""The way back that is written out by hand, against automatic differentiation of the network itself."""

import pytest
import torch

from forcedrop.graph import pair_vectors
from forcedrop.potential import READOUT_SHIFT, DropoutRates
from forcedrop.potential import pullback as pullback_module
from forcedrop.potential.pullback import blocks_of, late_gradients, late_sites
from forcedrop.potential.radial import BesselBasis
from forcedrop.potential.sphere import harmonics_and_gradients, spherical_harmonics
from forcedrop.sampling import draw_masks
from tests.conftest import STRUCTURES, batch_of, make_potential

SHAPES = [
    {},
    {"n_layers": 1},
    {"n_layers": 3, "l_max": 3, "l_message": 2},
    {"l_max": 2, "l_message": 1, "zbl": True},
    {"l_max": 1, "l_message": 0},
]


def everything(rates: DropoutRates = DropoutRates(), **shape: object):
    """A network, all structures in one batch, and three samples that differ at its end."""
    potential = make_potential(rates=rates, **shape)
    generator = torch.Generator().manual_seed(1)
    shifts = torch.randn(4, potential.n_readout, dtype=torch.float64, generator=generator)
    potential.refit = 0.3 * shifts[3]
    batch = batch_of([make() for make in STRUCTURES.values()], potential.config.cutoff)
    vec = pair_vectors(batch, 2 * potential.config.cutoff)
    potential.measure_centres(potential.inputs(batch), vec)
    masks = draw_masks(potential, batch, 0, 3) | {READOUT_SHIFT: shifts[:3]}
    return potential, vec, potential.inputs(batch), masks


def check(potential, vec, graph, masks) -> None:
    energies, gradient = late_gradients(potential, vec, graph, masks)
    for k in range(3):
        leaf = vec.clone().requires_grad_(True)
        expected = potential(leaf, graph, {name: mask[k] for name, mask in masks.items()})
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        torch.testing.assert_close(energies[k], expected, rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(gradient[k], slope, rtol=1e-11, atol=1e-10)
        assert float(slope.abs().max()) > 0.1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_energies_and_gradients_are_those_of_automatic_differentiation(shape) -> None:
    check(*everything(**shape))


@pytest.mark.parametrize("rates", [{"readout": 0.5}, {"update": 0.3}, {"update": 0.2, "readout": 0.4}], ids=str)
@pytest.mark.parametrize("shifted", [True, False])
def test_late_masks(rates, shifted) -> None:
    potential, vec, graph, masks = everything(DropoutRates(**rates))
    if not shifted:
        del masks[READOUT_SHIFT]
    assert len(masks) == len(rates) + shifted
    assert set(masks) <= late_sites(potential)
    check(potential, vec, graph, masks)


def test_early_masks_are_not_late() -> None:
    potential = make_potential(rates=DropoutRates(message=0.1, update=0.1, edge=0.1, readout=0.1), n_layers=3)
    late = {site.name for site in potential.sites} & late_sites(potential)
    assert late == {"layers.2.update", "readout.hidden"}


def test_blocks_of_atoms_change_nothing(monkeypatch) -> None:
    potential, vec, graph, masks = everything()
    whole = late_gradients(potential, vec, graph, masks)
    monkeypatch.setattr(pullback_module, "BLOCK_BYTES", 1)
    assert len(blocks_of(len(vec), 8, vec.device)) == len(vec)
    for a, b in zip(whole, late_gradients(potential, vec, graph, masks), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_blocks_cover_the_atoms_once() -> None:
    blocks = blocks_of(10, pullback_module.BLOCK_BYTES // 3, torch.device("cpu"))
    assert [range(10)[b] for b in blocks] == [range(3), range(3, 6), range(6, 9), range(9, 10)]
    assert blocks_of(10, 2**20, torch.device("cuda")) == [slice(0, 10)]
    assert len(blocks_of(3000, 2**20, torch.device("cuda"))) == 3


@pytest.mark.parametrize("l_max", [1, 2, 3, 4, 5])
def test_harmonics_and_their_gradients(l_max) -> None:
    vec = torch.randn(40, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    r = vec.norm(dim=-1)
    values, gradient = harmonics_and_gradients(vec / r[:, None], r, l_max)
    torch.testing.assert_close(values, spherical_harmonics(vec / r[:, None], l_max), rtol=0, atol=1e-11)
    leaf = vec.clone().requires_grad_(True)
    every = spherical_harmonics(leaf / leaf.norm(dim=-1, keepdim=True), l_max)
    for place in range((l_max + 1) ** 2):
        (expected,) = torch.autograd.grad(every[:, place].sum(), leaf, retain_graph=True)
        torch.testing.assert_close(gradient[:, :, place].T, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("power", [3, 6])
def test_radial_slopes(power) -> None:
    basis = BesselBasis(5, 4.0, power).double()
    r = torch.tensor([0.3, 1.0, 2.5, 3.9, 3.9999, 4.0, 4.5], dtype=torch.float64, requires_grad=True)
    values, slopes = basis.with_slope(r)
    torch.testing.assert_close(values, basis(r))
    for n in range(5):
        (expected,) = torch.autograd.grad(basis(r)[:, n].sum(), r)
        torch.testing.assert_close(slopes[:, n], expected, rtol=1e-10, atol=1e-12)
