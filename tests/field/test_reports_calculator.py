"""What calculators of other packages did in public reports, tried with this one; see README.md of this folder."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator
from ase.filters import FrechetCellFilter
from ase.mep import NEB
from ase.optimize import BFGS
from ase.units import Bohr, Hartree
from ase.vibrations import Vibrations

from forcedrop import DropoutCalculator
from forcedrop.model import TrainedModel
from tests.conftest import banked_potential, copper, ethanol, silicon

VOIGT = [(0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)]


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return TrainedModel(banked_potential())


def calculator(model: TrainedModel, **settings: object) -> DropoutCalculator:
    return DropoutCalculator(model, 4, device="cpu", **settings)


def energy(model: TrainedModel, atoms: Atoms) -> float:
    """By a calculator that has seen nothing else."""
    fresh = atoms.copy()
    fresh.calc = calculator(model)
    return fresh.get_potential_energy()


def test_stress_has_six_numbers_wherever_it_is_asked_for(model: TrainedModel) -> None:
    """materialyzeai/matgl#171: a stress of shape (3, 3) in ``results`` breaks sums of calculators."""
    atoms = silicon()
    own, pair = calculator(model), LennardJones(sigma=2.0, epsilon=0.01, rc=4.0)
    atoms.calc = SumCalculator([own, pair])
    total = atoms.get_stress()
    assert own.get_property("stress", atoms).shape == total.shape == (6,)
    np.testing.assert_allclose(
        total, own.get_property("stress", atoms) + pair.get_property("stress", atoms), atol=1e-12
    )


def test_shear_stress_is_in_its_place(model: TrainedModel) -> None:
    """deepmodeling/deepmd-kit#5689: components off the diagonal were taken from a tensor that was not symmetrised."""
    atoms = silicon(seed=3)
    atoms.calc = calculator(model)
    stress = atoms.get_stress()
    assert np.ptp(stress[3:]) > 0.1 * np.abs(stress).max()  # three different ones
    for place, (i, j) in enumerate(VOIGT):
        found = []
        for h in (1e-5, -1e-5):
            strain = np.eye(3)
            strain[i, j] += h / 2
            strain[j, i] += h / 2
            bent = atoms.copy()
            bent.set_cell(atoms.cell.array @ strain, scale_atoms=True)
            found.append(energy(model, bent))
        assert stress[place] == pytest.approx((found[0] - found[1]) / 2e-5 / atoms.get_volume(), rel=1e-5, abs=1e-8)


def test_cells_relax_in_the_filter_of_ase(model: TrainedModel) -> None:
    """deepmodeling/deepmd-kit#4901: with newer ASE the filters of cells ended in PropertyNotImplementedError."""
    atoms = bulk("Cu", a=3.9, cubic=True)
    atoms.calc = calculator(model)
    before, pressed = atoms.get_potential_energy(), np.abs(atoms.get_stress()).max()
    assert BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.01, steps=60)
    assert atoms.get_potential_energy() < before
    assert np.abs(atoms.get_stress()).max() < 0.05 * pressed


def test_free_energy_is_there(model: TrainedModel) -> None:
    """mir-group/nequip#95: optimisers ask for the energy that fits the forces, which calculators had not."""
    atoms = ethanol()
    atoms.calc = calculator(model)
    assert atoms.get_potential_energy(force_consistent=True) == atoms.get_potential_energy()


@pytest.mark.parametrize("change", ["position", "cell", "pbc", "number"])
def test_changes_in_place_are_seen(model: TrainedModel, change: str) -> None:
    """isayevlab/AIMNet2#30: the energy of the first structure came back after atoms had moved."""
    atoms = silicon()
    atoms.calc = calculator(model)
    first = atoms.get_potential_energy()
    if change == "position":
        atoms.positions[0, 1] += 0.1
    elif change == "cell":
        atoms.cell[0] *= 1.05
    elif change == "pbc":
        atoms.pbc[2] = False
    else:
        atoms.numbers[1] = 6
    assert atoms.get_potential_energy() != first
    assert atoms.get_potential_energy() == energy(model, atoms)


