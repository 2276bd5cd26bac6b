"""K functions of one network, and one reduction over them for every property."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from forcedrop.derive import Derived, derive, derive_functions
from forcedrop.graph import AtomicGraph, Batch, batch_graphs, group_by_atoms
from forcedrop.potential import EnergyModel

MAX_MEMORY = 2.0
"""What the functions may take by default [GiB]."""


class Prediction(NamedTuple):
    """Mean and spread over functions, and the functions; each field is a :class:`~forcedrop.derive.Derived`.

    Attributes:
        mean: over all functions of the bank, whatever K was asked for, where these differ in the weights of features alone (it is
            the plain network); else over the K functions.
        std: raw standard deviation over the functions that were computed (ddof 1), not calibrated.
        samples: the functions, sample axis first: K of forces and stress; of energies the whole bank, where they need no way
            back.
    """

    mean: Derived
    std: Derived
    samples: Derived


def each(function: Callable[[Tensor], Tensor], derived: Derived) -> Derived:
    """Apply one function to every property: the one place where samples are reduced."""
    return Derived(*(function(x) for x in derived))


def reduce_samples(samples: Derived, mean: Derived | None = None) -> Prediction:
    """Return mean, unless it is known, and standard deviation over the first axis.

    Raises:
        ValueError: if there are fewer than two samples: one has no spread.
    """
    k = samples.forces.shape[0]
    if k < 2:
        raise ValueError(f"error bars need at least 2 samples, got {k}")
    mean = each(lambda x: x.mean(0), samples) if mean is None else mean
    return Prediction(mean, each(lambda x: x.std(0, correction=1), samples), samples)


def samples_at_once(potential: EnergyModel, batch: Batch, max_memory: float = MAX_MEMORY) -> int:
    """Return how many functions of a batch can be computed at once in ``max_memory`` [GiB], at least 1.

    Raises:
        ValueError: if the memory is not positive.
    """
    if not max_memory > 0:
        raise ValueError(f"`max_memory` must be positive [GiB], got {max_memory}")
    size = potential.bytes_per_function(batch.num_nodes, batch.nbr.shape[1])
    return max(1, int(max_memory * 2**30 / max(size, 1)))


def require_functions(potential: EnergyModel, n_samples: int = 2) -> None:
    """Say so if a network has not so many functions.

    Raises:
        ValueError: if there are none, fewer than are asked for, or fewer than two are asked for.
    """
    if n_samples < 2:
        raise ValueError(f"error bars need at least 2 samples, got {n_samples}")
    known = potential.n_functions
    if known == 0:
        raise ValueError(
            "this network has no bank of functions and no dropout site with a rate above 0: it cannot give error bars. "
            "`forcedrop fill MODEL --data FRAMES --held-out FRAMES` finds functions for a trained one"
        )
    if known is not None and n_samples > known:
        raise ValueError(
            f"the model's bank holds {known} functions, asked for {n_samples}; "
            f"`forcedrop fill MODEL --data FRAMES --held-out FRAMES --functions {n_samples}` makes a larger one"
        )


def predict(
    potential: EnergyModel, batch: Batch, *, n_samples: int = 16, seed: int = 0, max_memory: float = MAX_MEMORY
) -> Prediction:
    """Return mean and spread over the first K functions of a network.

    Args:
        potential: a network with a bank of functions, or with dropout sites.
        batch: from ``forcedrop.graph.batch_graphs``.
        n_samples: K ≥ 2.
        seed: of masks that are drawn; the functions of a bank are what they are.
        max_memory: [GiB]; as many functions are computed at once as fit, at least one.

    Raises:
        ValueError: if K < 2, there are not so many functions, or the memory is not positive.
    """
    require_functions(potential, n_samples)
    step = min(n_samples, samples_at_once(potential, batch, max_memory))
    plain, parts = None, []
    with torch.no_grad():
        for first in range(0, n_samples, step):
            plain, part = derive_functions(potential, batch, range(first, min(first + step, n_samples)), seed)
            parts.append(part)
        joined = Derived(*(torch.cat(x) for x in zip(*parts, strict=True)))
        if plain is not None:  # every part has the energies of the whole bank
            joined = joined._replace(energy=parts[0].energy, energies=parts[0].energies)
        return reduce_samples(joined, plain)


@dataclass(frozen=True)
class FramePrediction:
    """The prediction for one structure as numpy arrays; units and orders as in :class:`~forcedrop.derive.Derived`.

    Attributes:
        mean: means by property: ``energy`` float, ``energies`` (N,), ``forces`` (N, 3), ``stress`` (6,).
        std: raw standard deviations by property, same shapes.
        plain: the plain (weight-scaled) network's values by property.
        samples: the samples by property, sample axis first; empty where they were not kept.
        sigma: calibrated standard deviations by property; None without a calibration.
        n_samples: of how many functions forces and stress have their σ.
    """

    mean: dict[str, np.ndarray]
    std: dict[str, np.ndarray]
    plain: dict[str, np.ndarray]
    samples: dict[str, np.ndarray] = field(default_factory=dict)
    sigma: dict[str, np.ndarray] | None = None
    n_samples: int = 0

    @property
    def error_bars(self) -> dict[str, np.ndarray]:
        """σ by property; without a calibration the raw standard deviations."""
        return self.std if self.sigma is None else self.sigma


def predict_graphs(
    potential: EnergyModel,
    graphs: Sequence[AtomicGraph],
    *,
    n_samples: int = 16,
    seed: int = 0,
    batch_atoms: int = 256,
) -> Iterator[FramePrediction]:
    """Yield the prediction for each graph, in order; as many structures at once as fit in ``batch_atoms``."""
    for group in group_by_atoms(graphs, batch_atoms):
        batch = batch_graphs(group).to(potential.device)
        prediction = predict(potential, batch, n_samples=n_samples, seed=seed)
        plain = prediction.mean if potential.centred else derive(potential, batch)
        parts = [_split(values, batch) for values in (prediction.mean, prediction.std, plain, prediction.samples)]
        for mean, std, single, samples in zip(*parts, strict=True):
            yield FramePrediction(mean, std, single, samples, n_samples=n_samples)


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
