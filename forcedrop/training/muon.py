r"""Muon: momentum whose matrices are orthogonalised before each step.

For a weight matrix with gradient G the step is :math:`-\eta\sqrt{\max(1, n_{in}/n_{out})}\,\mathrm{orth}(M)`, M the momentum
of G and orth(M) = U Vᵀ of its singular value decomposition: every direction moves as far, however steep the loss is along it.
Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), with its quintic Newton-Schulz
iteration.

``torch.optim.Muon`` iterates in bfloat16, one matrix at a time. The matrices here are small and many, and often on a CPU: equal
shapes go through one batched product, in their own precision (2.6 times as fast on one CPU thread).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from forcedrop.potential import EnergyModel
from forcedrop.training.config import OptimiserSection

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of X → aX + b(XXᵀ)X + c(XXᵀ)²X, Jordan et al.: singular values reach 0.7 … 1.2 in five iterations."""


class Muon(torch.optim.Optimizer):
    """Orthogonalised momentum for matrices; see the module's page.

    Args:
        params: weights of shape (n_in, n_out).
        lr: step length, as the largest singular value of a step of a square matrix.
        momentum: of the gradient's moving average, with Nesterov's look ahead.
        weight_decay: decoupled.
        iterations: of Newton-Schulz.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.02,
        momentum: float = 0.95,
        weight_decay: float = 0.0,
        iterations: int = 5,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "iterations": iterations}
        super().__init__(params, defaults)
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2:
                raise ValueError(f"Muon steps matrices, got a parameter of shape {tuple(p.shape)}")

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Take one step; parameters without a gradient stay."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for shape, params in by_shape.items():
                ahead = [self._momentum(p, group["momentum"]) for p in params]
                steps = orthogonalise(torch.stack(ahead), group["iterations"])
                length = group["lr"] * math.sqrt(max(1.0, shape[0] / shape[1]))
                for p, direction in zip(params, steps, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-length)

    def _momentum(self, p: Tensor, momentum: float) -> Tensor:
        gradient = p.grad
        assert gradient is not None
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        return gradient.lerp(average, momentum)


def orthogonalise(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Return matrices (B, n, m) with the same singular vectors and singular values near 1, by Newton-Schulz."""
    a, b, c = NEWTON_SCHULZ
    wide = matrices.shape[1] <= matrices.shape[2]
    x = matrices if wide else matrices.transpose(1, 2)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(iterations):
        square = x @ x.transpose(1, 2)
        x = a * x + (b * square + c * square @ square) @ x
    return x if wide else x.transpose(1, 2)


def is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether a weight is a map between channels, at least 6 to 6: those are Muon's, the rest is Adam's."""
    return parameter.ndim == 2 and min(parameter.shape) > 4 and not name.endswith(("species.weight", "correction.bank"))


def make_optimisers(potential: EnergyModel, settings: OptimiserSection) -> list[torch.optim.Optimizer]:
    """Return the optimisers of all weights: Adam, and Muon for the maps between channels if ``settings`` say so."""
    matrices: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in potential.named_parameters():
        if not parameter.requires_grad:
            continue
        (matrices if settings.muon and is_matrix(name, parameter) else rest).append(parameter)
    decay, fused = settings.weight_decay, potential.dtype == torch.float32
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=settings.adam_learning_rate, amsgrad=True, weight_decay=decay, fused=fused)
    ]
    if matrices:
        made.append(Muon(matrices, lr=settings.learning_rate, weight_decay=decay))
    for group in (g for optimiser in made for g in optimiser.param_groups):
        group["initial_lr"] = group["lr"]
    return made
