"""The way back that is written out by hand, layer by layer and as a whole, against automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from forcedrop.derive import geometry
from forcedrop.dropout import frozen
from forcedrop.graph import pair_vectors
from forcedrop.potential import DropoutRates, EnergyModel
from forcedrop.potential import blocks as blocks_module
from forcedrop.potential.blocks import BLOCK_BYTES, blocks_of
from forcedrop.potential.contract import lengths
from forcedrop.potential.linear import Linear, SphereNorm, TensorLinear, by_degree
from forcedrop.potential.network import SpherePotential
from forcedrop.potential.pairs import PairFunctions
from forcedrop.potential.radial import BesselBasis
from forcedrop.potential.sphere import harmonics_and_gradients, spherical_harmonics
from tests.conftest import NONE, STRUCTURES, batch_of, make_potential

SHAPES = [
    {},
    {"n_layers": 1},
    {"n_layers": 3, "l_max": 3, "l_message": 2},
    {"l_max": 2, "l_message": 1, "zbl": True, "repulsion": False},
    {"l_max": 1, "l_message": 1},
]
SIX = (1, 6, 8, 14, 26, 29)


def normal(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everything(elements: tuple[int, ...] = (1, 6, 8, 14, 29), **shape: object):
    """A network with weights from a regression, all structures in one batch, and three functions' weights."""
    potential = make_potential(elements, NONE, **shape)
    own = normal(4, *potential.correction.weight.shape)
    basis = normal(*potential.basis.shape, seed=2) if len(elements) > 5 else None
    potential.set_functions(0.3 * own[3], None, basis)
    graph, vec = geometry(potential, batch_of([make() for make in STRUCTURES.values()], potential.cutoff))
    return potential, vec, graph, own[:3]


