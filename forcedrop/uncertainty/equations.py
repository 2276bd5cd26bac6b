r"""The normal equations of what energies are read from: the ground that closed-form functions stand on.

The energy is linear in the weights w of the features (``EnergyModel.features``), so are forces and virials, and for Gaussian
errors the labels' likelihood is Gaussian in w with

.. math:: H = \sum_{frames} \frac{J_E J_E^T}{N\,\sigma_E^2} + \frac{J_F J_F^T}{\sigma_F^2} + \frac{J_V J_V^T}{N\,\sigma_V^2},
    \qquad b = \sum J\,(\text{label} - \text{prediction}),

:math:`J = \partial(\text{energy, forces, virial})/\partial w`, σ the root mean square errors on frames that did not train
(energies and virials per √N). Source: the last-layer Laplace approximation (Daxberger et al., NeurIPS 2021, arXiv 2106.14806),
for potentials Bigi, Chong, Ceriotti & Grasselli, Mach. Learn.: Sci. Technol. 5, 045018 (2024). The prior of a weight has the
variance of the trained readouts, for functions and for the plain network's regression alike. A regression with a prior 10⁴ times
as wide is a little better near the data and can be many times worse away from it: one ethanol network went from 84 to 568 meV/Å
at 1200 K, where the narrow prior has 93 (``benchmarks/results/pairs.json``, key ``prior``).

Each element has weights of its own up to five elements. Of more, an element's weights are a combination of five sets that all
share: R sets of F weights instead of one for each, so that H stays small (:func:`element_basis`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from forcedrop.derive import VOIGT, Derived, derive, geometry
from forcedrop.graph import AtomicGraph, Batch, batch_graphs, group_by_atoms
from forcedrop.potential import EnergyModel
from forcedrop.uncertainty.method import Labels

ROWS = 12
"""Labels per weight that are enough: of more, frames at even distances are left out."""
HELD_ROWS = 6000
"""Held-out labels, about, that choices are judged by."""
CHUNK = 8
BATCH_ATOMS = 256


class Jacobian(NamedTuple):
    """Derivatives by R·F weights, float64, on the CPU: of energies (R·F, B), forces (R·F, N, 3), virials V·stress (R·F, B, 6)."""

    energy: Tensor
    forces: Tensor
    virial: Tensor


class Residuals(NamedTuple):
    """Label minus prediction of what has one, flat, float64, on the CPU: energies and virials per √N [eV], forces [eV/Å]."""

    energy: Tensor
    forces: Tensor
    virial: Tensor


class Scales(NamedTuple):
    """Root mean square errors on held-out frames: energies and virials per √N [eV], forces [eV/Å]; 0 where no label counts."""

    energy: float
    forces: float
    virial: float


class HeldOut(NamedTuple):
    """What held-out labels say of changes of the weights, a row a label.

    Attributes:
        rows: derivatives of energies per √N and of force components by the weights, in units of their σ, shape (n, R·F).
        residual: label minus the trained network's prediction, in the same units, (n,).
        is_energy: which rows are energies, (n,).
        frame: the frame of each row, (n,).
    """

    rows: Tensor
    residual: Tensor
    is_energy: Tensor
    frame: Tensor


@dataclass(frozen=True)
class Equations:
    """The normal equations of a trained network's weights, in its unit; float64, on the CPU.

    Attributes:
        precision: H, shape (R·F, R·F).
        pull: b, shape (R·F,).
        weights: w*, what the trained network reads its features with, shape (R·F,).
        prior: τ, the precision of a weight's prior.
        scales: σ of the labels.
        held: what held-out labels say.
        frames: how many frames were summed over.
    """

    precision: Tensor
    pull: Tensor
    weights: Tensor
    prior: float
    scales: Scales
    held: HeldOut
    frames: int


def element_basis(potential: EnergyModel) -> Tensor:
    """Return how much of each of the R sets of weights an element has, shape (elements, R).

    With a set for each element the unit matrix. With fewer, R directions in the space of elements: what all have in common, and
    the principal components of what the network learned about each (``EnergyModel.element_vectors``), orthonormal.
    """
    site: Any = potential.correction
    n, sets = len(potential.elements), len(site.weight)
    if n == sets:
        return torch.eye(n, dtype=torch.float64)
    columns = [torch.ones(n, 1, dtype=torch.float64)]
    vectors = potential.element_vectors()
    if vectors is not None:
        own = vectors.detach().double().cpu()
        columns.append(torch.linalg.svd(own - own.mean(0), full_matrices=False).U)
    columns.append(torch.eye(n, dtype=torch.float64))  # where the network tells no elements apart
    return torch.linalg.qr(torch.cat(columns, dim=1)[:, :sets]).Q * n**0.5


def trained_weights(potential: EnergyModel, basis: Tensor) -> Tensor:
    """Return w*, the same for every element, as R sets of weights, flat (R·F,)."""
    n = len(potential.elements)
    constant = torch.linalg.lstsq(basis, torch.ones(n, 1, dtype=torch.float64)).solution[:, 0]
    return torch.outer(constant, potential.read_weights().double().cpu()).flatten()


def solve_equations(
    potential: EnergyModel, labels: Labels, *, frames: int | None = None, held: bool = True
) -> Equations:
    """Sum the normal equations over labelled frames; the network is left as it is, but for its ``basis``.

    Args:
        potential: a trained network with features, without functions yet; frozen to a function, its features are that one's.
        labels: frames that trained it, and held-out ones for σ and for choices.
        frames: how many training frames to use at most; by default as many as give 12 force components a weight.
        held: whether held-out labels are to be kept, to choose by.

    Raises:
        ValueError: if the network has no features, or no held-out frame has an energy or forces.
    """
    if not potential.n_features:
        raise ValueError(
            f"a network of kind {potential.kind!r} has no features that its energy is read from linearly: "
            "use `uncertainty.method: masks` or a deep ensemble"
        )
    scales = held_errors(potential, labels.held, labels.stress)
    if not scales.energy and not scales.forces:
        raise ValueError("finding functions needs held-out frames with energies or forces")
    basis = element_basis(potential)
    potential.basis = basis.to(potential.basis)
    if basis.shape[1] < len(basis) and not labels.quiet:
        tqdm.write(f"{len(basis)} elements share {basis.shape[1]} sets of {potential.n_features} weights")
    weights = trained_weights(potential, basis)
    chosen = _evenly(labels.train, frames or len(labels.train), len(weights) * ROWS / 3)
    precision = torch.zeros(len(weights), len(weights), dtype=torch.float64)
    pull = torch.zeros(len(weights), dtype=torch.float64)
    n_labels = 0
    batches = group_by_atoms(sorted(chosen, key=lambda graph: graph.num_nodes), BATCH_ATOMS)
    for group in tqdm(batches, desc="equations of the readouts", unit="batch", leave=False, disable=labels.quiet):
        batch = batch_graphs(group).to(potential.device)
        for rows, residual in _labelled(potential, batch, scales):
            precision += rows @ rows.T
            pull += rows @ residual
            n_labels += len(residual)
    if n_labels < len(weights) and not labels.quiet:
        tqdm.write(
            f"{n_labels} labels for {len(weights)} weights: where they do not say, the prior holds the trained ones"
        )
    share = len(labels.train) / len(chosen)
    readouts = getattr(potential, "trained_readouts", potential.read_weights)()
    prior = 1 / float(readouts.double().square().mean())
    judged = _held_out(potential, labels, scales) if held else HeldOut(*(torch.zeros(0),) * 4)
    return Equations(share * precision, share * pull, weights, prior, scales, judged, len(chosen))


def refit(potential: EnergyModel, labels: Labels, equations: Equations) -> Tensor:
    """Return what regression adds to the plain network's weights, (R·F,); 0 where it would make held-out errors larger."""
    values, vectors = torch.linalg.eigh(equations.precision)
    values = values.clamp(min=0)  # rounding
    found = vectors @ ((vectors.T @ equations.pull) / (values + equations.prior))
    site: Any = potential.correction
    potential.set_functions(found.reshape(site.weight.shape), None)
    after = held_errors(potential, labels.held, labels.stress)
    before = equations.scales
    worse = sum((b / a) ** 2 for a, b in zip(before, after, strict=True) if a) > sum(a > 0 for a in before)
    potential.set_functions(None, None)
    return torch.zeros_like(found) if worse else found