def test_one_calculator_for_several_structures(model: TrainedModel) -> None:
    """mir-group/flare#262: forces of the structure before came back."""
    shared = calculator(model)
    images = [ethanol(), molecule("CH4"), silicon(), copper()]
    for atoms in [*images, *images[::-1]]:
        fresh = atoms.copy()
        fresh.calc = calculator(model)
        atoms.calc = shared
        np.testing.assert_array_equal(atoms.get_forces(), fresh.get_forces())


def test_results_are_not_changed_through_what_was_given_out(model: TrainedModel) -> None:
    """ACEsuit/mace#1656, in part: an array that shared its memory with the results was scaled in place."""
    atoms = ethanol()
    atoms.calc = calculator(model, keep_samples=True)
    right = atoms.get_forces()
    for name in ("forces", "energies", "forces_std", "forces_ensemble"):
        atoms.calc.get_property(name, atoms)[...] = 7.0
    np.testing.assert_array_equal(atoms.get_forces(), right)


def test_variances_are_those_of_the_samples() -> None:
    """ACEsuit/mace#1656, i-pi/i-pi#225, apax-hub/apax#561: wrong powers of units, M for M − 1, a variance called σ."""
    atoms = ethanol(seed=5)
    atoms.set_cell([6.0, 7.0, 8.0])
    atoms.pbc = True
    atoms.calc = DropoutCalculator("data/ethanol.pt", 8, device="cpu", keep_samples=True)
    atoms.get_potential_energy()
    results = atoms.calc.results
    raw = atoms.calc.prediction.samples
    for name in ("forces", "stress"):
        samples = getattr(raw, name).numpy().reshape(8, *results[name].shape)
        variance = ((samples - samples.mean(0)) ** 2).sum(0) / 7
        np.testing.assert_allclose(results[f"{name}_std"] ** 2, variance, rtol=1e-6)
    for name in ("energy", "energies", "forces", "stress"):
        samples = results[f"{name}_ensemble"]
        variance = ((samples - samples.mean(0)) ** 2).sum(0) / (len(samples) - 1)
        np.testing.assert_allclose(np.square(results[f"{name}_uncertainty"]), variance, rtol=1e-6)


def test_precision_of_the_calculator_is_its_own() -> None:
    """ACEsuit/mace#665: a model trained in one precision and called in the other ended in "expected scalar type Double"."""
    single = TrainedModel(banked_potential().float())
    atoms = ethanol()
    values = {}
    for dtype in (torch.float32, torch.float64):
        atoms.calc = calculator(single, dtype=dtype)
        values[dtype] = atoms.get_forces()
        assert atoms.calc.potential.dtype == dtype
    assert single.dtype == torch.float32
    difference = np.abs(values[torch.float32] - values[torch.float64]).max()
    assert 0 < difference < 1e-3 * np.abs(values[torch.float64]).max()


def test_nothing_global_is_left_changed(model: TrainedModel) -> None:
    """ACEsuit/mace#1659: an unknown element left the whole process in double precision."""
    default, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    atoms = Atoms("Au", positions=[[0, 0, 0]])
    atoms.calc = calculator(model)
    with pytest.raises(ValueError, match="atom 0 is Au"):
        atoms.get_potential_energy()
    energy(model, ethanol())
    assert (torch.get_default_dtype(), torch.get_num_threads()) == (default, threads)
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), torch_state)
    np.testing.assert_array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


