import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk
from ase.calculators.calculator import PropertyNotImplementedError
from ase.filters import FrechetCellFilter
from ase.md.velocitydistribution import thermalize_momenta
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS
from ase.phonons import Phonons
from pymatgen.io.ase import AseAtomsAdaptor

from forcedrop import DropoutCalculator
from forcedrop.derive import VOIGT, derive
from forcedrop.model import TrainedModel, committee
from forcedrop.testing import assert_conservative, assert_equivariant, assert_smooth
from forcedrop.uncertainty.calibration import Calibration, Growth
from forcedrop.uncertainty.sampling import predict
from tests.conftest import NONE, SAMPLED, banked_potential, batch_of, ethanol, make_potential, silicon

NAMES = ("energy", "energies", "forces", "stress")


def crystal() -> Atoms:
    atoms = bulk("Cu", a=3.65, cubic=True)
    atoms.rattle(0.1, seed=1)
    return atoms


def test_results_have_the_names_shapes_and_values_of_the_contract(trained) -> None:
    atoms = crystal()
    atoms.calc = DropoutCalculator(trained, n_samples=4, keep_samples=True)
    atoms.get_potential_energy()
    results = atoms.calc.results
    expected = predict(trained.potential, batch_of([atoms], 4.0), n_samples=4)
    shapes = {"energy": (), "energies": (4,), "forces": (4, 3), "stress": (6,)}
    count = {"energy": 16, "energies": 16, "forces": 4, "stress": 4}  # of energies the whole bank
    samples = {
        name: np.asarray(getattr(expected.samples, name)).reshape(count[name], *shape) for name, shape in shapes.items()
    }
    plain = derive(trained.potential, batch_of([atoms], 4.0))
    means = {name: np.asarray(getattr(plain, name)).reshape(shape) for name, shape in shapes.items()}
    sigma, scaled = (
        trained.calibration.sigma(samples, atoms.numbers),
        trained.calibration.apply(samples, atoms.numbers, means),
    )
    for name, shape in shapes.items():
        assert np.shape(results[name]) == shape
        mean, std = (np.asarray(getattr(part, name)).reshape(shape) for part in (expected.mean, expected.std))
        np.testing.assert_allclose(results[name], mean, atol=1e-10)
        np.testing.assert_allclose(results[f"{name}_std"], std, atol=1e-10)
        np.testing.assert_allclose(results[f"{name}_uncertainty"], sigma[name], atol=1e-10)
        ensemble = results[f"{name}_ensemble"]
        assert ensemble.shape == (count[name], *shape)
        np.testing.assert_allclose(mean, means[name], atol=1e-10)  # the plain network, whatever K is
        np.testing.assert_allclose(ensemble, scaled[name], atol=1e-10)
        np.testing.assert_allclose(ensemble.std(0, ddof=1), sigma[name], atol=1e-10)
    np.testing.assert_allclose(results["energy_ensemble"].mean(), results["energy"], atol=1e-10)
    for atom, matrix in enumerate(results["forces_covariance"]):
        np.testing.assert_allclose(matrix, np.cov(results["forces_ensemble"][:, atom].T), atol=1e-12)
    assert results["free_energy"] == results["energy"]
    assert results["energies"].sum() == pytest.approx(results["energy"])
    pressure = -np.asarray(expected.samples.stress)[:, 0, :3].mean(1)
    assert results["pressure_std"] == pytest.approx(pressure.std(ddof=1))
    np.testing.assert_allclose(atoms.get_forces(), results["forces"])
    np.testing.assert_allclose(atoms.get_stress(), results["stress"])
    assert atoms.calc.get_property("forces_uncertainty", atoms).shape == (4, 3)


