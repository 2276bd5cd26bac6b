import numpy as np
import pytest
from ase import Atoms

from forcedrop.structures import Frame, isolated_energies, write_frames


def frame(formula: str, energy: float | None) -> Frame:
    atoms = Atoms(formula)
    atoms.positions[:, 0] = np.arange(len(atoms))
    return Frame.from_atoms(atoms, energy=energy)


MOLECULES = [frame("H2O", -10.0), frame("CO2", -20.0), frame("H2", -3.0)]
ATOMS = [frame("H", -1.0), frame("C", -5.0), frame("O", -7.0)]


def test_given() -> None:
    assert isolated_energies(MOLECULES, {"H": -1, "C": -5, "O": -7, "N": 0})[0] == {1: -1.0, 6: -5.0, 8: -7.0}
    with pytest.raises(ValueError, match="lack C, O"):
        isolated_energies(MOLECULES, {"H": -1})
    with pytest.raises(ValueError, match="'Xy' is no chemical symbol"):
        isolated_energies(MOLECULES, {"Xy": -1})


def test_from_a_file_and_from_frames(tmp_path) -> None:
    write_frames(tmp_path / "atoms.xyz", ATOMS)
    expected = {1: -1.0, 6: -5.0, 8: -7.0}
    assert isolated_energies(MOLECULES, tmp_path / "atoms.xyz")[0] == expected
    energies, origin = isolated_energies(MOLECULES + ATOMS)
    assert energies == expected
    assert "single-atom" in origin


def test_fit() -> None:
    """Three compositions, three elements: the fit is exact. H2: -3; H2O: -10 → O = -7; CO2: -20 → C = -6."""
    energies, origin = isolated_energies(MOLECULES)
    assert energies == {1: pytest.approx(-1.5), 6: pytest.approx(-6.0), 8: pytest.approx(-7.0)}
    assert "fitted" in origin
    one = isolated_energies([frame("H2O", -10.0)])[0]
    assert 2 * one[1] + one[8] == pytest.approx(-10)
    assert isolated_energies([frame("H2O", None)])[0] == {1: 0.0, 8: 0.0}
