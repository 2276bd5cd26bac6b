"""Errors on held-out structures, of the plain network or of the mean of some functions."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forcedrop.derive import Derived, derive
from forcedrop.dropout import frozen
from forcedrop.graph import AtomicGraph, Batch, batch_graphs
from forcedrop.potential import EnergyModel
from forcedrop.training.config import TrainConfig
from forcedrop.training.losses import Targets, plain_loss, targets
from forcedrop.training.parallel import World

_FEW = 4
"""Functions whose mean is validated where functions are trained."""


@dataclass
class Errors:
    """Root mean square errors [meV, meV per atom, meV/Å, meV/Å³] and the loss."""

    energy: float = math.nan
    energy_per_atom: float = math.nan
    forces: float = math.nan
    stress: float = math.nan
    loss: float = math.nan


def validate(
    potential: EnergyModel,
    graphs: list[AtomicGraph],
    config: TrainConfig,
    scale: Tensor,
    *,
    functions: bool,
    world: World | None = None,
) -> Errors:
    """Return the errors on labelled structures, the same on every process.

    Args:
        potential: the network, on its device.
        graphs: the structures.
        config: the training file.
        scale: unit of the loss [eV/Å].
        functions: whether a fixed set of functions is trained; then the mean of the first few of them is measured.
        world: the processes that share the work.
    """
    world = world or World()
    size, device = config.eval_batch_size, potential.device
    batches = [graphs[first : first + size] for first in range(0, len(graphs), size)]
    sums = torch.zeros(8, dtype=torch.float64, device=device)
    for group in world.share(batches):
        batch = batch_graphs(group).to(device)
        target = targets(batch)
        mean = _mean_of_few(potential, batch, config.uncertainty.seed) if functions else derive(potential, batch)
        share = plain_loss(mean, target, config.loss, scale).detach().double() * (len(group) / len(graphs))
        sums += torch.cat([share[None], _squares(mean, target)])
    loss_sum, energy, per_atom, forces, stress, n_energy, n_forces, n_stress = world.sum(sums).tolist()
    return Errors(
        energy=_rms(energy, n_energy),
        energy_per_atom=_rms(per_atom, n_energy),
        forces=_rms(forces, n_forces),
        stress=_rms(stress, n_stress),
        loss=loss_sum,
    )


def _mean_of_few(potential: EnergyModel, batch: Batch, seed: int) -> Derived:
    found = []
    for k in range(_FEW):
        with frozen(potential, seed, k):
            found.append(derive(potential, batch))
    return Derived(*(torch.stack(x).mean(0) for x in zip(*found, strict=True)))


def _squares(mean: Derived, target: Targets) -> Tensor:
    """Return sums of squares of energy, energy per atom, forces and stress, and three counts; float64."""
    energy = (mean.energy - target.energy).square()
    sums = [
        _sum_where(target.has_energy, energy),
        _sum_where(target.has_energy, energy / target.n_atoms.square()),
        _sum_where(target.has_forces, (mean.forces - target.forces).double().square()),
        _sum_where(target.has_stress, (mean.stress - target.stress).double().square()),
    ]
    return torch.cat([torch.stack(sums), target.counts.double()])


def _sum_where(present: Tensor, values: Tensor) -> Tensor:
    present = present.reshape(-1, *[1] * (values.dim() - 1))
    return torch.where(present, values, torch.zeros_like(values)).double().sum()


def _rms(total: float, count: float) -> float:
    """Return 1000 times the root mean square; nan where there is nothing."""
    return 1e3 * math.sqrt(total / count) if count else math.nan
