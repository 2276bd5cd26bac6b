"""The network of scalars and vectors: its symmetries, its dropout sites, and the way from frames to error bars."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from forcedrop.derive import derive, derive_functions, geometry
from forcedrop.dropout import frozen, mc_samples
from forcedrop.model import load_model
from forcedrop.potential import DropoutRates, EnergyModel, build
from forcedrop.potential.painn import PaiNN, PaiNNShape
from forcedrop.structures import write_frames
from forcedrop.testing import assert_conservative, assert_equivariant, assert_smooth
from forcedrop.training import parse_config, train
from forcedrop.training.muon import is_matrix
from forcedrop.uncertainty.sampling import predict
from tests.conftest import RATES, STRUCTURES, batch_of, emt_frames, ethanol, settings, silicon

K = 3
SMALL = {"cutoff": 4.0, "n_channels": 8, "n_layers": 3, "n_radial": 4}
SITES = {
    "edges": DropoutRates(edge=0.5),
    "message": DropoutRates(message=0.4),
    "update": DropoutRates(update=0.4),
    "readout": DropoutRates(readout=0.5),
    "all": RATES,
}


def make(rates: DropoutRates = RATES, **changes: object) -> PaiNN:
    """A network in float64 with biases of any value, measured on ethanol."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        potential = build("painn", {**SMALL, **changes}, (1, 6, 8, 14, 29), {1: -1.0, 6: -6.0}).double().eval()
        with torch.no_grad():
            for weight in potential.parameters():
                if weight.requires_grad and not weight.any():
                    weight.normal_()
    assert isinstance(potential, PaiNN)
    potential.set_rates(rates)
    graph, vec = geometry(potential, batch_of([ethanol()], potential.cutoff))
    potential.measure(vec, graph)
    potential.measure_centres(vec, graph)
    return potential


