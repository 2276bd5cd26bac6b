"""One step's numbers from plain tensors: loss, statistics and the gradients of the weights. No state, no waiting for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from forcedrop.derive import Derived, derive_pairs, derive_pairs_samples
from forcedrop.potential import READOUT_SHIFT, GraphInputs, Potential
from forcedrop.sampling import reduce_samples
from forcedrop.training.config import LossSection
from forcedrop.training.losses import Targets, likelihood_loss, plain_loss, squared_errors


class StepInputs(NamedTuple):
    """What a step needs of a batch.

    Attributes:
        vec: pair vectors [Å], shape (N, M, 3).
        graph: the neighbour lists.
        masks: by site; in stage two with the sample axis first; empty for the plain network.
        target: the labels.
        ramp: factor of the weights of energy and stress, a tensor without dimensions.
    """

    vec: Tensor
    graph: GraphInputs
    masks: dict[str, Tensor]
    target: Targets
    ramp: Tensor


class StepResult(NamedTuple):
    """What a step gives; sums over the shares of a batch are the whole batch's.

    Attributes:
        values: mean squared error of the energy [eV²] and of force components [eV²/Å²], nan without labels, and the loss; shape
            (3,).
        gradients: of the weights, in the order of ``Objective.weights``; None where the loss does not depend on a weight.
    """

    values: Tensor
    gradients: tuple[Tensor | None, ...]


Step = Callable[[StepInputs], StepResult]


class Objective(nn.Module):
    """What a stage minimises, as a module, so that its weights can be handed in from outside.

    Args:
        potential: the network.
        loss: weights of the terms.
        scale: unit of the errors [eV/Å], a tensor without dimensions.
        mean_weight: of stage two, see ``likelihood_loss``; None for squared errors.
        reduce: sums over the shares of a batch.
    """

    scale: Tensor

    def __init__(
        self,
        potential: Potential,
        loss: LossSection,
        scale: Tensor,
        mean_weight: float | None = None,
        reduce: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> None:
        super().__init__()
        self.potential, self.loss, self.mean_weight, self.reduce = potential, loss, mean_weight, reduce
        self.register_buffer("scale", scale, persistent=False)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The weights of the network."""
        return list(self.potential.parameters())

    def forward(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Return the loss and, without gradient, ``StepResult.values``."""
        vec, graph, masks, target, ramp = inputs
        if self.mean_weight is None:
            derived = derive_pairs(self.potential, graph, vec, target.volume, masks, create_graph=True)
            loss = plain_loss(derived, target, self.loss, self.scale, ramp)
            mean = Derived(*(x.detach() for x in derived))
        else:
            if n_heads := self.potential.config.n_heads:
                masks = {**masks, READOUT_SHIFT: self.potential.shifts(n_heads)}
            samples = derive_pairs_samples(self.potential, graph, vec, target.volume, masks)
            loss = likelihood_loss(samples, target, self.loss, self.scale, self.mean_weight, reduce=self.reduce)
            mean = reduce_samples(Derived(*(x.detach() for x in samples))).mean
        return loss, self._values(mean, target, loss.detach())

    def _values(self, mean: Derived, target: Targets, loss: Tensor) -> Tensor:
        squares = ((mean.energy - target.energy).square() * target.has_energy).sum()
        _, forces, _ = squared_errors(mean, target, self.scale)
        nothing = torch.where(target.counts > 0, 0.0, torch.nan)
        energy = (squares / target.counts[0].clamp(min=1)).to(loss.dtype) + nothing[0]
        return torch.stack([energy, forces * self.scale**2 + nothing[1], loss]).to(loss.dtype)


def eager_step(objective: Objective) -> Step:
    """Return the step as PyTorch runs it, operation by operation."""

    def step(inputs: StepInputs) -> StepResult:
        loss, values = objective(inputs)
        return StepResult(values, torch.autograd.grad(loss, objective.weights, allow_unused=True))

    return step
