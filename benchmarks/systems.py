"""Structures and models that the timings share: a molecule of 27 atoms, silicon of 216, networks of the default shape, MACE.

Nothing at the top of this file imports forcedrop or torch: the environment with MACE reads it too. Weights are random: time does
not depend on them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data" / "3bpa" / "train_300K.xyz"
ISOLATED = {1: -13.587222780835477, 6: -1029.4889999855063, 7: -1484.9814568572233, 8: -2041.9816003861047}
"""eV, from ``iso_atoms.xyz`` of 3BPA."""
ELEMENTS = {"3BPA": (1, 6, 7, 8), "silicon": (14,)}
CUTOFF = 5.0
FUNCTIONS = 64
"""Of the bank."""


def structure(name: str, data: Path = DATA, repeat: int = 3) -> Any:
    """Return 3BPA (27 atoms) or a rattled silicon crystal (8 × repeat³ atoms)."""
    from ase.build import bulk
    from ase.io import read

    if name == "3BPA":
        atoms: Any = read(data, 0)
        atoms.calc = None
        atoms.pbc, atoms.cell = False, None
        return atoms
    atoms = bulk("Si", a=5.43, cubic=True).repeat(repeat)
    atoms.rattle(0.05, seed=0)
    return atoms


def model(name: str, seed: int = 0, data: Path = DATA) -> Any:
    """Return a network of the default shape with random weights and a bank of small random functions, as a model."""
    import torch

    from forcedrop.derive import geometry
    from forcedrop.graph import NeighbourFinder, batch_graphs, build_graph
    from forcedrop.model import TrainedModel
    from forcedrop.potential import build
    from forcedrop.structures import Frame

    torch.manual_seed(seed)
    elements = ELEMENTS[name]
    potential = build("sphere", {"cutoff": CUTOFF}, elements, {z: ISOLATED.get(z, 0.0) for z in elements}).eval()
    batch = batch_graphs([build_graph(Frame.from_atoms(structure(name, data, repeat=1)), NeighbourFinder(CUTOFF))])
    graph, vec = geometry(potential, batch)
    potential.measure(vec, graph)
    site: Any = potential.correction
    potential.set_functions(None, 1e-3 * torch.randn(FUNCTIONS, *site.weight.shape))
    return TrainedModel(potential)


def calculator(name: str, seed: int = 0, data: Path = DATA, **settings: Any) -> Any:
    """Return forcedrop's calculator of such a model."""
    from forcedrop import DropoutCalculator

    return DropoutCalculator(model(name, seed, data), **settings)


def mace_model(name: str, seed: int = 0) -> Any:
    """Return MACE: 64 channels, L = 0, two layers, float32, random weights."""
    from mace.calculators import MACECalculator  # noqa: F401, I001  (first: it lets e3nn load its constants)
    import numpy as np
    import torch
    from e3nn import o3
    from mace import modules

    torch.manual_seed(seed)
    torch.set_default_dtype(torch.float32)
    elements = ELEMENTS[name]
    block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
    made: Any = modules.ScaleShiftMACE(
        r_max=CUTOFF, num_bessel=8, num_polynomial_cutoff=5, max_ell=3, interaction_cls=block, interaction_cls_first=block,
        num_interactions=2, num_elements=len(elements), hidden_irreps=o3.Irreps("64x0e"), MLP_irreps=o3.Irreps("16x0e"),
        atomic_energies=np.array([ISOLATED.get(z, 0.0) for z in elements]), avg_num_neighbors=15.0, atomic_numbers=elements,
        correlation=3, gate=torch.nn.functional.silu, atomic_inter_scale=1.0, atomic_inter_shift=0.0,
    )  # fmt: skip
    return made


def mace_calculator(name: str, members: int = 1) -> Any:
    """Return MACE's own calculator of one model or of a committee."""
    made = [mace_model(name, seed).eval() for seed in range(members)]
    from mace.calculators import MACECalculator

    return MACECalculator(models=made, device="cpu", default_dtype="float32")


def moved(atoms: Any, calculators: Any) -> Callable[[], None]:
    """Return a call that moves the atoms a little and asks for forces: of one calculator, or of several one after another."""
    import numpy as np

    rng = np.random.default_rng(0)
    copies = []
    for calculator in calculators if isinstance(calculators, list) else [calculators]:
        copy = atoms.copy()
        copy.calc = calculator
        copies.append(copy)

    def call() -> None:
        step = rng.normal(scale=1e-4, size=atoms.positions.shape)
        for copy in copies:
            copy.positions += step
            copy.get_forces()

    return call


def differentiated(name: str, atoms: Any) -> Callable[[], Any]:
    """Return a call that differentiates forcedrop's network as a whole, of a graph that is already there."""
    from forcedrop.derive import derive_pairs, geometry
    from forcedrop.graph import NeighbourFinder, batch_graphs, build_graph
    from forcedrop.structures import Frame

    potential = model(name).potential
    batch = batch_graphs([build_graph(Frame.from_atoms(atoms), NeighbourFinder(CUTOFF))])
    graph, vec = geometry(potential, batch)
    return lambda: derive_pairs(potential, graph, vec, batch.volume)
