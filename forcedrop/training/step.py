"""One step's numbers from plain tensors: loss, statistics and the gradients of the weights. No state, no waiting for a GPU."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from forcedrop.derive import Derived, derive_pairs
from forcedrop.dropout import frozen
from forcedrop.potential import EnergyModel, GraphInputs
from forcedrop.training.config import LossSection
from forcedrop.training.losses import Targets, plain_loss, squared_errors


class StepInputs(NamedTuple):
    """What a step needs of a batch.

    Attributes:
        vec: pair vectors [Å], shape (N, M, 3).
        graph: the neighbour lists.
        functions: index of the function that each atom's structure takes, shape (N,); None for the plain network.
        target: the labels.
        ramp: factor of the weights of energy and stress, a tensor without dimensions.
    """

    vec: Tensor
    graph: GraphInputs
    functions: Tensor | None
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
    """What is minimised, as a module, so that its weights can be handed in from outside.

    Args:
        potential: the network.
        loss: weights of the terms.
        scale: unit of the errors [eV/Å], a tensor without dimensions.
        seed: of the functions.
    """

    scale: Tensor

    def __init__(self, potential: EnergyModel, loss: LossSection, scale: Tensor, seed: int = 0) -> None:
        super().__init__()
        self.potential, self.loss, self.seed = potential, loss, seed
        self.register_buffer("scale", scale, persistent=False)

    @property
    def weights(self) -> list[nn.Parameter]:
        """The weights of the network."""
        return [weight for weight in self.potential.parameters() if weight.requires_grad]

    def forward(self, inputs: StepInputs) -> tuple[Tensor, Tensor]:
        """Return the loss and, without gradient, ``StepResult.values``."""
        vec, graph, functions, target, ramp = inputs
        dropped = nullcontext() if functions is None else frozen(self.potential, self.seed, functions)
        with dropped:
            derived = derive_pairs(self.potential, graph, vec, target.volume)
        loss = plain_loss(derived, target, self.loss, self.scale, ramp)
        return loss, self._values(Derived(*(x.detach() for x in derived)), target, loss.detach())

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