def jacobian(potential: EnergyModel, batch: Batch) -> Jacobian:
    """Return the derivatives of energies, forces and virials by the weights.

    The energy is linear in the weights, so its derivatives are sums of features, and those of forces and virials are the
    features' derivatives by positions and strain: in forward mode, as many passes as the largest structure has coordinates, and
    six, however many features there are.
    """
    graph, vec = geometry(potential, batch)
    scale = float(potential.energy_scale)
    basis = potential.basis[graph.species].double()

    def by_weight(values: Tensor) -> Tensor:
        """Sum per-atom values over each structure, as much of each set of weights as an atom's element has: (B, R·F)."""
        own = (basis[:, :, None] * values.double()[:, None]).flatten(1)
        zeros = own.new_zeros((graph.n_graphs, own.shape[1]))
        return scale * zeros.index_add(0, graph.batch, own).cpu()

    def along(change: Tensor) -> Tensor:
        """Return the derivative of the features when the pair vectors change so."""
        derivative: Tensor = torch.func.jvp(lambda v: potential.features(v, graph), (vec,), (change,))[1]
        return derivative

    def moved(direction: Tensor) -> Tensor:
        """Return the derivative of the features when atoms move."""
        return along((direction[graph.nbr] - direction[:, None]) * batch.nbr_used[..., None])

    def strained(strain: Tensor) -> Tensor:
        return along((vec @ strain) * batch.nbr_used[..., None])

    local = torch.arange(batch.num_nodes, device=vec.device) - batch.ptr[graph.batch]
    with torch.no_grad():
        energy = by_weight(potential.features(vec, graph)).T
        forces = torch.zeros(len(energy), batch.num_nodes, 3, dtype=torch.float64)
        columns = [(atom, axis) for atom in range(int(local.max()) + 1) for axis in range(3)]
        for first in range(0, len(columns), CHUNK):
            chosen = columns[first : first + CHUNK]
            directions = vec.new_zeros(len(chosen), batch.num_nodes, 3)
            for row, (atom, axis) in zip(directions, chosen, strict=True):
                row[local == atom, axis] = 1.0
            for (atom, axis), values in zip(chosen, torch.func.vmap(moved)(directions), strict=True):
                atoms = (local == atom).nonzero()[:, 0].cpu()
                forces[:, atoms, axis] = -by_weight(values)[batch.batch[atoms].cpu()].T
        strains = vec.new_zeros(6, 3, 3)
        for row, i, j in zip(strains, *VOIGT, strict=True):
            row[i, j] += 0.5
            row[j, i] += 0.5
        virial = torch.stack([by_weight(values).T for values in torch.func.vmap(strained)(strains)], dim=2)
    return Jacobian(energy, forces, virial)


