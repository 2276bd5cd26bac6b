import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import covalent_radii
from ase.units import Bohr, Hartree

from forcedrop.derive import derive
from forcedrop.uncertainty.sampling import predict
from tests.conftest import batch_of, make_potential


def zbl(z1: int, z2: int, r: float) -> float:
    """Ziegler, Biersack & Littmark 1985, with the switch at the covalent radii."""
    a = 0.8854 * Bohr / (z1**0.23 + z2**0.23)
    x = r / a
    phi = 0.18175 * np.exp(-3.1998 * x) + 0.50986 * np.exp(-0.94229 * x)
    phi += 0.28022 * np.exp(-0.4029 * x) + 0.02817 * np.exp(-0.20162 * x)
    s = r / (covalent_radii[z1] + covalent_radii[z2])
    return Hartree * Bohr * z1 * z2 / r * phi * (1 - 28 * s**6 + 48 * s**7 - 21 * s**8) * (s < 1)


@pytest.mark.parametrize("r", [0.35, 0.6, 0.9, 1.3])
def test_dimer(r: float) -> None:
    atoms = Atoms("CO", positions=[[0, 0, 0], [r, 0, 0]])
    with_, without = (make_potential(zbl=flag) for flag in (True, False))
    batch = batch_of([atoms], 4.0)
    difference = derive(with_, batch).energy - derive(without, batch).energy
    assert float(difference[0]) == pytest.approx(zbl(6, 8, r), rel=1e-6, abs=1e-9)


def test_shared_by_all_samples() -> None:
    atoms = Atoms("CO", positions=[[0, 0, 0], [0.5, 0, 0]])
    batch = batch_of([atoms], 4.0)
    with_, without = (predict(make_potential(zbl=flag), batch, n_samples=4) for flag in (True, False))
    difference = (with_.samples.energy - without.samples.energy)[:, 0]
    assert float(difference.std()) < 1e-9
    torch.testing.assert_close(with_.std.forces, without.std.forces, rtol=0, atol=1e-8)
