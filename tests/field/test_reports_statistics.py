"""What other packages computed of errors and error bars in public reports, tried with ours; see README.md of this folder."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule

from forcedrop import DropoutCalculator
from forcedrop.evaluation import evaluate, predict_frames
from forcedrop.model import TrainedModel, load_model, save_model
from forcedrop.structures import Frame
from forcedrop.uncertainty.calibration import COVERAGES, conformal_quantiles
from tests.conftest import banked_potential, copper, emt_frames, ethanol, silicon, slab

ETHANOL = Path(__file__).resolve().parents[2] / "data" / "ethanol.pt"


@pytest.fixture(scope="module")
def model() -> TrainedModel:
    return TrainedModel(banked_potential())


def labelled(atoms: Atoms, seed: int = 0) -> Frame:
    """A frame with labels that are numbers only."""
    rng = np.random.default_rng(seed)
    stress = rng.normal(scale=0.1, size=6) if atoms.pbc.any() else None
    return Frame.from_atoms(
        atoms, energy=float(rng.normal(scale=20)), forces=rng.normal(size=(len(atoms), 3)), stress=stress, source=f"m#{seed}"
    )  # fmt: skip


LOPSIDED = [ethanol(), silicon(), slab(), ethanol(seed=1), silicon(seed=1)]
"""Without symmetry, which would make forces of 0 known for certain."""
MIXED = [ethanol(), molecule("CH4"), silicon(), copper(), slab(), ethanol(seed=1), molecule("H2O")]


@pytest.mark.parametrize("n", [9, 19, 30, 74, 100])
def test_a_conformal_quantile_is_the_right_order_statistic(n: int) -> None:
    """scikit-learn-contrib/MAPIE#973: ``method="higher"`` took the next larger score."""
    rng = np.random.default_rng(n)
    error, sigma = rng.normal(size=n), rng.uniform(0.5, 2, size=n)
    scores = np.sort(np.abs(error) / sigma)
    found = conformal_quantiles(error, sigma, n)
    for coverage in COVERAGES:
        k = -(-(n + 1) * round(100 * coverage) // 100)  # exact
        assert (coverage in found) == (k <= n)
        if k <= n:
            assert found[coverage] == pytest.approx(scores[k - 1])


def test_a_coverage_that_so_few_frames_cannot_promise() -> None:
    """scikit-learn-contrib/MAPIE#974: a level above 1 was cut to 1, and the largest score passed for a bound."""
    rng = np.random.default_rng(0)
    found = conformal_quantiles(rng.normal(size=300), np.ones(300), n_frames=8)
    assert max(found) == 0.8
    calibration = load_model(ETHANOL).calibration
    calibration.quantiles["energy"] = {0.5: 1.0}
    with pytest.raises(ValueError, match=r"no conformal quantile of 'energy' for a coverage of 0\.99"):
        calibration.quantile("energy", 0.99)


def test_errors_of_forces_are_those_of_components(model: TrainedModel) -> None:
    """ACEsuit/mace#370 and libAtoms/workflow#271: is an RMSE one of components or of vectors? They differ by √3."""
    frames = [labelled(atoms, k) for k, atoms in enumerate(LOPSIDED)]
    found, predictions = evaluate(model, frames, n_samples=4), predict_frames(model, frames, n_samples=4)
    errors = np.concatenate([p.mean["forces"] - f.forces for p, f in zip(predictions, frames, strict=True)])
    report = found.reports()["forces"]
    assert report.rmse == pytest.approx(np.sqrt(np.mean(errors**2)))
    norms, sigma, _ = found.atoms()
    np.testing.assert_allclose(norms, np.linalg.norm(errors, axis=1))
    assert np.sqrt(np.mean(norms**2)) == pytest.approx(np.sqrt(3) * report.rmse)
    assert np.sqrt(np.mean(sigma**2)) == pytest.approx(np.sqrt(3 * np.mean(found.sigma["forces"] ** 2)))


def test_errors_of_energies_of_structures_of_different_sizes(model: TrainedModel) -> None:
    """deepmodeling/deepmd-kit#2860 and materialyzeai/matgl#256: an RMSE that was an MAE, or divided by √N."""
    frames = [labelled(atoms, k) for k, atoms in enumerate(LOPSIDED)]
    found, predictions = evaluate(model, frames, n_samples=4), predict_frames(model, frames, n_samples=4)
    errors = np.array([float(p.mean["energy"]) - f.energy for p, f in zip(predictions, frames, strict=True)])
    sizes = np.array([len(f) for f in frames])
    report = found.reports()["energy"]
    assert report.rmse == pytest.approx(np.sqrt(np.mean((errors / sizes) ** 2)))
    assert report.mae == pytest.approx(np.mean(np.abs(errors / sizes)))
    assert report.rmse > 1.05 * report.mae
    assert found.total_energy_rmse == pytest.approx(np.sqrt(np.mean(errors**2)))


def test_a_structure_is_the_same_alone_and_in_a_batch(model: TrainedModel) -> None:
    """facebookresearch/fairchem#1273 and atomistic-machine-learning/schnetpack#24: batches and padding changed numbers."""
    frames = [Frame.from_atoms(atoms) for atoms in MIXED]
    together = predict_frames(model, frames, n_samples=4)
    backwards = predict_frames(model, frames[::-1], n_samples=4)[::-1]
    for atoms, one, other in zip(MIXED, together, backwards, strict=True):
        alone = atoms.copy()
        alone.calc = DropoutCalculator(model, 4, device="cpu")
        for p in (one, other):
            assert float(p.mean["energy"]) == pytest.approx(alone.get_potential_energy(), abs=1e-9)
            np.testing.assert_allclose(p.mean["forces"], alone.get_forces(), atol=1e-9)
            np.testing.assert_allclose(p.error_bars["forces"], alone.calc.results["forces_std"], atol=1e-9)
            np.testing.assert_allclose(float(p.error_bars["energy"]), alone.calc.results["energy_std"], atol=1e-9)


@pytest.mark.parametrize("repeat", [(2, 1, 1), (2, 2, 2), (1, 3, 1)])
def test_supercells_have_as_much_more_of_everything(repeat: tuple[int, int, int]) -> None:
    """facebookresearch/fairchem#1478 and #1215: energies for a formula unit changed with the cell."""
    atoms = ethanol(seed=4)
    atoms.set_cell([5.5, 6.0, 6.5])
    atoms.pbc = True
    many, n = atoms.repeat(repeat), int(np.prod(repeat))
    for one in (atoms, many):
        one.calc = DropoutCalculator(ETHANOL, 8, device="cpu", dtype=None)
        one.get_potential_energy()
    a, b = atoms.calc.results, many.calc.results
    assert b["energy"] == pytest.approx(n * a["energy"], rel=1e-7)
    assert b["energy_uncertainty"] == pytest.approx(n * a["energy_uncertainty"], rel=1e-3)  # copies err together
    np.testing.assert_allclose(b["forces"], np.tile(a["forces"], (n, 1)), atol=2e-4)
    np.testing.assert_allclose(b["forces_uncertainty"], np.tile(a["forces_uncertainty"], (n, 1)), atol=1e-4)
    np.testing.assert_allclose(b["stress"], a["stress"], atol=1e-6)


def test_folding_atoms_back_does_not_spoil_the_neighbour_list(model: TrainedModel) -> None:
    """NVIDIA/nvalchemi-toolkit#151: atoms that were wrapped between steps were missed by a list with a skin, and NVE drifted."""
    atoms = bulk("Cu", a=3.6, cubic=True).repeat((2, 1, 1))
    atoms.rattle(0.1, seed=0)
    atoms.calc = DropoutCalculator(model, 4, device="cpu", skin=1.0)
    rng = np.random.default_rng(0)
    for step in range(12):
        atoms.positions += rng.normal(scale=0.06, size=atoms.positions.shape)
        if step % 3 == 1:
            atoms.wrap()
        if step % 4 == 2:
            atoms.positions += atoms.cell[step % 3]
        fresh = atoms.copy()
        fresh.calc = DropoutCalculator(model, 4, device="cpu")
        np.testing.assert_allclose(atoms.get_forces(), fresh.get_forces(), atol=1e-8)
        assert atoms.get_potential_energy() == pytest.approx(fresh.get_potential_energy(), abs=1e-9)


def test_a_cutoff_that_is_not_the_default_is_kept(tmp_path: Path) -> None:
    """materialyzeai/matgl#612: predictions used a cutoff of 4 Å whatever the model was trained with."""
    kept = TrainedModel(banked_potential(cutoff=3.3))
    save_model(kept, tmp_path / "model.pt")
    again = load_model(tmp_path / "model.pt")
    assert again.cutoff == 3.3
    frames = [Frame.from_atoms(atoms) for atoms in MIXED]
    for one, other in zip(
        predict_frames(kept, frames, n_samples=4), predict_frames(again, frames, n_samples=4), strict=True
    ):
        np.testing.assert_array_equal(one.mean["forces"], other.mean["forces"])
    atoms = Atoms("Cu2", positions=[[0, 0, 0], [0, 0, 3.31]])
    atoms.calc = DropoutCalculator(again, 4, device="cpu")
    assert not atoms.get_forces().any()


def test_frames_without_a_label_are_not_zeros(model: TrainedModel) -> None:
    """molmod/psiflow#93, in part: labels that are not there must not count as 0 in any error."""
    frames = [
        Frame(f.z, f.pos, f.cell, f.pbc, f.energy, f.forces if k % 2 else None, f.stress if k < 2 else None)
        for k, f in enumerate(emt_frames(6))
    ]
    found = evaluate(model, frames, n_samples=4)
    assert found.error["forces"].size == 3 * 12
    assert found.error["stress"].size == 2 * 6
    assert found.error["energy"].size == 6