def _labelled(potential: EnergyModel, batch: Batch, scales: Scales) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield derivatives (R·F, n) and residuals (n,) of every kind of label that counts, in units of its σ."""
    found, derivatives = residuals(potential, batch), jacobian(potential, batch)
    root_n = batch.ptr.diff().double().sqrt().cpu()
    energy, forces, stress = (batch.has_energy.cpu(), batch.has_forces[batch.batch].cpu(), batch.has_stress.cpu())
    if scales.energy:
        yield (derivatives.energy / root_n / scales.energy)[:, energy], found.energy / scales.energy
    if scales.forces:
        yield (derivatives.forces / scales.forces)[:, forces].flatten(1), found.forces / scales.forces
    if scales.virial:
        rows = derivatives.virial / root_n[:, None] / scales.virial
        yield rows[:, stress].flatten(1), found.virial / scales.virial


def _held_out(potential: EnergyModel, labels: Labels, scales: Scales) -> HeldOut:
    """Return rows of held-out energies and forces, of frames at even distances if there are very many."""
    chosen = _evenly(labels.held, len(labels.held), HELD_ROWS / 3)
    rows, left, kinds, frames = [], [], [], []
    for number, graph in enumerate(chosen):
        batch = batch_graphs([graph]).to(potential.device)
        parts = _labelled(potential, batch, scales._replace(virial=0.0))
        present = [bool(scales.energy), bool(scales.forces)]
        for is_energy, (own, residual) in zip(
            [k for k, has in ((True, present[0]), (False, present[1])) if has], parts, strict=True
        ):
            rows.append(own.T)
            left.append(residual)
            kinds.append(torch.full((len(residual),), is_energy))
            frames.append(torch.full((len(residual),), number))
    return HeldOut(torch.cat(rows), torch.cat(left), torch.cat(kinds), torch.cat(frames))


def residuals(potential: EnergyModel, batch: Batch) -> Residuals:
    """Return what a network leaves of the labels."""
    found: Derived = derive(potential, batch)
    root_n = batch.ptr.diff().double().sqrt()
    virial = (batch.stress - found.stress).double() * (batch.volume / root_n)[:, None]
    parts = (
        ((batch.energy - found.energy) / root_n)[batch.has_energy],
        (batch.forces - found.forces)[batch.has_forces[batch.batch]],
        virial[batch.has_stress],
    )
    return Residuals(*(part.detach().double().flatten().cpu() for part in parts))


def held_errors(potential: EnergyModel, held: Sequence[AtomicGraph], stress: bool) -> Scales:
    """Return the root mean square errors on held-out frames."""
    groups = group_by_atoms(held, BATCH_ATOMS)
    found = [residuals(potential, batch_graphs(group).to(potential.device)) for group in groups]
    energy, forces, virial = (
        float(torch.cat(part).square().mean().sqrt().nan_to_num()) for part in zip(*found, strict=True)
    )
    return Scales(energy, forces, virial if stress else 0.0)


def _evenly(graphs: Sequence[AtomicGraph], frames: int, atoms: float) -> list[AtomicGraph]:
    """Return graphs at even distances, as many as ``frames`` and ``atoms`` in total allow, at least ten."""
    mean = sum(graph.num_nodes for graph in graphs) / len(graphs)
    n = min(len(graphs), frames, max(10, round(atoms / mean)))
    return [graphs[k * len(graphs) // n] for k in range(n)]
