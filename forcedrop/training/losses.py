"""What training minimises. All errors are measured in units of the forces' root mean square (``scale``, in eV/Å or eV)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch_geometric.data import Batch

from forcedrop.derive import Derived
from forcedrop.training.config import LossSection


def squared_errors(predicted: Derived, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the mean squared errors of energy (per √N), force components and virial (per √N), in units of ``scale``².

    Only labels that are there count; a batch without any gives 0. Size-extensive: each has a variance that does not depend on
    the number of atoms where the atoms' errors are independent.
    """
    energy, forces, virial = residuals(predicted, batch, scale)
    return (
        _mean(energy.square(), batch.has_energy),
        _mean(forces.square(), batch.has_forces[batch.batch]),
        _mean(virial.square(), batch.has_stress),
    )


def residuals(predicted: Derived, batch: Batch, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the errors of energy per √N (…, B), forces (…, N, 3) and virial per √N (…, B, 6), in units of ``scale``."""
    root_n = torch.bincount(batch.batch, minlength=batch.num_graphs).sqrt()
    energy = (predicted.energy - batch.energy).to(scale.dtype) / root_n / scale
    forces = (predicted.forces - batch.forces) / scale
    virial = (predicted.stress - batch.stress) * (batch.volume / root_n)[:, None] / scale
    return energy, forces, virial


def plain_loss(predicted: Derived, batch: Batch, weights: LossSection, scale: Tensor) -> Tensor:
    """Return the weighted sum of the squared errors."""
    energy, forces, virial = squared_errors(predicted, batch, scale)
    return weights.energy * energy + weights.forces * forces + weights.stress * virial


def likelihood_loss(
    samples: Derived,
    batch: Batch,
    weights: LossSection,
    scale: Tensor,
    mean_weight: float,
    floor: float = 1e-3,
    beta: float = 0.5,
) -> Tensor:
    r"""Return the Gaussian negative log-likelihood of mean and spread over the samples, plus the mean's squared errors.

    ½(error²/σ² + ln σ²) with σ² the samples' variance (ddof 1) plus ``floor``² (in units of ``scale``), of energies per √N,
    force components and virials per √N. Source: Lakshminarayanan, Pritzel & Blundell, NeurIPS 2017, eq. 1. Each entry is
    weighted by :math:`\sigma^{2\beta}` over its mean, without gradient, so that entries of small σ do not drown the others
    (Seitzer, Tavakoli, Antic & Martius, ICLR 2022, eq. 5); ``beta`` 0 is the plain likelihood.
    """
    terms = residuals(samples, batch, scale)
    present = (batch.has_energy, batch.has_forces[batch.batch], batch.has_stress)
    loss = scale.new_zeros(())
    for error, has, weight in zip(terms, present, (weights.energy, weights.forces, weights.stress), strict=True):
        square = error.mean(0).square()
        variance = error.var(0, correction=1) + floor**2
        share = variance.detach() ** beta
        nll = 0.5 * (square / variance + variance.log()) * share / _mean(share, has).clamp(min=1e-12)
        loss = loss + weight * _mean(nll + mean_weight * square / _mean(square.detach(), has).clamp(min=floor**2), has)
    return loss


def _mean(values: Tensor, present: Tensor) -> Tensor:
    """Return the mean over the entries whose label is there."""
    mask = present.to(values.dtype).reshape(-1, *[1] * (values.dim() - 1)).expand_as(values)
    return (values * mask).sum() / mask.sum().clamp(min=1)
