"""K functions from one network: drawing masks and readouts, and one reduction over the samples for every property."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch_geometric.data import Batch

from forcedrop.derive import Derived, derive, derive_samples
from forcedrop.dropout import edge_mask, feature_mask, normal_noise
from forcedrop.graph import AtomicGraph, batch_graphs, group_by_atoms
from forcedrop.potential import READOUT_SHIFT, Potential, require_samples
from forcedrop.potential.pullback import late_sites

MAX_MEMORY = 2.0
"""What the samples may take by default [GiB]."""


class Prediction(NamedTuple):
    """K samples and their two first moments; each field is a :class:`~forcedrop.derive.Derived`.

    Attributes:
        mean: mean over the samples.
        std: raw standard deviation over the samples (ddof 1), not calibrated.
        samples: the samples, sample axis first.
    """

    mean: Derived
    std: Derived
    samples: Derived


def draw_masks(potential: Potential, batch: Batch, seed: int, samples: int | Sequence[int]) -> dict[str, Tensor]:
    """Return the masks of K samples for every site of a network: pure functions of (seed, sample, site).

    Feature masks have shape (K, C). Edge masks, (K, N, M), depend on the pair alone: atoms' places in their own structure and
    the relative cell shift, not on the batch. Empty for a network without dropout sites.
    """
    masks = {}
    dtype, device = batch.pos.dtype, batch.pos.device
    for site in potential.sites:
        if site.n_channels:
            masks[site.name] = feature_mask(
                site.rate,
                site.n_channels,
                seed=seed,
                samples=samples,
                site=site.name,
                dtype=dtype,
                device=device,
            )
        else:
            local = torch.arange(batch.num_nodes, device=device) - batch.ptr[batch.batch]
            centre = local[:, None].expand_as(batch.nbr)
            pairs = torch.stack([centre.reshape(-1), local[batch.nbr].reshape(-1)])
            mask = edge_mask(
                site.rate,
                pairs,
                batch.nbr_shift.flatten(0, 1),
                seed=seed,
                samples=samples,
                site=site.name,
                dtype=dtype,
            )
            masks[site.name] = mask.unflatten(1, batch.nbr.shape)
    return masks


def draw_shifts(potential: Potential, seed: int, n_samples: int) -> Tensor | None:
    """Return what K samples add to the readouts, shape (K, F): draws from their posterior or learned heads; None without.

    Their own mean is taken off, so that they leave the mean over the samples where the plain readouts have it.
    """
    if potential.heads is not None:
        return potential.shifts(n_samples)
    if potential.posterior is None:
        return None
    root = potential.posterior
    noise = normal_noise(len(root), seed=seed, samples=n_samples, site=READOUT_SHIFT, dtype=torch.float64)
    return ((noise - noise.mean(0)) @ root.double().cpu().T).to(root)


def each(function: Callable[[Tensor], Tensor], derived: Derived) -> Derived:
    """Apply one function to every property: the one place where samples are reduced."""
    return Derived(*(function(x) for x in derived))


def reduce_samples(samples: Derived) -> Prediction:
    """Return mean and standard deviation over the first axis.

    Raises:
        ValueError: if there are fewer than two samples: one has no spread.
    """
    k = samples.energy.shape[0]
    if k < 2:
        raise ValueError(f"error bars need at least 2 samples, got {k}")
    mean = each(lambda x: x.mean(0), samples)
    return Prediction(mean, each(lambda x: x.std(0, correction=1), samples), samples)


def samples_at_once(potential: Potential, batch: Batch, max_memory: float = MAX_MEMORY) -> int:
    """Return how many samples of a batch can be computed at once in ``max_memory`` [GiB], at least 1.

    What a sample keeps on the way back through the layers: per atom and channel so many numbers for each of its M neighbours, and
    for its own tensors. With masks further within the network, automatic differentiation keeps the way there as well.

    Raises:
        ValueError: if the memory is not positive.
    """
    if not max_memory > 0:
        raise ValueError(f"`max_memory` must be positive [GiB], got {max_memory}")
    config = potential.config
    tensors, degrees = (config.l_features + 1) ** 2, config.l_features + 1
    if {site.name for site in potential.sites} - late_sites(potential):
        slots = degrees * (config.l_max + 1) + 4 * tensors
        per_atom = config.n_layers * (batch.nbr.shape[1] * slots + 12 * 50)
    else:
        per_atom = batch.nbr.shape[1] * degrees + 4 * tensors + 4 * config.n_layers
    size = batch.num_nodes * config.n_channels * per_atom * batch.pos.element_size()
    return max(1, int(max_memory * 2**30 / max(size, 1)))


def predict(
    potential: Potential, batch: Batch, *, n_samples: int = 16, seed: int = 0, max_memory: float = MAX_MEMORY
) -> Prediction:
    """Return the Monte-Carlo-dropout prediction of a batch.

    Args:
        potential: a network with dropout sites, or a posterior of its readouts.
        batch: from ``forcedrop.graph.batch_graphs``.
        n_samples: K ≥ 2.
        seed: of the masks; the same (seed, K) gives the same bits.
        max_memory: [GiB]; as many samples are computed at once as fit, at least one.

    Raises:
        ValueError: if K < 2, there is nothing to sample, or the memory is not positive.
    """
    if n_samples < 2:
        raise ValueError(f"error bars need at least 2 samples, got {n_samples}")
    require_samples(potential)
    parts = []
    step = min(n_samples, samples_at_once(potential, batch, max_memory))
    shifts = draw_shifts(potential, seed, n_samples)
    with torch.no_grad():
        for first in range(0, n_samples, step):
            masks = draw_masks(potential, batch, seed, range(first, min(first + step, n_samples)))
            if shifts is not None:
                masks[READOUT_SHIFT] = shifts[first : first + step]
            parts.append(derive_samples(potential, batch, masks))
        return reduce_samples(Derived(*(torch.cat(x) for x in zip(*parts, strict=True))))


@dataclass(frozen=True)
class FramePrediction:
    """The prediction for one structure as numpy arrays; units and orders as in :class:`~forcedrop.derive.Derived`.

    Attributes:
        mean: means over the samples by property: ``energy`` float, ``energies`` (N,), ``forces`` (N, 3), ``stress`` (6,).
        std: raw standard deviations by property, same shapes.
        plain: the plain (weight-scaled) network's values by property.
        samples: the samples by property, sample axis first; empty where they were not kept.
        sigma: calibrated standard deviations by property; None without a calibration.
    """

    mean: dict[str, np.ndarray]
    std: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    sigma: dict[str, np.ndarray] | None = None

    @property
    def error_bars(self) -> dict[str, np.ndarray]:
        """σ by property; without a calibration the raw standard deviations."""
        return self.std if self.sigma is None else self.sigma


class Predictor(Protocol):
    """Anything that has K functions: what errors, calibration and comparisons need of it."""

    def __call__(self, batch: Batch) -> tuple[Prediction, Derived]:
        """Return the prediction of the K functions, and that of one plain pass that stands for their mean."""
        ...


def sampled(potential: Potential, n_samples: int, seed: int) -> Predictor:
    """Return the predictor of one network with its masks and draws, see :func:`predict`."""

    def predictor(batch: Batch) -> tuple[Prediction, Derived]:
        return predict(potential, batch, n_samples=n_samples, seed=seed), derive(potential, batch)

    return predictor


def committee(potentials: Sequence[Potential]) -> Predictor:
    """Return the predictor of a deep ensemble: each network is one function, without masks; the plain pass is their mean.

    Source: Lakshminarayanan, Pritzel & Blundell, NeurIPS 2017, arXiv 1612.01474.
    """

    def predictor(batch: Batch) -> tuple[Prediction, Derived]:
        members = [derive(potential, batch) for potential in potentials]
        prediction = reduce_samples(Derived(*(torch.stack(x) for x in zip(*members, strict=True))))
        return prediction, prediction.mean

    return predictor


def predict_graphs(
    predictor: Predictor,
    graphs: Sequence[AtomicGraph],
    device: torch.device | str = "cpu",
    *,
    batch_atoms: int = 256,
) -> Iterator[FramePrediction]:
    """Yield the prediction for each graph, in order; as many structures at once as fit in ``batch_atoms``."""
    for group in group_by_atoms(graphs, batch_atoms):
        batch = batch_graphs(group).to(device)
        prediction, plain = predictor(batch)
        parts = [_split(values, batch) for values in (prediction.mean, prediction.std, plain, prediction.samples)]
        for mean, std, single, samples in zip(*parts, strict=True):
            yield FramePrediction(mean, std, single, samples)


def _split(values: Derived, batch: Batch) -> list[dict[str, np.ndarray]]:
    """Cut the values of a batch into structures; axes before those of the batch stay."""
    arrays = {k: v.to("cpu", torch.float64).numpy() for k, v in values._asdict().items()}
    first = batch.ptr.tolist()
    return [
        {
            "energy": arrays["energy"][..., b],
            "energies": arrays["energies"][..., first[b] : first[b + 1]],
            "forces": arrays["forces"][..., first[b] : first[b + 1], :],
            "stress": arrays["stress"][..., b, :],
        }
        for b in range(batch.num_graphs)
    ]
