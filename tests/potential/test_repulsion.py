import numpy as np
import pytest
import torch
from ase import Atoms
from ase.data import covalent_radii
from ase.units import Bohr, Hartree

from forcedrop.derive import derive
from forcedrop.potential.repulsion import ALPHA, CHARGE, TightBindingRepulsion
from forcedrop.uncertainty.sampling import predict
from tests.conftest import batch_of, make_potential

KINDS = [{"zbl": True, "repulsion": False}, {"zbl": False, "repulsion": True}]
NOTHING = {"zbl": False, "repulsion": False}


def zbl(z1: int, z2: int, r: float) -> float:
    """Ziegler, Biersack & Littmark 1985, with the switch at the covalent radii."""
    a = 0.8854 * Bohr / (z1**0.23 + z2**0.23)
    x = r / a
    phi = 0.18175 * np.exp(-3.1998 * x) + 0.50986 * np.exp(-0.94229 * x)
    phi += 0.28022 * np.exp(-0.4029 * x) + 0.02817 * np.exp(-0.20162 * x)
    s = r / (covalent_radii[z1] + covalent_radii[z2])
    return Hartree * Bohr * z1 * z2 / r * phi * (1 - 28 * s**6 + 48 * s**7 - 21 * s**8) * (s < 1)


def gfn2(pair: str, r: float) -> float:
    """Bannwarth, Ehlert & Grimme 2019, eq. 8, with the numbers of these pairs; below half the cutoff nothing is faded out."""
    (z1, a1), (z2, a2) = (
        {"H": (1.105388, 2.213717), "C": (4.231078, 1.247655), "O": (5.784415, 2.165712)}[s] for s in pair
    )
    x = r / Bohr
    return Hartree * z1 * z2 / x * np.exp(-np.sqrt(a1 * a2) * x ** (1.0 if pair == "HH" else 1.5))


def difference(settings: dict[str, bool], atoms: Atoms) -> float:
    with_, without = (make_potential(**flags) for flags in (settings, NOTHING))
    batch = batch_of([atoms], 4.0)
    return float(derive(with_, batch).energy[0] - derive(without, batch).energy[0])


@pytest.mark.parametrize("r", [0.35, 0.6, 0.9, 1.3])
def test_zbl_of_a_dimer(r: float) -> None:
    atoms = Atoms("CO", positions=[[0, 0, 0], [r, 0, 0]])
    assert difference(KINDS[0], atoms) == pytest.approx(zbl(6, 8, r), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("pair", ["HH", "CO", "CH"])
@pytest.mark.parametrize("r", [0.2, 0.8, 1.4, 1.9])
def test_repulsion_of_a_dimer(pair: str, r: float) -> None:
    atoms = Atoms(pair, positions=[[0, 0, 0], [r, 0, 0]])
    assert difference(KINDS[1], atoms) == pytest.approx(gfn2(pair, r), rel=1e-6, abs=1e-9)


def test_gone_at_the_cutoff() -> None:
    wall = TightBindingRepulsion(range(1, 87)).double()
    own, other = torch.meshgrid(torch.arange(86), torch.arange(86), indexing="ij")
    r = torch.linspace(0.2, 6.0, 400, dtype=torch.float64)[:, None, None]
    energy = wall.pair(r, own[None], other[None], 5.0)
    assert bool((energy[r[:, 0, 0] >= 5.0] == 0).all())
    assert bool((energy.diff(dim=0) <= 0).all())  # of every pair of elements, at every distance, it pushes
    assert float(energy[0].min()) > 20  # eV at 0.2 Å, of helium and hydrogen too
    assert len(CHARGE) == len(ALPHA) == 86


@pytest.mark.parametrize("settings", KINDS)
def test_shared_by_all_samples(settings: dict[str, bool]) -> None:
    atoms = Atoms("CO", positions=[[0, 0, 0], [0.5, 0, 0]])
    batch = batch_of([atoms], 4.0)
    with_, without = (predict(make_potential(**flags), batch, n_samples=4) for flags in (settings, NOTHING))
    energies = (with_.samples.energy - without.samples.energy)[:, 0]
    assert float(energies.std()) < 1e-9
    assert float(energies.mean()) > 10
    torch.testing.assert_close(with_.std.forces, without.std.forces, rtol=0, atol=1e-8)


def test_one_repulsion_at_a_time_and_only_known_elements() -> None:
    with pytest.raises(ValueError, match="set `repulsion: false`"):
        make_potential(zbl=True)
    with pytest.raises(ValueError, match=r"no repulsion of U: set `model.repulsion: false`"):
        make_potential(elements=(8, 92))
    assert make_potential(elements=(8, 92), repulsion=False).repulsion is None
