"""Where does a network of 300 K frames break? Random torsions of 3BPA, in which parts that are not bonded come close.

    python benchmarks/holes.py KIND ...        # trainings of race.py: no_decay, plain, dropout

400 molecules of the training file whose three rotatable bonds were turned at random until atoms more than three bonds apart are
1.7 to 2.6 Å close, labelled with GFN2-xTB (kept where no force component is above 12 eV/Å). That is another method than the
training's: on the 300 K frames themselves the two differ by 0.2 eV/Å, so only errors far above that count. A *hole* has a
force RMSE above 1 eV/Å. Nothing here is a test set: it is where cures are chosen. Writes ``results/holes.json``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import networkx as nx
import numpy as np
import torch
from ase import Atoms
from ase.neighborlist import build_neighbor_list, natural_cutoffs
from common import environment, read_results, write_results
from race import ROOT, RUNS, plain_residuals

from forcedrop.model import TrainedModel, load_model
from forcedrop.structures import Frame, read_frames, write_frames

N_FRAMES, SEED = 400, 5
NEAR, FAR, LARGEST = 1.7, 2.6, 12.0
"""Distances of the closest pair [Å], and the largest force component [eV/Å]."""
HOLE = 1.0
"""Force RMSE of a structure [eV/Å]."""


def main() -> None:
    """Make the structures if they are not there, judge trainings on them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="+", help="trainings of race.py")
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "3bpa")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    path = RUNS / "clashes.h5"
    if not path.exists():
        write_frames(path, clashes(read_frames(arguments.data / "train_300K.xyz")))
    frames = read_frames(path)
    for kind in arguments.kinds:
        row = judge(load_model(RUNS / kind / "model.pt"), frames)
        print(kind, row, flush=True)
        write_results("holes", read_results("holes") | {kind: row, "environment": environment(SEED)})


def clashes(frames: list[Frame]) -> list[Frame]:
    """Return the labelled structures."""
    from tblite.ase import TBLite

    molecule = frames[0].to_atoms()
    molecule.pbc = False
    near = build_neighbor_list(molecule, natural_cutoffs(molecule, mult=1.2), self_interaction=False, bothways=True)
    bonds = nx.Graph((i, int(j)) for i in range(len(molecule)) for j in near.get_neighbors(i)[0])
    rotatable = [(i, j) for i, j in nx.bridges(bonds) if bonds.degree(i) > 1 and bonds.degree(j) > 1]
    steps = dict(nx.all_pairs_shortest_path_length(bonds))
    apart = np.array([[steps[i][j] > 3 for j in range(len(molecule))] for i in range(len(molecule))])
    generator = np.random.default_rng(SEED)
    calculator = TBLite(method="GFN2-xTB", verbosity=0)
    found: list[Frame] = []
    while len(found) < N_FRAMES:
        frame = frames[generator.integers(len(frames))]
        atoms = Atoms(frame.z, frame.pos)
        for bond in rotatable:
            if generator.random() < 0.6:
                turn(atoms, bonds, bond, generator.uniform(0, 360))
        if not NEAR <= atoms.get_all_distances()[apart].min() <= FAR:
            continue
        atoms.calc = calculator
        try:
            forces, energy = atoms.get_forces(), atoms.get_potential_energy()
        except RuntimeError:  # the charges do not converge
            continue
        if np.abs(forces).max() <= LARGEST:
            label = {"energy": float(energy), "forces": np.array(forces), "source": f"torsion#{len(found)}"}
            found.append(
                Frame(z=frame.z, pos=atoms.positions.copy(), cell=np.zeros((3, 3)), pbc=np.zeros(3, bool), **label)
            )
    return found


def turn(atoms: Atoms, bonds: nx.Graph, bond: tuple[int, int], angle: float) -> None:
    """Turn what hangs on the second atom of a bond about it, by an angle in degrees."""
    cut = bonds.copy()
    cut.remove_edge(*bond)
    moving = sorted(nx.node_connected_component(cut, bond[1]))
    centre = atoms.positions[bond[1]]
    part = atoms[moving]
    part.rotate(angle, centre - atoms.positions[bond[0]], center=centre)
    atoms.positions[moving] = part.positions


def judge(model: TrainedModel, frames: list[Frame]) -> dict[str, float]:
    """Return percentiles of the structures' force RMSE [meV/Å] of the plain pass, and the share of holes [%]."""
    _, forces = plain_residuals(model, frames)
    values = 1e3 * np.sqrt(np.mean(np.square(forces), axis=1, dtype=float))
    return {
        "median": round(float(np.median(values)), 1),
        "rms": round(float(np.sqrt(np.mean(values**2))), 1),
        "percentile_99": round(float(np.percentile(values, 99)), 1),
        "largest": round(float(values.max()), 1),
        "holes_percent": round(100 * float(np.mean(values > 1e3 * HOLE)), 2),
    }


if __name__ == "__main__":
    main()
