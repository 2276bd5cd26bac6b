"""The same numbers on a GPU as on the CPU: one function, K samples, training, calibration, dynamics, the dropout library."""

import copy

import numpy as np
import pytest
import torch
from ase import units
from ase.build import bulk
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from torch import nn

from forcedrop import DropoutCalculator
from forcedrop.derive import derive
from forcedrop.dropout import Dropout, mc_samples
from forcedrop.model import load_model
from forcedrop.potential import DropoutRates, EnergyModel
from forcedrop.structures import write_frames
from forcedrop.training import TrainingDiverged, parse_config, train
from forcedrop.training.data import prepare_data
from forcedrop.training.loop import CHECK_EVERY, Trainer
from forcedrop.training.run import build_trainer
from forcedrop.uncertainty.equations import jacobian
from forcedrop.uncertainty.exact_dropout import ExactDropout
from forcedrop.uncertainty.method import Labels
from forcedrop.uncertainty.sampling import predict
from tests.conftest import (
    NONE,
    RATES,
    SAMPLED,
    STRUCTURES,
    batch_of,
    emt_frames,
    ethanol,
    graph_of,
    make_potential,
    settings,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here: what runs on one is NOT tested")
GPU = torch.device("cuda")


def everything(potential: EnergyModel):
    return batch_of([make() for make in STRUCTURES.values()], potential.cutoff)


@pytest.mark.parametrize("kind", list(SAMPLED))
def test_a_function_and_its_samples_are_those_of_the_cpu(kind) -> None:
    here = SAMPLED[kind]()
    there, batch = SAMPLED[kind]().to(GPU), everything(here)
    for a, b in zip(derive(here, batch), derive(there, batch.to(GPU)), strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=1e-10, atol=1e-10)
    # a limit on memory cuts the samples into pieces
    for memory in (4.0, 1e-5):
        expected = predict(here, batch, n_samples=5, seed=3)
        found = predict(there, batch.to(GPU), n_samples=5, seed=3, max_memory=memory)
        for part in ("mean", "std", "samples"):
            for a, b in zip(getattr(expected, part), getattr(found, part), strict=True):
                torch.testing.assert_close(b.cpu(), a, rtol=1e-9, atol=1e-9)
    assert float(expected.std.forces.max()) > 1e-3


def test_single_precision_stays_near_double() -> None:
    exact = make_potential(rates=DropoutRates())
    batch = everything(exact)
    forces = derive(exact, batch).forces
    single = make_potential(rates=DropoutRates()).float().to(GPU)
    found = derive(single, batch_of([make() for make in STRUCTURES.values()], 4.0, torch.float32).to(GPU)).forces
    assert float((found.cpu() - forces).abs().max()) < 1e-5 * float(forces.abs().max())


def test_derivatives_by_the_readouts_weights() -> None:
    potential = make_potential(rates=DropoutRates())
    batch = batch_of([ethanol(), ethanol(1)], 4.0)
    expected = jacobian(potential, batch)
    for a, b in zip(expected, jacobian(potential.to(GPU), batch.to(GPU)), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)


@pytest.fixture
def folder(tmp_path):
    write_frames(tmp_path / "train.h5", emt_frames(40))
    return tmp_path


def trainer(folder, device: str, **changes: object) -> Trainer:
    config = parse_config(settings(folder, device=device, **changes))
    return build_trainer(config, prepare_data(config))


def test_a_step_changes_the_weights_as_on_the_cpu(folder) -> None:
    made = {device: trainer(folder, device) for device in ("cpu", "cuda")}
    for one in made.values():
        for _, batch in zip(range(5), one.batches(), strict=False):
            one.run_step(batch)
        one.check()
    before = trainer(folder, "cpu").potential.state_dict()
    after = made["cuda"].potential.state_dict()
    for name, weight in made["cpu"].potential.state_dict().items():
        torch.testing.assert_close(after[name].cpu(), weight, rtol=1e-6, atol=1e-8)
    assert any(not torch.equal(after[name].cpu(), weight) for name, weight in before.items())


def test_a_training_ends_in_a_model_that_the_cpu_reads_to_the_same_numbers(folder) -> None:
    for method, rates in (
        ("masks", {"update": 0.1, "readout": 0.3}),
        ("exact_dropout", {}),
        ("posterior", {"edge": 0.3}),
        ("heads", {}),
    ):
        values = settings(folder, device="cuda", dropout=rates, epochs=30, precision="float32")
        values["uncertainty"] = {"method": method, "functions": 8}
        values["output"] = f"{folder}/{method}"
        made = train(parse_config(values))
        assert made.calibration is not None
        read = load_model(f"{values['output']}/model.pt", torch.device("cpu"))
        results = []
        for model, device in ((made, "cuda"), (read, "cpu")):
            atoms = bulk("Cu", a=3.65, cubic=True)
            atoms.rattle(0.1, seed=1)
            atoms.calc = DropoutCalculator(model, n_samples=4, device=device)
            atoms.get_forces()
            results.append(atoms.calc.results)
        for name in ("energy", "forces", "stress", "forces_uncertainty", "energy_uncertainty"):
            np.testing.assert_allclose(results[0][name], results[1][name], rtol=2e-3, atol=2e-5)
        rows = made.provenance["last_epoch"]
        assert rows["val_forces_meV_A"] < 300


def test_a_training_that_was_stopped_goes_on(folder) -> None:
    first = trainer(folder, "cuda")
    steps = list(first.batches())
    for batch in steps[:4]:
        first.run_step(batch)
    second = trainer(folder, "cuda")
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    rest = list(second.batches())
    assert len(rest) == len(steps) - 4
    for one, batches in ((first, steps[4:]), (second, rest)):
        for batch in batches:
            one.run_step(batch)
    for name, weight in first.potential.state_dict().items():  # sums on a GPU have no fixed order
        torch.testing.assert_close(second.potential.state_dict()[name], weight, rtol=1e-6, atol=1e-8)


def test_a_training_that_diverges_names_its_frames_and_keeps_the_weights(folder) -> None:
    made = trainer(folder, "cuda")
    assert made.check_every == CHECK_EVERY
    batch = next(iter(made.batches()))
    before = {name: weight.clone() for name, weight in made.potential.named_parameters()}
    batch.forces[0, 0] = torch.nan
    made.run_step(batch)
    with pytest.raises(TrainingDiverged, match=r"batch of .*train\.h5#\d+"):
        made.check()
    moved = [name for name, weight in made.potential.named_parameters() if not torch.isfinite(weight).all()]
    assert not moved
    assert before.keys() == dict(made.potential.named_parameters()).keys()


def test_dynamics_conserve_energy(trained_folder) -> None:
    atoms = bulk("Cu", a=3.65, cubic=True)
    atoms.calc = DropoutCalculator(load_model(trained_folder / "run" / "model.pt"), n_samples=4)
    assert atoms.calc.device.type == "cuda"  # by itself
    thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
    dynamics = VelocityVerlet(atoms, 1.0 * units.fs)
    totals, kinetic = [], []
    dynamics.attach(lambda: totals.append(atoms.get_total_energy()))
    dynamics.attach(lambda: kinetic.append(atoms.get_kinetic_energy()))
    dynamics.run(200)
    assert np.ptp(totals) < 0.03 * np.ptp(kinetic)
    assert atoms.calc.results["forces_uncertainty"].max() > 0


def test_masks_of_a_network_of_ones_own() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), Dropout(0.3), nn.Linear(64, 2)).double().eval()
    x = torch.randn(7, 5, dtype=torch.float64)
    here = mc_samples(net, x, n=6, seed=1).detach()
    there = mc_samples(net.to(GPU), x.to(GPU), n=6, seed=1).detach()
    torch.testing.assert_close(there.cpu(), here, rtol=1e-12, atol=1e-12)
    assert float(here.std(0).max()) > 0.01