@pytest.mark.parametrize("elements", [(1, 6, 8, 14, 29), SIX], ids=["five elements", "six, who share"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_functions_are_those_of_automatic_differentiation(shape, elements) -> None:
    potential, vec, graph, weights = everything(elements, **shape)
    assert type(potential).centred_gradients is not EnergyModel.centred_gradients
    (energies, gradient), features = potential.centred_gradients(vec, graph, weights)
    (other_energies, other), other_features = EnergyModel.centred_gradients(potential, vec, graph, weights)
    torch.testing.assert_close(energies, other_energies, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(features, other_features, rtol=1e-12, atol=1e-12)
    for k in range(3):  # and without any help of the contract: a frozen function of a bank
        potential.set_functions(potential.correction.weight.clone(), weights)
        leaf = vec.clone().requires_grad_(True)
        with frozen(potential, 0, k):
            expected = potential(leaf, graph)
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        torch.testing.assert_close(energies[k], expected.detach(), rtol=1e-12, atol=1e-11)
        torch.testing.assert_close(gradient[k], slope, rtol=1e-11, atol=1e-10)
        assert float(slope.abs().max()) > 0.1
    plain, automatic = potential.gradients(vec, graph), EnergyModel.gradients(potential, vec, graph)
    torch.testing.assert_close(plain.energies, automatic.energies, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(plain.gradient, automatic.gradient, rtol=1e-11, atol=1e-10)
    every = EnergyModel.function_gradients(potential, vec, graph, torch.arange(3))
    torch.testing.assert_close(every.gradient, gradient, rtol=1e-11, atol=1e-10)
    torch.testing.assert_close(
        potential.energies_of(features, graph) + plain.energies, energies, rtol=1e-12, atol=1e-11
    )


def test_the_plain_network_goes_by_hand_and_a_masked_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand nothing within may be dropped, so it must not be asked for where something is."""
    potential = make_potential(rates=DropoutRates(update=0.3))
    graph, vec = geometry(potential, batch_of([STRUCTURES["ethanol"]()], 4.0))
    asked = []
    by_hand = SpherePotential.centred_gradients
    monkeypatch.setattr(SpherePotential, "centred_gradients", lambda *args: asked.append(1) or by_hand(*args))
    potential.gradients(vec, graph)
    assert len(asked) == 1
    with frozen(potential, 0, 1):
        masked = potential.gradients(vec, graph)
        expected = EnergyModel.gradients(potential, vec, graph)
    assert len(asked) == 1
    assert torch.equal(masked.gradient, expected.gradient)


def test_blocks_of_atoms_change_nothing(monkeypatch) -> None:
    potential, vec, graph, weights = everything()
    (energies, gradient), features = potential.centred_gradients(vec, graph, weights)
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 1)
    assert len(blocks_of(len(vec), 8, vec.device)) == len(vec)
    (one, other), again = potential.centred_gradients(vec, graph, weights)
    for a, b in ((energies, one), (gradient, other), (features, again)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_blocks_cover_the_atoms_once() -> None:
    blocks = blocks_of(10, BLOCK_BYTES // 3, torch.device("cpu"))
    assert [range(10)[b] for b in blocks] == [range(3), range(3, 6), range(6, 9), range(9, 10)]
    assert blocks_of(10, 2**20, torch.device("cuda")) == [slice(0, 10)]
    assert len(blocks_of(3000, 2**20, torch.device("cuda"))) == 3


# layer by layer


def of_all_functions(output: Tensor, inputs: list[Tensor], weights: Tensor, axis: int) -> list[Tensor]:
    """Gradients of ``output`` for each of the K ``weights``, which have K on ``axis``; K on that axis of the results too."""
    found = [
        torch.autograd.grad((output * weights.select(axis, k)).sum(), inputs, retain_graph=True)
        for k in range(weights.shape[axis])
    ]
    return [torch.stack(parts, dim=axis) for parts in zip(*found, strict=True)]


def test_back_through_a_linear_map() -> None:
    layer, x, weights = Linear(5, 3).double(), normal(7, 5).requires_grad_(True), normal(7, 4, 3, seed=2)
    (expected,) = of_all_functions(layer(x), [x], weights, 1)
    torch.testing.assert_close(layer.back(weights), expected)


@pytest.mark.parametrize("sizes", [[4], [4, 3, 6]])
def test_back_through_a_tensor_map(sizes: list[int]) -> None:
    layer = TensorLinear(sizes, 5).double()
    parts = [normal(2 * l + 1, 7, n, seed=l).requires_grad_(True) for l, n in enumerate(sizes)]  # noqa: E741
    weights = normal(len(sizes) ** 2, 7, 4, 5, seed=9)
    expected = of_all_functions(layer(parts), parts, weights, 2)
    for found, slope in zip(layer.back(weights), expected, strict=True):
        torch.testing.assert_close(found, slope)


def test_back_through_a_norm() -> None:
    layer = SphereNorm(2).double()
    layer.rms.copy_(torch.tensor([0.3, 2.0, 5.0]))
    x, weights = normal(9, 7, 4).requires_grad_(True), normal(9, 7, 3, 4, seed=2)
    (expected,) = of_all_functions(layer(x), [x], weights, 2)
    torch.testing.assert_close(layer.back(by_degree(weights)), expected.transpose(0, 1))


def test_a_norm_measures_root_mean_squares_of_each_degree() -> None:
    layer = SphereNorm(1).double()
    x = normal(4, 50, 6) * torch.tensor([3.0, 0.5, 0.5, 0.5])[:, None, None]
    layer.measuring = True
    layer(x)
    layer.measuring = False
    torch.testing.assert_close(layer.rms, torch.stack([x[0].square().mean().sqrt(), x[1:].square().mean().sqrt()]))
    y = layer(x)
    assert float(y[0].square().mean()) == pytest.approx(1)
    assert float(y[1:].square().mean()) == pytest.approx(1)


@pytest.mark.parametrize("layer", [0, 1], ids=["tensors", "scalars"])
def test_back_through_an_update(layer: int) -> None:
    potential, vec, graph, _ = everything()
    update = potential.layers[layer].update
    one_hot = potential.one_hot(graph, vec.dtype)
    n, k, c, s = len(vec), 3, 6, 9
    fields = normal(s, n, 3 * c).requires_grad_(True)
    branch, products, tape = update(fields, one_hot)
    by_branch, by_products = normal(len(branch), n, k, c, seed=3), normal(n, k, 3 * c, seed=4)
    expected = torch.stack(
        [
            torch.autograd.grad(
                (branch * by_branch[:, :, f]).sum() + (products * by_products[:, f]).sum(), fields, retain_graph=True
            )[0]
            for f in range(k)
        ],
        dim=2,
    )
    torch.testing.assert_close(update.back(tape, by_branch, by_products, one_hot), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("few", [False, True], ids=["one block", "blocks of an atom"])
@pytest.mark.parametrize("shape", [{}, {"n_layers": 3, "l_max": 3, "l_message": 2}, {"n_layers": 1}], ids=str)
def test_back_through_each_layer_to_the_pair_vectors(shape, few: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    potential, vec, graph, _ = everything(**shape)
    if few:
        monkeypatch.setattr(blocks_module, "BLOCK_BYTES", 1)
    one_hot, k, c = potential.one_hot(graph, vec.dtype), 3, 6
    for number, layer in enumerate(potential.layers):
        leaf = vec.clone().requires_grad_(True)
        pairs, slopes = potential.pairs(leaf), potential.pairs.with_slopes(vec)
        s_in = (potential.shape.l_features + 1) ** 2
        x = normal(s_in, len(vec), c, seed=number + 5).requires_grad_(True)
        given = (pairs,) if number == 0 else (x, pairs)
        out, products, _ = layer(*given, one_hot, graph)
        tape = layer(*(v.detach() for v in given[:-1]), slopes.pairs, one_hot, graph)[2]
        by_features, by_products = normal(len(out), len(vec), k, c, seed=3), normal(len(vec), k, 3 * c, seed=4)
        gradient = normal(k, *vec.shape, seed=6)  # it is added to
        before = gradient.clone()
        with torch.no_grad():
            found = layer.back(tape, slopes, one_hot, graph, by_features, by_products, gradient)
        for f in range(k):
            total = (out * by_features[:, :, f]).sum() + (products * by_products[:, f]).sum()
            inputs = [leaf] if number == 0 else [leaf, x]
            by_vec, *by_x = torch.autograd.grad(total, inputs, retain_graph=True)
            torch.testing.assert_close(gradient[f] - before[f], by_vec, rtol=1e-10, atol=1e-10)
            assert float(by_vec.abs().max()) > 1e-2
            if by_x:
                torch.testing.assert_close(found[:, :, f], by_x[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["sphere", "painn"])
def test_features_times_weights_are_the_energy(kind: str) -> None:
    """``read_weights`` says how energies depend on the features: what is left over is the elements' bias alone."""
    potential = make_potential(rates=NONE, kind=kind)
    graph, vec = geometry(potential, batch_of([make() for make in STRUCTURES.values()], 4.0))
    with torch.no_grad():
        energy, features = potential.read(vec, graph)
        left = energy - features @ potential.read_weights()
    torch.testing.assert_close(left, potential.species_bias.detach()[graph.species, 0], rtol=0, atol=1e-12)
    assert float(energy.std()) > 1e-2
    assert features.shape == (len(vec), potential.n_features)
    for f in (0, features.shape[1] - 1):  # and each weight is that of its feature
        shift = torch.zeros_like(potential.correction.weight)
        shift[:, f] = potential.read_weights()[f]
        potential.set_functions(shift, None)
        share = potential.presence(lengths(vec), graph.species, graph.nbr, 4.0)
        moved = (potential.read(vec, graph)[0] + features[:, f] * shift[0, f]) * potential.energy_scale * share
        moved = moved + potential.repulsion(lengths(vec), graph.species, graph.nbr, 4.0)
        torch.testing.assert_close(potential(vec, graph).detach(), moved.detach(), rtol=0, atol=1e-11)


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


def test_geometry_and_its_way_back_to_the_vectors() -> None:
    pairs = PairFunctions(BesselBasis(4, 4.0), 3).double()
    batch = batch_of([STRUCTURES["silicon"]()], 4.0)
    vec = pair_vectors(batch, 8.0, batch.forces.dtype)
    leaf = vec.clone().requires_grad_(True)
    there, slopes = pairs(leaf), pairs.with_slopes(vec)
    torch.testing.assert_close(slopes.sphere, there.sphere.detach(), rtol=0, atol=1e-12)
    torch.testing.assert_close(slopes.radial, there.radial.detach(), rtol=0, atol=1e-12)
    by_sphere, by_radial = normal(*there.sphere.shape), normal(*there.radial.shape, seed=2)
    (expected,) = torch.autograd.grad((there.sphere * by_sphere).sum() + (there.radial * by_radial).sum(), leaf)
    by_distance = (slopes.slope * by_radial).sum(-1)
    found = slopes.to_vectors(by_sphere[:, :, None], by_distance[:, None])[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert isinstance(pairs, nn.Module)
