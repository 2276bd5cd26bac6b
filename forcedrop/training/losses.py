"""What training minimises. All errors are measured in units of the forces' root mean square (``scale``, in eV/Å or eV)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from forcedrop.derive import Derived
from forcedrop.graph import Batch
from forcedrop.training.config import LossSection


class Targets(NamedTuple):
    """The labels of a batch as plain tensors; they are 0 where ``has_…`` is False.

    Attributes:
        n_atoms: shape (B,).
        volume: [Å³], shape (B,).
        energy: [eV], float64, shape (B,).
        forces: [eV/Å], shape (N, 3).
        stress: [eV/Å³], shape (B, 6).
        has_energy: shape (B,).
        has_forces: per atom, shape (N,).
        has_stress: shape (B,).
        counts: numbers that means are taken over: energies, force components, stress components, shape (3,). Those of this
            batch, or of a larger one of which this is a share: the shares' losses then add up to the larger one's.
    """

    n_atoms: Tensor
    volume: Tensor
    energy: Tensor
    forces: Tensor
    stress: Tensor
    has_energy: Tensor
    has_forces: Tensor
    has_stress: Tensor
    counts: Tensor


def targets(batch: Batch, counts: Tensor | None = None) -> Targets:
    """Return the labels of a batch, with the ``counts`` of the batch of which it is a share, if given."""
    has_forces = batch.has_forces[batch.batch]
    if counts is None:
        counts = torch.stack([batch.has_energy.sum(), 3 * has_forces.sum(), 6 * batch.has_stress.sum()])
    return Targets(
        n_atoms=batch.ptr.diff(),
        volume=batch.volume,
        energy=batch.energy,
        forces=batch.forces,
        stress=batch.stress,
        has_energy=batch.has_energy,
        has_forces=has_forces,
        has_stress=batch.has_stress,
        counts=counts,
    )


def squared_errors(predicted: Derived, target: Targets, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean squared errors of energy (per √N), force components and virial (per √N), in units of ``scale``².

    Only labels that are there count; a batch without any gives 0. Size-extensive: each has a variance that does not depend on
    the number of atoms where the atoms' errors are independent.
    """
    terms = zip(residuals(predicted, target, scale), _present(target), target.counts.unbind(), strict=True)
    energy, forces, virial = (_sum(error.square(), has) / count.clamp(min=1) for error, has, count in terms)
    return energy, forces, virial


def residuals(predicted: Derived, target: Targets, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the errors of energy per √N (…, B), forces (…, N, 3) and virial per √N (…, B, 6), in units of ``scale``."""
    root_n = target.n_atoms.to(scale.dtype).sqrt()
    energy = (predicted.energy - target.energy).to(scale.dtype) / root_n / scale
    forces = (predicted.forces - target.forces) / scale
    virial = (predicted.stress - target.stress) * (target.volume / root_n)[:, None] / scale
    return energy, forces, virial


def plain_loss(
    predicted: Derived, target: Targets, weights: LossSection, scale: Tensor, ramp: Tensor | float = 1.0
) -> Tensor:
    """Return the weighted sum of the squared errors, the weights of energy and virial multiplied by ``ramp``.

    Energies and virials are sums over all atoms, so their errors are stiff in the weights of the network: at a high learning
    rate they shake it while the forces are being learned. They may wait until the rate is low.
    """
    energy, forces, virial = squared_errors(predicted, target, scale)
    return weights.forces * forces + ramp * (weights.energy * energy + weights.stress * virial)


def _present(target: Targets) -> tuple[Tensor, Tensor, Tensor]:
    return target.has_energy, target.has_forces, target.has_stress


def _sum(values: Tensor, present: Tensor) -> Tensor:
    """Return the sum over the entries whose label is there."""
    return (values * present.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1))).sum()