def test_scaled_samples_stay_derivatives_of_one_another(trained) -> None:
    """One factor (γ = 0) scales samples about the mean, so every scaled sample is still conservative."""
    model = replace(trained, calibration=Calibration(Growth(2.5)))
    calculator = DropoutCalculator(model, n_samples=4, keep_samples=True)

    def evaluate(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        atoms.calc = calculator
        atoms.get_potential_energy()
        return calculator.results["energy_ensemble"][:4], calculator.results["forces_ensemble"]

    assert_conservative(evaluate, crystal(), tolerance=1e-7)
    assert_equivariant(evaluate, crystal(), tolerance=1e-9)


def test_forces_and_stress_of_a_trained_model_against_finite_differences(trained) -> None:
    """Independent of forcedrop's own differentiation: ASE's atoms, calculator energies only."""
    calculator, atoms, h = DropoutCalculator(trained, n_samples=4), crystal(), 3e-5
    atoms.calc = calculator
    forces, stress = atoms.get_forces(), atoms.get_stress()
    for i, axis in ((0, 0), (2, 1), (3, 2)):
        energies = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[i, axis] += sign * h
            moved.calc = calculator
            energies.append(moved.get_potential_energy())
        assert forces[i, axis] == pytest.approx(-(energies[0] - energies[1]) / (2 * h), abs=1e-6)
    for component, (a, b) in enumerate(zip(*VOIGT, strict=True)):
        energies = []
        for sign in (1, -1):
            strain = np.eye(3)
            strain[a, b] += 0.5 * sign * h
            strain[b, a] += 0.5 * sign * h
            strained = atoms.copy()
            strained.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            strained.calc = calculator
            energies.append(strained.get_potential_energy())
        slope = (energies[0] - energies[1]) / (2 * h) / atoms.get_volume()
        assert stress[component] == pytest.approx(slope, abs=1e-7)


def test_molecules_have_no_stress() -> None:
    atoms = ethanol()
    atoms.calc = DropoutCalculator(TrainedModel(make_potential()), n_samples=2)
    assert atoms.get_forces().shape == (9, 3)
    assert not {name for name in atoms.calc.results if "stress" in name or "pressure" in name}
    for name in ("stress", "stress_std", "pressure_std"):
        with pytest.raises(PropertyNotImplementedError, match="periodic structure"):
            atoms.calc.get_property(name, atoms)


def test_mistakes_are_named() -> None:
    model = TrainedModel(make_potential(elements=(1, 6, 8)))
    with pytest.raises(ValueError, match="at least 2 samples, got n_samples=1"):
        DropoutCalculator(model, n_samples=1)
    with pytest.raises(ValueError, match="`uncertainty_every` must be at least 1"):
        DropoutCalculator(model, uncertainty_every=0)
    with pytest.raises(ValueError, match="no such file"):
        DropoutCalculator("nowhere.pt")
    without = make_potential(rates=NONE)
    with pytest.raises(ValueError, match="no dropout site"):
        DropoutCalculator(TrainedModel(without))
    calculator = DropoutCalculator(model, n_samples=2)
    with pytest.raises(ValueError, match=r"atom 0 is Si; the model knows H, C, O"):
        calculator.get_potential_energy(silicon())
    broken = ethanol()
    broken.positions[3, 1] = np.nan
    with pytest.raises(ValueError, match="position of atom 3 is not finite"):
        calculator.get_potential_energy(broken)
    with pytest.raises(ValueError, match="no atoms"):
        calculator.get_potential_energy(Atoms())
    with pytest.raises(PropertyNotImplementedError, match="needs a calibrated model"):
        calculator.get_property("forces_uncertainty", ethanol())
    with pytest.raises(PropertyNotImplementedError, match="keep_samples=True"):
        calculator.get_property("forces_ensemble", ethanol())


def test_masks_that_were_not_trained_are_allowed_with_a_warning_and_functions_that_are_not_there_are_not(
    trained,
) -> None:
    masks = TrainedModel(make_potential(), None, {"method": "masks", "functions": 4, "seed": 0})
    for wrong in ({"n_samples": 5}, {"n_samples": 4, "seed": 7}):
        with pytest.warns(UserWarning, match=r"trained with the 4 masks of seed 0, asked for"):
            DropoutCalculator(masks, **wrong)
    with pytest.raises(ValueError, match="bank holds 16 functions, asked for 17"):
        DropoutCalculator(trained, 17)
    assert DropoutCalculator(trained, 4, seed=7).get_potential_energy(crystal()) == DropoutCalculator(
        trained, 4
    ).get_potential_energy(crystal())  # a bank does not look at the seed


def test_same_bits_whatever_was_computed_before(trained) -> None:
    one, two = (DropoutCalculator(trained, n_samples=4) for _ in range(2))
    generator = np.random.default_rng(0)
    atoms = crystal()
    for _ in range(8):  # a walk that makes one of the two rebuild its list several times
        atoms.positions += generator.normal(scale=0.1, size=(4, 3))
        one.calculate(atoms)
    two.calculate(atoms)
    for name in one.results:
        assert np.array_equal(one.results[name], two.results[name]), name


def test_copies_are_independent_and_equal(trained) -> None:
    atoms = crystal()
    calculator = DropoutCalculator(trained, n_samples=4, seed=3, uncertainty_every=2)
    first = calculator.get_potential_energy(atoms)
    for made in (calculator.copy(), copy.deepcopy(calculator), pickle.loads(pickle.dumps(calculator))):
        assert made.results == {}
        assert made.get_potential_energy(atoms) == first
        assert (made.n_samples, made.seed, made.uncertainty_every) == (4, 3, 2)


@pytest.mark.parametrize("kind", ["bank", "masks", "ensemble"])
def test_uncertainty_every(trained, kind: str) -> None:
    """Between, forces are of the same potential as at the steps with σ: the mean, or of trained masks the first of them."""
    if kind == "masks":
        potential, about = make_potential((29,)), {"method": "masks", "functions": 4, "seed": 5}
        trained = replace(trained, potential=potential, uncertainty=about)
    elif kind == "ensemble":
        members = [TrainedModel(banked_potential(elements=(29,), seed=k)) for k in range(4)]
        trained = replace(committee(members), calibration=trained.calibration)
    sparse = DropoutCalculator(trained, n_samples=4, uncertainty_every=3)
    generator, atoms = np.random.default_rng(0), crystal()
    atoms.calc = sparse
    whole = DropoutCalculator(replace(trained, calibration=None), n_samples=4, keep_samples=True)
    with_sigma = []
    for _ in range(7):
        atoms.positions += generator.normal(scale=0.02, size=(4, 3))
        forces, stress = atoms.get_forces(), atoms.get_stress()
        with_sigma.append("forces_std" in sparse.results)
        whole.calculate(atoms)
        expected = [whole.results[name] for name in ("forces", "stress")]
        if kind == "masks":
            expected = [whole.results[f"{name}_ensemble"][0] for name in ("forces", "stress")]
        np.testing.assert_allclose(forces, expected[0], atol=1e-10)
        np.testing.assert_allclose(stress, expected[1], atol=1e-10)
    assert with_sigma == [True, False, False, True, False, False, True]
    atoms.positions[0] += 0.01
    atoms.get_forces()
    assert "forces_std" not in sparse.results
    on_demand = sparse.get_property("forces_uncertainty", atoms)
    np.testing.assert_allclose(
        on_demand,
        DropoutCalculator(trained, n_samples=4).get_property("forces_uncertainty", atoms),
        atol=1e-12,
    )

    def evaluate(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
        calc = sparse.copy()
        return np.array([calc.get_potential_energy(atoms)]), calc.get_forces(atoms)[None]

    assert_conservative(evaluate, crystal(), tolerance=1e-7)


@pytest.mark.parametrize("kind", list(SAMPLED))
def test_smooth_through_a_rebuilt_list_and_the_cutoff(kind: str) -> None:
    calculator = DropoutCalculator(TrainedModel(SAMPLED[kind]()), n_samples=3, keep_samples=True, skin=0.3)

    def along(x: float) -> np.ndarray:
        atoms = Atoms("COH", positions=[[0, 0, 0], [1.2, 0, 0], [x, 0.3, 0]])
        calculator.get_potential_energy(atoms)
        return np.concatenate([calculator.results["energy_ensemble"], calculator.results["forces_ensemble"].ravel()])

    assert_smooth(along, 3.5, 4.4, points=120)


def test_optimisers_relax_atoms_and_cell(trained) -> None:
    atoms = crystal()
    atoms.calc = DropoutCalculator(trained, n_samples=4)
    before = atoms.get_potential_energy()
    BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.02, steps=100)
    assert np.abs(atoms.get_forces()).max() < 0.02
    assert np.abs(atoms.get_stress()).max() * units.GPa**-1 < 0.5
    assert atoms.get_potential_energy() < before


def test_dynamics_conserve_energy(trained) -> None:
    atoms = bulk("Cu", a=3.62, cubic=True)
    atoms.calc = DropoutCalculator(trained, n_samples=4)
    thermalize_momenta(atoms, temperature_K=300, rng=np.random.default_rng(0))
    energies = []
    dynamics = VelocityVerlet(atoms, 2 * units.fs)
    for _ in range(100):
        dynamics.run(1)
        energies.append(atoms.get_total_energy())
    kinetic = 1.5 * units.kB * 300 * 4
    assert np.ptp(energies) < 0.01 * kinetic


def test_phonons(trained, tmp_path) -> None:
    """The acoustic sum rule holds at Γ because the potential is translation invariant."""
    atoms = bulk("Cu", a=3.6)
    phonons = Phonons(
        atoms,
        DropoutCalculator(trained, n_samples=4),
        supercell=(3, 3, 3),
        delta=0.02,
        name=str(tmp_path / "ph"),
    )
    phonons.run()
    phonons.read(acoustic=True)
    frequencies = phonons.band_structure([[0, 0, 0], [0.5, 0, 0.5]])
    assert np.abs(frequencies[0]).max() < 2e-3
    assert frequencies[1].max() > 5e-3


def test_pymatgen_adaptor(trained) -> None:
    structure = AseAtomsAdaptor.get_structure(crystal())
    structure.calc = DropoutCalculator(trained, n_samples=4)
    atoms = AseAtomsAdaptor.get_atoms(structure)
    atoms.calc = DropoutCalculator(trained, n_samples=4)
    direct = crystal()
    direct.calc = DropoutCalculator(trained, n_samples=4)
    assert atoms.get_potential_energy() == pytest.approx(direct.get_potential_energy(), abs=1e-9)


def test_memory_and_precision(trained) -> None:
    whole = DropoutCalculator(trained, n_samples=4)
    parts = DropoutCalculator(trained, n_samples=4, max_memory=1e-9)
    single = DropoutCalculator(trained, n_samples=4, dtype=torch.float32)
    a, b, c = (calc.get_property("forces_std", crystal()) for calc in (whole, parts, single))
    np.testing.assert_allclose(a, b, atol=1e-12)
    np.testing.assert_allclose(a, c, atol=1e-4)
    assert whole.potential.dtype == torch.float64


@pytest.mark.parametrize("kind", list(SAMPLED))
def test_a_supercell_has_eight_times_the_energy_sigma(kind: str) -> None:
    """Edge cuts among the masks."""
    model = TrainedModel(SAMPLED[kind]())
    one, eight = silicon(), silicon().repeat(2)
    calculator = DropoutCalculator(model, n_samples=4)
    small, large = (calculator.get_property("energy_std", atoms) for atoms in (one, eight))
    assert large == pytest.approx(8 * small, rel=1e-9)
    assert small > 1e-3
