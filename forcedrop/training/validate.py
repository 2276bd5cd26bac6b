"""Errors on held-out structures, of the plain network or of the Monte-Carlo mean."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forcedrop.derive import Derived, derive
from forcedrop.graph import AtomicGraph, batch_graphs
from forcedrop.potential import Potential
from forcedrop.sampling import predict
from forcedrop.training.checkpoint import default_samples
from forcedrop.training.config import TrainConfig
from forcedrop.training.losses import Targets, likelihood_loss, plain_loss, targets
from forcedrop.training.parallel import World

_FEW = 4
"""Masks of the bank whose mean is validated in stage one."""


@dataclass
class Errors:
    """Root mean square errors [meV, meV per atom, meV/Å, meV/Å³] and, with samples, the force likelihood and mean z²."""

    energy: float = math.nan
    energy_per_atom: float = math.nan
    forces: float = math.nan
    stress: float = math.nan
    loss: float = math.nan
    z2: float = math.nan


def validate(
    potential: Potential,
    graphs: list[AtomicGraph],
    config: TrainConfig,
    scale: Tensor,
    *,
    likelihood: bool,
    masked: bool,
    world: World | None = None,
) -> Errors:
    """Return the errors on labelled structures, the same on every process.

    Args:
        potential: the network, on its device.
        graphs: the structures.
        config: the training file.
        scale: unit of the loss [eV/Å].
        likelihood: whether the loss is that of stage two: as many masks as a prediction takes, and z².
        masked: whether stage one trains masks; then the mean of the first few of them is measured.
        world: the processes that share the work.
    """
    world = world or World()
    dropout, size, device = config.dropout, config.eval_batch_size, potential.hidden_bias.device
    batches = [graphs[first : first + size] for first in range(0, len(graphs), size)]
    sums = torch.zeros(9, dtype=torch.float64, device=device)
    for group in world.share(batches):
        batch = batch_graphs(group).to(device)
        target = targets(batch)
        z2 = sums.new_zeros(())
        if likelihood:
            prediction = predict(
                potential, batch, n_samples=default_samples(config.n_functions), seed=dropout.bank_seed
            )
            mean = prediction.mean
            loss = likelihood_loss(prediction.samples, target, config.loss, scale, mean_weight=0.0, beta=0.0)
            # a proper score; what is minimised, weighted, is none
            z2 = ((mean.forces - batch.forces) / prediction.std.forces.clamp(min=1e-9)).square()
            z2 = _sum_where(target.has_forces, z2)
        else:
            few = min(_FEW, dropout.bank)
            mean = (
                predict(potential, batch, n_samples=few, seed=dropout.bank_seed).mean
                if masked
                else derive(potential, batch)
            )
            loss = plain_loss(mean, target, config.loss, scale)
        share = loss.detach().double() * (len(group) / len(graphs))
        sums += torch.cat([torch.stack([share, z2]), _squares(mean, target)])
    loss_sum, z2_sum, energy, per_atom, forces, stress, n_energy, n_forces, n_stress = world.sum(sums).tolist()
    return Errors(
        energy=_rms(energy, n_energy),
        energy_per_atom=_rms(per_atom, n_energy),
        forces=_rms(forces, n_forces),
        stress=_rms(stress, n_stress),
        loss=loss_sum,
        z2=z2_sum / n_forces if likelihood and n_forces else math.nan,
    )


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
