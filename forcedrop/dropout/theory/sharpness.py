"""How sharp a minimum is: the largest eigenvalue of the Hessian, and the loss along filter-normalised random directions.

Both take the loss as a function without arguments that reads the parameters, as ``lambda: loss(model(x), y)``. Which loss that
is decides what is found: with dropout off it is the plain loss; under ``forcedrop.dropout.frozen`` that of one function; the
mean over samples is the regularised one. It must be deterministic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class HessianEigenvalue(NamedTuple):
    """A Ritz value.

    Attributes:
        value: the estimate, from below.
        residual: some eigenvalue of the Hessian is within this distance of ``value``; more iterations make it smaller.
    """

    value: float
    residual: float


def largest_hessian_eigenvalue(
    loss_fn: Callable[[], Tensor],
    params: Iterable[Tensor],
    iterations: int = 50,
    generator: torch.Generator | None = None,
) -> HessianEigenvalue:
    """Return the largest (most positive) eigenvalue of the Hessian of ``loss_fn`` in ``params``, by the Lanczos method.

    Each iteration is one product of the Hessian with a vector (Pearlmutter, Neural Comput. 6, 147 (1994)): two backward passes.
    All Lanczos vectors are kept and orthogonalised against, in float64; as many iterations as parameters are exact. Source:
    Golub & Van Loan, Matrix Computations, chapter 10.

    Args:
        loss_fn: returns the loss, a tensor without axes; called once.
        params: the tensors it is differentiated in; their ``grad`` is left alone.
        iterations: at most this many.
        generator: for the first vector.

    Raises:
        ValueError: if there are no parameters, if one does not require a gradient, if the loss is not one number, or if
            ``iterations`` is not positive.
    """
    params = _differentiable(params)
    if iterations < 1:
        raise ValueError(f"`iterations` must be at least 1, got {iterations}")
    loss = loss_fn()
    if loss.numel() != 1:
        raise ValueError(f"`loss_fn` must return one number, got shape {tuple(loss.shape)}")
    gradient = _flat(torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True))
    if not gradient.requires_grad:  # the loss is linear
        return HessianEigenvalue(0.0, 0.0)

    def product(vector: Tensor) -> Tensor:
        vector = vector.to(gradient.dtype)
        return _flat(torch.autograd.grad(gradient, params, vector, retain_graph=True, materialize_grads=True)).double()

    start = _normal(gradient.detach(), generator).double()
    return _lanczos(product, start, min(iterations, gradient.numel()))


def _lanczos(product: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> HessianEigenvalue:
    basis = (start / start.norm())[None]
    diagonal: list[float] = []
    off_diagonal: list[float] = []
    for _ in range(iterations):
        vector = product(basis[-1])
        diagonal.append(float(basis[-1] @ vector))
        size = float(vector.norm())
        for _ in range(2):  # twice is enough (Parlett, The Symmetric Eigenvalue Problem, section 6.9)
            vector = vector - basis.T @ (basis @ vector)
        off_diagonal.append(float(vector.norm()))
        if off_diagonal[-1] <= 1e-12 * size:  # the subspace is invariant: its eigenvalues are exact
            break
        basis = torch.cat([basis, (vector / off_diagonal[-1])[None]])
    inner = torch.tensor(off_diagonal[:-1], dtype=torch.float64)
    tridiagonal = torch.tensor(diagonal, dtype=torch.float64).diag() + inner.diag(1) + inner.diag(-1)
    values, vectors = torch.linalg.eigh(tridiagonal)
    return HessianEigenvalue(float(values[-1]), off_diagonal[-1] * abs(float(vectors[-1, -1])))


def filter_normalised_direction(params: Iterable[Tensor], generator: torch.Generator | None = None) -> list[Tensor]:
    """Return a random direction, a tensor per parameter, each filter of which has the norm of the parameter's filter.

    A filter is an entry of the first axis: all weights into one output. Parameters with fewer than two axes (biases, the scales
    of norms) are not moved: their direction is 0. Source: Li et al., NeurIPS 2018 (arXiv 1712.09913), section 4; leaving those
    parameters out is the choice of the authors' code.
    """
    directions = []
    for param in params:
        values = param.detach()
        if values.dim() < 2:
            directions.append(torch.zeros_like(values))
            continue
        noise = _normal(values, generator)
        axes = tuple(range(1, values.dim()))
        norms = [torch.linalg.vector_norm(tensor, dim=axes, keepdim=True) for tensor in (values, noise)]
        directions.append(noise * (norms[0] / norms[1]))
    return directions


def perturbation_profile(
    loss_fn: Callable[[], Tensor | float],
    params: Iterable[Tensor],
    radii: Sequence[float],
    directions: int = 10,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the loss at distances ``radii`` along random filter-normalised directions, shape (directions, len(radii)), float64.

    A radius of 1 moves each filter by as much as its own norm, so that profiles of networks with rescaled weights can be
    compared. See :func:`filter_normalised_direction` for the source and for what is moved.

    Args:
        loss_fn: returns the loss; called once per direction and radius, without gradients. Networks with batch norm belong in
            evaluation mode.
        params: the parameters it reads; moved for as long as it takes, then set back to the same bits, also by an error.
        radii: any numbers, also 0 and negative ones.
        directions: how many.
        generator: for the directions.

    Raises:
        ValueError: if there are no parameters with two or more axes, or if ``directions`` is not positive.
    """
    params = list(params)
    if not any(param.dim() >= 2 for param in params):
        raise ValueError(f"`params` must have a tensor of 2 axes or more to be moved, got shapes {_shapes(params)}")
    if directions < 1:
        raise ValueError(f"`directions` must be at least 1, got {directions}")
    before = [param.detach().clone() for param in params]
    losses = torch.empty(directions, len(radii), dtype=torch.float64)
    with torch.no_grad():
        try:
            for row in losses:
                direction = filter_normalised_direction(before, generator)
                for column, radius in enumerate(radii):
                    for param, origin, step in zip(params, before, direction, strict=True):
                        param.copy_(origin + radius * step)
                    row[column] = float(loss_fn())
        finally:
            for param, origin in zip(params, before, strict=True):
                param.copy_(origin)
    return losses


def _differentiable(params: Iterable[Tensor]) -> list[Tensor]:
    params = list(params)
    if not params or not all(param.requires_grad for param in params):
        raise ValueError(f"`params` must be one or more tensors that require a gradient, got shapes {_shapes(params)}")
    return params


def _shapes(params: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(param.shape) for param in params]


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
