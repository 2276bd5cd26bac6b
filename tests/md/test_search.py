import json
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.optimize import BFGS

from forcedrop import DropoutCalculator, read_frames, run_md
from forcedrop.md import Bias, BiasedCalculator, adversarial
from forcedrop.md.search import EnergyVariance, force_variance
from forcedrop.model import TrainedModel
from tests.conftest import SAMPLED, ethanol, silicon

DATA = Path(__file__).resolve().parents[2] / "data"
BIAS = Bias(strength=0.8, width=0.3)


@pytest.fixture(scope="module", params=list(SAMPLED))
def random_model(request: pytest.FixtureRequest) -> TrainedModel:
    return TrainedModel(SAMPLED[request.param]())


def crystal() -> Atoms:
    atoms = bulk("Cu", a=3.62, cubic=True)
    atoms.rattle(0.05, seed=1)
    return atoms


def spread(calculator: DropoutCalculator, atoms: Atoms) -> float:
    """u² of the K functions whose forces are known: of a bank the calculator's own σ of energies is of all of them."""
    calculator.calculate(atoms)
    return float(calculator.prediction.samples.energy[: calculator.n_samples, 0].double().var(correction=1)) / len(
        atoms
    )


@pytest.mark.parametrize("make", [ethanol, silicon])
def test_variance_and_its_gradient_against_finite_differences(random_model, make) -> None:
    atoms, calculator, h = make(), DropoutCalculator(random_model, n_samples=4), 1e-4
    atoms.calc = calculator
    atoms.get_potential_energy()
    found = EnergyVariance.of(calculator.prediction)
    assert found.value == pytest.approx(spread(calculator, atoms), rel=1e-9)
    for atom, axis in ((0, 0), (1, 2), (len(atoms) - 1, 1)):
        ends = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * h
            ends.append(spread(calculator, moved))
        slope = (ends[0] - ends[1]) / (2 * h)
        assert found.gradient[atom, axis] == pytest.approx(slope, rel=1e-6, abs=1e-9)
    assert np.abs(found.gradient).max() > 1e-4


@pytest.mark.parametrize("make", [ethanol, silicon])
def test_variance_of_forces_and_its_gradient_against_finite_differences(random_model, make) -> None:
    atoms, calculator, h = make(), DropoutCalculator(random_model, n_samples=3), 1e-4
    value, gradient = force_variance(calculator, atoms)
    assert value == pytest.approx(np.mean(calculator.get_property("forces_std", atoms) ** 2), rel=1e-9)
    for atom, axis in ((0, 0), (len(atoms) - 1, 1)):
        ends = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.positions[atom, axis] += sign * h
            ends.append(force_variance(calculator, moved)[0])
        assert gradient[atom, axis] == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-9)
    np.testing.assert_allclose(gradient.sum(axis=0), 0, atol=1e-9 * np.abs(gradient).max())


