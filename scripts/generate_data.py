"""Make the sets in ``data/``: ethanol with GFN2-xTB (tblite), copper with ASE's EMT. See ``data/README.md``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import ase.calculators.emt
import numpy as np
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import Calculator
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.md.velocitydistribution import thermalize_momenta
from ase.optimize import BFGS
from tqdm import tqdm

from forcedrop.structures import Frame, FrameStore

DATA = Path(__file__).resolve().parent.parent / "data"
ETHANOL = {300: 500, 600: 200, 1200: 200}
COPPER = {"crystal": 120, "vacancy": 60, "hot": 60}


def main() -> None:
    """Make one set or both."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["ethanol", "copper"], help="make this set only")
    parser.add_argument("--output", type=Path, default=DATA, help="folder for the HDF5 files")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--fraction", type=float, default=1.0, help="share of the frames to make (for a quick look)")
    arguments = parser.parse_args()
    if not 0 < arguments.fraction <= 1:
        parser.error(f"--fraction must lie in (0, 1], got {arguments.fraction}")
    if arguments.only != "copper":
        make_ethanol(arguments.output, arguments.seed, arguments.fraction)
    if arguments.only != "ethanol":
        make_copper(arguments.output, arguments.seed, arguments.fraction)


def make_ethanol(folder: Path, seed: int, fraction: float = 1.0) -> None:
    """Write Langevin trajectories of ethanol at each temperature, and the isolated atoms, all with GFN2-xTB."""
    from tblite.ase import TBLite

    def reference() -> Calculator:
        return TBLite(method="GFN2-xTB", verbosity=0, accuracy=0.1)

    provenance = {"method": "GFN2-xTB (tblite)", "script": "scripts/generate_data.py", "seed": seed}
    atoms = [Atoms(symbol) for symbol in ("H", "C", "O")]
    singles = [
        _label(a, TBLite(method="GFN2-xTB", verbosity=0), stress=False, info={"config_type": "atom"}) for a in atoms
    ]
    _store(folder / "ethanol_atoms.h5", singles, provenance)
    start = molecule("CH3CH2OH")
    start.calc = reference()
    BFGS(start, logfile=None).run(fmax=0.01)
    for number, (temperature, wanted) in enumerate(ETHANOL.items()):
        rng = np.random.default_rng([seed, number])
        count = max(10, round(fraction * wanted))
        frames = _sample(start.copy(), reference, temperature, count, rng, equilibrate=2000, every=40)
        _store(folder / f"ethanol_{temperature}K.h5", frames, {**provenance, "temperature_K": temperature})


def make_copper(folder: Path, seed: int, fraction: float = 1.0) -> None:
    """Write strained, rattled, defective and hot copper cells with EMT energies, forces and stress."""
    rng = np.random.default_rng([seed, 99])
    frames = []
    for kind, wanted in COPPER.items():
        for _ in tqdm(range(max(4, round(fraction * wanted))), desc=f"copper {kind}", unit="frame"):
            atoms = bulk("Cu", "fcc", a=3.59, cubic=True).repeat(2)
            if kind == "vacancy":
                del atoms[int(rng.integers(len(atoms)))]
            strain = rng.normal(scale=0.02, size=(3, 3))
            atoms.set_cell(atoms.cell.array @ (np.eye(3) + 0.5 * (strain + strain.T)), scale_atoms=True)
            atoms.positions += rng.normal(scale=0.25 if kind == "hot" else 0.1, size=atoms.positions.shape)
            frames.append(_label(atoms, ase.calculators.emt.EMT(), stress=True, info={"config_type": kind}))
    cell = bulk("Cu", "fcc", a=3.59, cubic=True)
    cell.calc = ase.calculators.emt.EMT()
    BFGS(FrechetCellFilter(cell), logfile=None).run(fmax=1e-3)
    frames.append(_label(cell, ase.calculators.emt.EMT(), stress=True, info={"config_type": "relaxed"}))
    frames.append(_label(Atoms("Cu"), ase.calculators.emt.EMT(), stress=False, info={"config_type": "atom"}))
    provenance = {"method": "ASE EMT", "script": "scripts/generate_data.py", "seed": seed}
    _store(folder / "copper.h5", frames, provenance)


def _sample(
    atoms: Atoms,
    reference: Callable[[], Calculator],
    temperature: float,
    count: int,
    rng: np.random.Generator,
    equilibrate: int,
    every: int,
) -> list[Frame]:
    """Return frames of a Langevin trajectory of 0.5 fs steps, one every ``every`` steps."""
    atoms.calc = reference()
    thermalize_momenta(atoms, temperature_K=temperature, rng=rng)
    dynamics = Langevin(
        atoms, 0.5 * units.fs, temperature_K=temperature, friction=0.02 / units.fs, rng=rng, fixcm=False
    )
    dynamics.run(equilibrate)

    def frames() -> Iterator[Frame]:
        for _ in tqdm(range(count), desc=f"ethanol {temperature} K", unit="frame"):
            dynamics.run(every)
            copy = atoms.copy()
            copy.positions -= copy.get_center_of_mass()
            yield _label(copy, reference(), stress=False, info={"config_type": f"md_{temperature}K"})

    return list(frames())


def _label(atoms: Atoms, calculator: Calculator, *, stress: bool, info: dict[str, str]) -> Frame:
    atoms.calc = calculator
    return Frame.from_atoms(
        atoms,
        energy=float(atoms.get_potential_energy()),
        forces=np.array(atoms.get_forces()),
        stress=np.array(atoms.get_stress()) if stress else None,
        info=info,
        source="generate_data.py",
    )


def _store(path: Path, frames: list[Frame], provenance: dict[str, object]) -> None:
    with FrameStore(path, "w", provenance=provenance) as store:
        store.append(frames)
    print(f"{path}: {len(frames)} frames, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
