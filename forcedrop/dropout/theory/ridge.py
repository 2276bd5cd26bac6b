r"""In a linear model, inverted dropout of the inputs is a ridge penalty.

For :math:`m_j` independent, 0 with probability p, else 1/(1−p), of mean 1 and variance p/(1−p):

.. math:: \mathrm{E}_m \Big[\frac1N \sum_n |y_n - W (m_n \odot x_n)|^2\Big]
          = \frac1N \sum_n |y_n - W x_n|^2 + \frac{p}{1-p} \sum_j \overline{x_j^2} \sum_o W_{oj}^2

Sources: Srivastava et al., JMLR 15, 1929 (2014), section 9.1; Wager, Wang & Liang, NeurIPS 2013 (arXiv 1307.1493).
"""

from __future__ import annotations

import torch
from torch import Tensor

from forcedrop.dropout.checks import check_floating, check_rate


def ridge_penalty(weight: Tensor, second_moment: Tensor, p: float) -> Tensor:
    r"""Return :math:`\frac{p}{1-p} \sum_j \mathrm{E}[x_j^2] \sum_o w_{oj}^2`: what dropout adds to the squared error.

    For standardised inputs that is p/(1−p)·‖w‖². Weights of several outputs are grouped by the input they share. The squared
    error is summed over outputs and averaged over examples; ``torch.nn.functional.mse_loss`` also averages over outputs, so there
    divide by their number.

    Args:
        weight: shape (F,) or, as of ``torch.nn.Linear``, (O, F).
        second_moment: E[x_j²] of the inputs, not centred, shape (F,).
        p: the rate, in [0, 1).

    Raises:
        ValueError: if ``p`` is not in [0, 1), if shapes do not match, or if a second moment is negative.
    """
    if second_moment.dim() != 1 or weight.dim() not in (1, 2) or weight.shape[-1] != second_moment.shape[0]:
        raise ValueError(
            "`weight` must have the shape (F,) or (O, F) and `second_moment` (F,), "
            f"got {tuple(weight.shape)} and {tuple(second_moment.shape)}"
        )
    if bool((second_moment < 0).any()):
        raise ValueError(f"`second_moment` must not be negative, got {float(second_moment.min())}")
    p = check_rate(p)
    return p / (1 - p) * (second_moment * weight.square()).sum()


def dropout_ridge(x: Tensor, y: Tensor, p: float) -> Tensor:
    r"""Return the weights that minimise the squared error under dropout of the inputs, in expectation over all masks.

    :math:`W^\top = (X^\top X + \frac{p}{1-p} \mathrm{diag}(X^\top X))^{-1} X^\top Y`: the ridge whose penalty is
    :func:`ridge_penalty` with the second moments of ``x``. There is no bias: a column of ones would be dropped as well.

    Args:
        x: inputs, shape (N, F).
        y: targets, shape (N,) or (N, O).
        p: the rate, in [0, 1).

    Returns:
        Shape (F,), or (O, F) as the weight of ``torch.nn.Linear``.

    Raises:
        ValueError: if ``p`` is not in [0, 1), if shapes do not match, or if the solution is not unique (a feature that is always
            0; linearly dependent features and p = 0).
        TypeError: if an argument is not floating point.
    """
    check_floating(x, "dropout_ridge")
    check_floating(y, "dropout_ridge")
    if x.dim() != 2 or y.dim() not in (1, 2) or x.shape[0] != y.shape[0]:
        raise ValueError(
            f"`x` must have the shape (N, F), `y` (N,) or (N, O), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    p = check_rate(p)
    gram = x.mT @ x
    # features scaled to a unit second moment, so that "singular" does not depend on their units
    scale = gram.diagonal().sqrt()
    matrix = gram / (scale[:, None] * scale) + p / (1 - p) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor, info = torch.linalg.cholesky_ex(matrix)
    tolerance = x.shape[1] * torch.finfo(x.dtype).eps
    if int(info) or not bool((factor.diagonal().square() > tolerance).all()):
        raise ValueError(
            "the solution is not unique: a feature is always 0, or features depend linearly on each other and p = 0"
        )
    targets = x.mT @ (y if y.dim() == 2 else y[:, None])
    weight = (torch.cholesky_solve(targets / scale[:, None], factor) / scale[:, None]).mT
    return weight if y.dim() == 2 else weight[0]