def samples(potential: PaiNN, atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Energies (K,) and forces (K, N, 3), plain ones (K = 1) without rates."""
    batch = batch_of([atoms], potential.cutoff)
    if potential.n_functions == 0:
        plain = derive(potential, batch)
        return plain.energy.detach().numpy(), plain.forces.detach().numpy()[None]
    _, found = derive_functions(potential, batch, range(K))
    return found.energy.detach().numpy()[:, 0], found.forces.detach().numpy()


@pytest.mark.parametrize("rates", [DropoutRates(), *SITES.values()], ids=["plain", *SITES])
def test_every_function_has_the_symmetries_and_conserves_energy(rates: DropoutRates) -> None:
    potential = make(rates)

    def evaluate(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        return samples(potential, atoms)

    for structure in (ethanol, silicon):
        assert_equivariant(evaluate, structure(), tolerance=1e-9)
    assert_conservative(evaluate, ethanol(), tolerance=1e-6, directions=2)


@pytest.mark.parametrize("rates", SITES.values(), ids=list(SITES))
def test_every_function_is_extensive_and_every_site_counts(rates: DropoutRates) -> None:
    potential = make(rates)
    one = ethanol(1)  # centres were measured on another: there readout masks keep the energy
    far = one.copy()
    far.translate([50, 0, 0])
    single, double = samples(potential, one), samples(potential, one + far)
    np.testing.assert_allclose(double[0], 2 * single[0], atol=1e-10)
    np.testing.assert_allclose(double[1][:, : len(one)], single[1], atol=1e-10)
    cell, eight = samples(potential, silicon()), samples(potential, silicon().repeat(2))
    np.testing.assert_allclose(eight[0], 8 * cell[0], atol=1e-9)
    assert single[0].std() > 1e-4
    assert single[1].std(0).max() > 1e-4


def test_a_batch_is_its_structures() -> None:
    potential, images = make(), [structure() for structure in STRUCTURES.values()]
    together = predict(potential, batch_of(images, 4.0), n_samples=K)
    alone = [predict(potential, batch_of([atoms], 4.0), n_samples=K).samples for atoms in images]
    torch.testing.assert_close(together.samples.energy, torch.cat([a.energy for a in alone], 1), rtol=0, atol=1e-10)
    torch.testing.assert_close(together.samples.forces, torch.cat([a.forces for a in alone], 1), rtol=0, atol=1e-10)


def test_samples_are_frozen_functions() -> None:
    potential = make()
    graph, vec = geometry(potential, batch_of([ethanol(), silicon()], potential.cutoff))
    with torch.no_grad():
        together = mc_samples(potential, (vec, graph), K, seed=4, vectorised=True)
        for k in range(K):
            with frozen(potential, 4, k):
                torch.testing.assert_close(potential(vec, graph), together[k], rtol=0, atol=1e-12)
    assert float(together.std(0).max()) > 1e-3


@pytest.mark.parametrize("n_layers", [1, 2])
def test_energies_are_read_linearly_with_read_weights(n_layers: int) -> None:
    potential = make(DropoutRates(), n_layers=n_layers)
    potential.offset(torch.arange(5.0, dtype=torch.float64))
    graph, vec = geometry(potential, batch_of([ethanol(), silicon()], potential.cutoff))
    energy, features = potential.read(vec, graph)
    assert features.shape == (len(energy), (n_layers + 1) * 8)
    assert potential.n_features == features.shape[1]
    read = features @ potential.read_weights() + graph.species
    torch.testing.assert_close(energy, read, rtol=0, atol=1e-12)


def test_functions_of_a_bank_are_centred() -> None:
    potential, batch = make(DropoutRates()), batch_of([ethanol(), silicon()], 4.0)
    bank = 0.1 * torch.randn(6, 5, potential.n_features, generator=torch.Generator().manual_seed(0)).double()
    potential.set_functions(0.1 * bank[0], bank - bank.mean(0))
    plain, found = derive_functions(potential, batch, range(6))
    assert plain is not None
    for k in (0, 5):
        with frozen(potential, 0, k):
            own = derive(potential, batch)
        torch.testing.assert_close(found.energy[k], own.energy, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.forces[k], own.forces, rtol=0, atol=1e-10)
    torch.testing.assert_close(found.forces.mean(0), plain.forces, rtol=0, atol=1e-10)
    graph, vec = geometry(potential, batch)
    one_by_one = potential.centred_gradients(vec, graph, bank)
    shared = EnergyModel.centred_gradients(potential, vec, graph, bank)  # as on a GPU
    torch.testing.assert_close(one_by_one, shared, rtol=0, atol=1e-10)
    assert float(found.forces.detach().std(0).max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_atoms_without_neighbours(dtype: torch.dtype) -> None:
    potential = make().to(dtype).train()
    batch = batch_of([Atoms("O"), Atoms("OO", positions=[[0, 0, 0], [9, 0, 0]])], potential.cutoff, dtype)
    graph, vec = geometry(potential, batch)
    vec.requires_grad_(True)
    with frozen(potential, 0, 0):
        energies = potential(vec, graph)
    (gradient,) = torch.autograd.grad(energies.sum(), vec, create_graph=True)
    assert energies.dtype == dtype
    assert not bool(gradient.any())
    weights = [w for w in potential.parameters() if w.requires_grad]
    second = torch.autograd.grad(gradient.square().sum() + energies.sum(), weights, allow_unused=True)
    assert all(bool(g.isfinite().all()) for g in second if g is not None)
    torch.testing.assert_close(energies, energies[:1].expand(3))
    potential.measure(vec.detach(), graph)
    assert bool(potential(vec, graph).isfinite().all())


def test_gradients_by_the_weights_are_those_of_finite_differences() -> None:
    """The second derivative, which training takes: of the squared forces, along one direction of all weights."""
    potential = make(DropoutRates(), n_channels=4, n_layers=2)
    graph, vec = geometry(potential, batch_of([ethanol()], potential.cutoff))
    weights = [w for w in potential.parameters() if w.requires_grad]
    generator = torch.Generator().manual_seed(0)
    direction = [torch.randn(w.shape, dtype=w.dtype, generator=generator) for w in weights]

    def squared(step: float) -> torch.Tensor:
        moved = {n: w + step * d for (n, w), d in zip(named, direction, strict=True)}
        leaf = vec.clone().requires_grad_(True)
        energy = torch.func.functional_call(potential, moved, (leaf, graph)).sum()
        return torch.autograd.grad(energy, leaf, create_graph=True)[0].square().sum()

    named = [(n, w) for n, w in potential.named_parameters() if w.requires_grad]
    found = torch.autograd.grad(squared(0.0), weights, allow_unused=True)
    slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True) if g is not None)
    assert slope == pytest.approx(float((squared(1e-5) - squared(-1e-5)).detach()) / 2e-5, rel=1e-6)


def test_smooth_where_atoms_leave_and_where_vectors_vanish() -> None:
    potential = make()

    def leaving(x: float) -> np.ndarray:
        atoms = Atoms("COH", positions=[[0, 0, 0], [1.2, 0, 0], [x, 0.3, 0]])
        return np.concatenate([part.ravel() for part in samples(potential, atoms)])

    def through_the_middle(x: float) -> np.ndarray:
        atoms = Atoms("HCH", positions=[[-1.5, 0, 0], [x, 0, 0], [1.5, 0, 0]])
        return np.concatenate([part.ravel() for part in samples(potential, atoms)])

    assert_smooth(leaving, 3.8, 4.2, points=40)
    assert_smooth(through_the_middle, -0.1, 0.1, points=40)


def test_masks_act_about_the_typical_atom() -> None:
    """Scalars in a perfect crystal are the typical ones, and there are no vectors: no mask changes anything."""
    potential, crystal = make(DropoutRates(message=0.2, update=0.3, readout=0.5)), bulk("Si").repeat(2)
    batch = batch_of([crystal], potential.cutoff)
    graph, vec = geometry(potential, batch)
    assert float(predict(potential, batch, n_samples=K).std.energy) > 1e-3
    potential.measure_centres(vec, graph)
    about = predict(potential, batch, n_samples=K)
    assert float(about.std.energy) < 1e-9
    torch.testing.assert_close(about.mean.energy, derive(potential, batch).energy, rtol=0, atol=1e-9)


def test_measured_activations_have_unit_size() -> None:
    potential = make(DropoutRates())
    graph, vec = geometry(potential, batch_of([ethanol()], potential.cutoff))
    found: list[torch.Tensor] = []
    for layer in potential.layers:
        layer.message_norm.register_forward_hook(lambda _m, _a, out: found.append(out.square().mean((1, 2))))
    potential(vec, graph)
    for square in found:
        torch.testing.assert_close(square[0], torch.ones_like(square[0]))
        torch.testing.assert_close(square[1:].mean(), torch.ones_like(square[0]))


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="`cutoff` must be positive"):
        PaiNNShape(cutoff=0.0)
    with pytest.raises(ValueError, match="`n_layers` must be at least 1, got 0"):
        PaiNNShape(n_layers=0)
    with pytest.raises(ValueError, match="'painn' with one layer has no dropout sites of kind message"):
        make(DropoutRates(message=0.1), n_layers=1)


def test_embeddings_are_no_maps_between_channels() -> None:
    potential = make(DropoutRates())
    assert potential.element_vectors().shape == (5, 8)
    matrices = {name for name, weight in potential.named_parameters() if is_matrix(name, weight)}
    assert "layers.0.left.weight" in matrices
    assert not any("species" in name for name in matrices)


def test_zbl_is_added() -> None:
    close = batch_of([Atoms("CC", positions=[[0, 0, 0], [0.3, 0, 0]])], 4.0)
    difference = (
        derive(make(DropoutRates(), zbl=True, repulsion=False), close).energy
        - derive(make(DropoutRates(), repulsion=False), close).energy
    )
    assert float(difference) > 50


def test_training_lowers_the_error_and_fills_a_bank(tmp_path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(40))
    values = settings(tmp_path, epochs=4)
    values["model"] = {"kind": "painn", "cutoff": 4.0, "n_channels": 8, "n_layers": 2, "n_radial": 4}
    values["uncertainty"] = {"method": "exact_dropout", "functions": 16, "frames": 20}
    model = train(parse_config(values))
    log = np.genfromtxt(tmp_path / "run" / "log.csv", delimiter=",", names=True)
    assert log["val_forces_meV_A"][-1] < 0.8 * log["val_forces_meV_A"][0]
    potential = load_model(tmp_path / "run" / "model.pt").potential
    assert potential.kind == "painn"
    assert potential.n_functions == 16
    batch = batch_of([emt_frames(1, seed=9)[0].to_atoms()], 4.0)
    one, two = (predict(p, batch, n_samples=16) for p in (model.potential, potential))
    torch.testing.assert_close(one.samples.forces, two.samples.forces, rtol=0, atol=0)
    assert float(one.std.forces.max()) > 1e-4