def test_a_slab_without_a_third_vector(model: TrainedModel) -> None:
    """NVIDIA/nvalchemi-toolkit#32: a vector that is missing became one of 1 Å."""
    bare = fcc111("Cu", (2, 2, 2), a=3.6)
    bare.rattle(0.05, seed=0)
    assert not bare.cell[2].any()
    assert not bare.pbc[2]
    roomy = bare.copy()
    roomy.cell[2] = [0, 0, 60]
    roomy.center(axis=2)
    assert energy(model, bare) == pytest.approx(energy(model, roomy), abs=1e-9)
    periodic = bare.copy()
    periodic.pbc = True
    with pytest.raises(ValueError, match="cell"):
        energy(model, periodic)


def test_atoms_on_the_edge_of_the_cell(model: TrainedModel) -> None:
    """Atomistica/atomistica#30: a coordinate of −4e-52 instead of 0 changed the energy by 5 eV."""
    atoms = bulk("Si", a=4.6, cubic=True)
    nudged = atoms.copy()
    nudged.positions[atoms.positions == 0] = -4.4e-52
    moved = atoms.copy()
    moved.positions[atoms.positions == 0] = np.nextafter(4.6, 0)
    assert energy(model, nudged) == pytest.approx(energy(model, atoms), abs=1e-9)
    assert energy(model, moved) == pytest.approx(energy(model, atoms), abs=1e-8)


def test_rounding_in_a_tilted_cell_finds_the_same_pairs(model: TrainedModel) -> None:
    """lammps/lammps#2759: in primitive cells with tilts of one half, rounding at 1e-15 lost pairs."""
    one = bulk("Cu", a=3.6)
    many = one.repeat(3)
    rotated = many.copy()
    rotated.set_cell(many.cell.standard_form()[0], scale_atoms=True)
    noise = np.random.default_rng(0)
    shaken = rotated.copy()
    shaken.cell.array[:] *= 1 + noise.uniform(-4e-16, 4e-16, (3, 3))
    shaken.positions *= 1 + noise.uniform(-4e-16, 4e-16, shaken.positions.shape)
    expected = 27 * energy(model, one)
    for atoms in (many, rotated, shaken):
        assert energy(model, atoms) == pytest.approx(expected, abs=1e-8)
        atoms.calc = calculator(model)
        assert np.abs(atoms.get_forces()).max() < 1e-8


def test_a_cell_that_is_not_periodic_does_nothing(model: TrainedModel) -> None:
    """libAtoms/QUIP#195: without periodic directions atoms outside the cell were still wrapped into it."""
    bare = ethanol()
    boxed = bare.copy()
    boxed.cell = [1.5, 1.5, 1.5]
    boxed.positions += [7.0, -3.0, 11.0]
    assert not boxed.pbc.any()
    assert energy(model, boxed) == pytest.approx(energy(model, bare), abs=1e-9)


def test_a_cell_that_is_not_periodic_costs_nothing(model: TrainedModel) -> None:
    """mir-group/nequip#122: clusters with cells that are not periodic took a hundred times as long."""
    bare = bulk("Cu", a=3.6, cubic=True).repeat((3, 3, 2))
    bare.pbc = False
    boxed = bare.copy()
    bare.cell = None
    boxed.cell = [[0.5, 0, 0], [0.4, 0.1, 0], [0, 0, 0.2]]
    seconds = []
    for atoms in (bare, boxed):
        atoms.calc = calculator(model)
        atoms.get_potential_energy()
        atoms.rattle(1e-3)
        before = time.perf_counter()
        atoms.get_potential_energy()
        seconds.append(time.perf_counter() - before)
    assert energy(model, boxed) == pytest.approx(energy(model, bare), abs=1e-8)
    assert seconds[1] < 5 * seconds[0] + 0.2


def test_atoms_without_places(model: TrainedModel) -> None:
    """microsoft/mattersim#82: O2 with both atoms at the origin, as ``Atoms("O2")`` has it, gave NaN or nonsense."""
    with pytest.raises(ValueError, match=r"atoms 0 and 1 .*0\.000 Å apart"):
        energy(model, Atoms("O2"))
    image = Atoms("O2", positions=[[0, 0, 0], [4, 0, 0]], cell=[4, 5, 6], pbc=True)
    with pytest.raises(ValueError, match=r"0\.000 Å apart"):
        energy(model, image)
    image.pbc = False
    assert np.isfinite(energy(model, image))