def test_every_site_within_the_network() -> None:
    """Edges too: their radii are functions of the seed, not of where they are computed."""
    here = make_potential(rates=RATES)
    batch = everything(here)
    expected = predict(here, batch, n_samples=3, seed=0).samples.forces
    found = predict(make_potential(rates=RATES).to(GPU), batch.to(GPU), n_samples=3, seed=0).samples.forces
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["sphere", "painn"])
def test_functions_that_are_found_there_are_those_found_here(kind: str) -> None:
    """The same masks and draws, of equations summed on either, and cut radii besides."""
    other, graphs = make_potential((1, 6, 8), NONE, seed=4), []
    for seed in range(8):
        found = derive(other, batch_of([ethanol(seed)], 4.0))
        graphs.append(graph_of(ethanol(seed), 4.0, energy=float(found.energy), forces=found.forces.numpy()))
    labels = Labels(graphs[:5], graphs[5:], quiet=True)
    method = ExactDropout(functions=6, rate=0.3, prior=1.0, draw=1.0, cuts=2, cut_rate=0.5)
    here, there = make_potential((1, 6, 8), NONE, kind=kind), make_potential((1, 6, 8), NONE, kind=kind).to(GPU)
    method.fill(here, labels)
    method.fill(there, labels)
    assert there.correction.bank.device.type == there.edges.bank.device.type == "cuda"
    torch.testing.assert_close(there.edges.bank.cpu(), here.edges.bank, rtol=1e-12, atol=0)
    scale = float(here.correction.bank.abs().max())
    torch.testing.assert_close(there.correction.bank.cpu(), here.correction.bank, rtol=1e-5, atol=1e-6 * scale)


def test_a_deep_ensemble_is_that_of_the_cpu(trained_folder) -> None:
    path = trained_folder / "run" / "model.pt"
    atoms = bulk("Cu", a=3.65, cubic=True)
    atoms.rattle(0.1, seed=1)
    found = [DropoutCalculator([path, path], device=device).get_property("forces", atoms) for device in ("cpu", "cuda")]
    np.testing.assert_allclose(found[0], found[1], atol=1e-9)