@pytest.mark.parametrize("make", [ethanol, silicon])
def test_biased_forces_and_stress_derive_from_the_biased_energy(random_model, make) -> None:
    atoms, h = make(), 1e-4
    free = DropoutCalculator(random_model, n_samples=4)
    bias = Bias(0.8, np.sqrt(spread(free, atoms)))  # where it is steepest
    atoms.calc = BiasedCalculator(random_model, bias, 4)
    forces, energy = atoms.get_forces(), atoms.get_potential_energy()
    assert atoms.calc.results["bias_energy"] == pytest.approx(0.8 * (np.exp(-1) - 1), rel=1e-9)
    assert energy == pytest.approx(free.get_property("energy", atoms) + atoms.calc.results["bias_energy"], abs=1e-9)
    assert np.abs(atoms.calc.results["bias_forces"]).max() > 0.01
    for name in ("forces_std", "energy_std"):  # the error bars are not biased
        np.testing.assert_allclose(atoms.calc.results[name], free.get_property(name, atoms), rtol=1e-9)
    for atom, axis in ((0, 0), (1, 1)):
        ends = []
        for sign in (1, -1):
            moved = atoms.copy()
            moved.calc = atoms.calc
            moved.positions[atom, axis] += sign * h
            ends.append(moved.get_potential_energy())
        assert forces[atom, axis] == pytest.approx(-(ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-6)
    if not atoms.pbc.any():
        return
    stress = atoms.get_stress(voigt=False)
    for a, b in ((0, 0), (0, 1)):
        ends = []
        for sign in (1, -1):
            strained = atoms.copy()
            strained.calc = atoms.calc
            strain = np.eye(3)
            strain[a, b] += sign * h / 2
            strain[b, a] += sign * h / 2
            strained.set_cell(strained.cell.array @ strain, scale_atoms=True)
            ends.append(strained.get_potential_energy())
        assert stress[a, b] == pytest.approx((ends[0] - ends[1]) / (2 * h) / atoms.get_volume(), rel=1e-5, abs=1e-7)


def test_the_cap_bounds_the_bias_force_and_keeps_its_direction(random_model) -> None:
    atoms = ethanol()
    forces = []
    for cap in (np.inf, 1e-3):
        calculator = BiasedCalculator(random_model, replace(BIAS, cap=cap), 4)
        calculator.get_property("forces", atoms)
        forces.append(calculator.results["bias_forces"])
    assert np.linalg.norm(forces[1], axis=1).max() == pytest.approx(1e-3)
    np.testing.assert_allclose(forces[1] / np.linalg.norm(forces[1]), forces[0] / np.linalg.norm(forces[0]), atol=1e-12)


def test_copies_keep_the_bias(random_model) -> None:
    atoms, calculator = ethanol(), BiasedCalculator(random_model, BIAS, 4)
    expected = calculator.get_property("energy", atoms)
    for other in (calculator.copy(), pickle.loads(pickle.dumps(calculator))):
        assert other.get_property("energy", atoms) == expected
    with pytest.raises(ValueError, match="σ at every step"):
        BiasedCalculator(random_model, BIAS, 4, uncertainty_every=5)
    with pytest.raises(ValueError, match="width > 0"):
        Bias(1.0, 0.0)


def test_a_bias_pulls_a_molecule_to_where_samples_disagree() -> None:
    atoms = ethanol()
    free = DropoutCalculator(DATA / "ethanol.pt", 8)
    atoms.calc = free
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=60)
    before = spread(free, atoms)
    atoms.calc = BiasedCalculator(free.model, Bias(3.0, 10 * np.sqrt(before)), 8)
    BFGS(atoms, logfile=None).run(fmax=0.05, steps=60)
    assert spread(free, atoms) > 1.2 * before


def test_biased_dynamics_conserve_the_biased_energy(trained, tmp_path) -> None:
    u = np.sqrt(spread(DropoutCalculator(trained, 4), crystal()))
    calculator = BiasedCalculator(trained, Bias(2.0, 3 * u), 4)
    run = run_md(crystal(), calculator, tmp_path, timestep=0.5, steps=60, record_every=2)
    changed = np.ptp([row["potential_eV"] for row in run.rows])
    total = np.array([row["total_eV"] for row in run.rows])
    assert np.ptp(total) < 0.02 * changed
    frame = read_frames(tmp_path / "md.h5", predictions="keep")[-1]
    assert frame.info["potential_eV"] == pytest.approx(frame.energy)
    summary = json.loads((tmp_path / "md.json").read_text())
    assert summary["settings"]["bias"] == {"strength": 2.0, "width": 3 * u, "cap": None}


def test_adversary_stays_within_its_bounds(trained) -> None:
    calculator = DropoutCalculator(trained, 3)
    atoms = crystal()
    start = atoms.get_positions()
    found = adversarial(atoms, calculator, max_displacement=0.3, max_energy=0.2, steps=20)
    np.testing.assert_array_equal(atoms.positions, start)
    assert found.displacement == pytest.approx(np.linalg.norm(found.frame.pos - start, axis=1).max())
    assert found.displacement <= 0.3
    assert found.after["max_force"] > 1.4 * found.before["max_force"]
    end = found.frame.to_atoms()
    rise = float(calculator.get_property("energy", end)) - float(calculator.get_property("energy", atoms))
    assert found.energy == pytest.approx(rise)
    assert 0.15 < rise <= 0.2
    assert found.frame.energy is None
    assert found.frame.info["sigma_max_force"] == found.after["max_force"]
    near = adversarial(atoms, calculator, max_displacement=0.05, max_energy=0.2, steps=20)
    assert near.displacement == pytest.approx(0.05)
    assert found.before["max_force"] < near.after["max_force"] < found.after["max_force"]
    cold, hot = (
        adversarial(atoms, calculator, max_displacement=0.1, temperature=temperature, steps=20)
        for temperature in (300.0, 10000.0)
    )
    assert cold.energy < hot.energy
    assert cold.after["max_force"] < hot.after["max_force"]


def test_an_adversary_needs_bounds(trained) -> None:
    calculator = DropoutCalculator(trained, 2)
    with pytest.raises(ValueError, match="give a temperature or max_energy"):
        adversarial(crystal(), calculator, max_displacement=0.1)
    with pytest.raises(ValueError, match=r"must be positive, got \{'max_displacement': 0.0\}"):
        adversarial(crystal(), calculator, max_displacement=0.0, temperature=300.0)