def test_a_left_handed_cell_is_the_same_crystal(model: TrainedModel) -> None:
    """materialyzeai/matgl#198: a negative determinant turned the sign of the stress."""
    atoms = silicon()
    mirrored = atoms.copy()
    mirrored.set_cell(atoms.cell.array[[1, 0, 2]])
    assert np.linalg.det(mirrored.cell.array) < 0
    assert energy(model, mirrored) == pytest.approx(energy(model, atoms), abs=1e-9)
    for one in (atoms, mirrored):
        one.calc = calculator(model)
        one.get_potential_energy()
    for name in ("forces", "stress", "stress_std", "pressure_std"):
        np.testing.assert_allclose(mirrored.calc.results[name], atoms.calc.results[name], atol=1e-9)


def test_atoms_of_no_element(model: TrainedModel) -> None:
    """lab-cosmo/librascal#288: an atom ``X`` gave numbers without meaning."""
    with pytest.raises(ValueError, match=r"atom 1 is .*the model knows"):
        energy(model, Atoms("CX", positions=[[0, 0, 0], [0, 0, 1.2]]))


def test_images_of_a_band_may_share_a_calculator(model: TrainedModel) -> None:
    """SUNCAT-Center/CatLearn#98: images of a band were computed with what was attached to another."""
    start, end = ethanol(), ethanol(seed=1)
    images = [start, *(start.copy() for _ in range(3)), end]
    shared = calculator(model)
    for image in images:
        image.calc = shared
    band = NEB(images, method="improvedtangent", allow_shared_calculator=True)
    band.interpolate()
    band.get_forces()
    alone = [energy(model, image) for image in images]
    np.testing.assert_allclose(band.energies[1:-1], alone[1:-1], atol=1e-10)


def test_vibrations_do_not_see_the_skin(model: TrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CederGroupHub/chgnet#101: finite differences showed gradients that were not those of the energy."""
    monkeypatch.chdir(tmp_path)
    atoms = silicon(seed=2)
    hessians = []
    for skin in (0.0, 1.0):
        atoms.calc = calculator(model, skin=skin)
        vibrations = Vibrations(atoms, name=f"skin{skin}", delta=0.01, nfree=2)
        vibrations.run()
        hessians.append(vibrations.get_vibrations().get_hessian_2d())
    np.testing.assert_allclose(*hessians, atol=1e-7)
    of_move = hessians[0].reshape(6, 2, 3).sum(1)  # a crystal that moves as a whole feels nothing
    assert np.abs(of_move).max() < 1e-3 * np.abs(hessians[0]).max()


def test_repulsion_counts_protons_from_one() -> None:
    """orbital-materials/orb-models#169: a pair repulsion took atomic numbers that were one too large."""
    potential = banked_potential(elements=(1, 6))
    with torch.no_grad():
        for weight in potential.parameters():
            weight.zero_()
    # GFN2-xTB (Bannwarth, Ehlert & Grimme, J. Chem. Theory Comput. 15, 1652, 2019): effective charge and exponent
    charge, exponent = {1: 1.105388, 6: 4.231078}, {1: 2.213717, 6: 1.247655}
    r = 0.6
    atoms = Atoms("HC", positions=[[0, 0, 0], [r, 0, 0]])
    x = r / Bohr
    expected = Hartree * charge[1] * charge[6] / x * np.exp(-np.sqrt(exponent[1] * exponent[6]) * x**1.5)
    bare = TrainedModel(potential)
    found = energy(bare, atoms) - energy(bare, Atoms("H")) - energy(bare, Atoms("C"))
    assert found == pytest.approx(expected, rel=1e-3)
