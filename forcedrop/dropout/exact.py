r"""Exact dropout: in front of a linear readout, each of K masks owns weights that are solved in closed form.

Ordinary Monte-Carlo dropout reads masked features with weights that were trained for all masks at once. Here each mask m
has the best weights w of its own, on the features that it keeps, 0 on the others:

.. math:: w_m = \arg\min_{w = m \odot w} \sum_i \frac{(y_i - w \cdot x_i)^2}{\sigma^2} + \lambda |w - w^*|^2
          = (H_{mm} + \lambda 1)^{-1} (H w^* + b + \lambda w^*)_m,

with the trained weights w*, H = Σ x xᵀ/σ² and b = Σ x (y − w*·x)/σ². Written with A = H + λ1 it is w*_m + A_mm⁻¹ A_md w*_d, d the
dropped features: the mean of the posterior, whose precision is A, on condition that the dropped weights are 0. p = 0 is ridge
regression, λ → ∞ the masks of the trained weights, which nothing makes up for. On top, a draw from the posterior given the mask,
C_mm⁻ᵀ ε with A_mm = C Cᵀ: a mixture of the posteriors of subnetworks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from forcedrop.dropout.checks import (
    LARGEST,
    check_flag,
    check_floating,
    check_integer,
    check_mask,
    check_number,
    check_rate,
    check_real,
    check_same_dtype,
    check_size,
    check_tensor,
)
from forcedrop.dropout.masks import check_table, kept, normal_noise, random_bits, site_key
from forcedrop.dropout.site import DropoutSite, inverted

SITE = "exact"
"""The name under which masks are drawn, whatever the layer's place in a network."""

_ROUNDING = 4 * torch.finfo(torch.float64).eps


def exact_masks(n: int, features: int, p: float, *, seed: int = 0, first: int = 0) -> Tensor:
    """Return which features masks ``first`` … ``first`` + n − 1 keep, boolean, shape (n, features), on the CPU.

    Mask k is a pure function of (seed, k): the same whatever ``n`` and ``first`` are.

    Args:
        n: number of masks, at least 1.
        features: bits of a mask, at least 1.
        p: probability of a feature to be dropped, in [0, 1).
        seed: another one gives other masks.
        first: index of the first mask, not negative.

    Raises:
        ValueError: if ``p`` is not in [0, 1), ``n`` or ``features`` is less than 1, or ``first`` is negative.
    """
    check_rate(p)
    n, features = check_integer(n, "n"), check_integer(features, "features")
    if n < 1 or features < 1:
        raise ValueError(f"`n` and `features` must be at least 1, got {n} and {features}")
    if check_integer(first, "first", high=2**62) < 0:
        raise ValueError(f"`first` must not be negative, got {first}")
    check_table(n, features, "masks")
    return kept(random_bits(site_key(seed, SITE), torch.arange(first, first + n), torch.arange(features)), p)


def exact_weights(
    precision: Tensor, pull: Tensor, keep: Tensor, *, draw: float = 0.0, noise: Tensor | None = None
) -> Tensor:
    r"""Return the weights :math:`A_{mm}^{-1} r_m` of every mask, shape (K, F) or (K, F, O), float64, 0 where it drops.

    With ``draw`` > 0 plus ``draw`` · C⁻ᵀ ε, where A_mm = C Cᵀ is the Cholesky decomposition: at 1 a draw from the posterior given
    the mask, of covariance A_mm⁻¹.

    Args:
        precision: A = H + λ1, prior included, symmetric, shape (F, F).
        pull: r = H w* + b + λw*, prior included, shape (F,), or (F, O) for O outputs that share A and the masks.
        keep: which weights each mask keeps, boolean, shape (K, F). A mask that keeps nothing has weights 0.
        draw: ratio of the noise, not negative.
        noise: standard normal numbers ε, of the result's shape; those of dropped weights are not looked at.

    Raises:
        TypeError: if ``keep`` is not boolean.
        ValueError: if shapes do not fit, ``precision`` is not symmetric, something is not finite, ``draw`` is negative or lacks
            its ``noise``, or the equations of a mask do not determine its weights.
    """
    _check_equations(precision, pull)
    draw = _check_ratio(draw)
    check_tensor(keep, "keep")
    if keep.dtype != torch.bool:
        raise TypeError(f"`keep` must be boolean, got {keep.dtype}")
    if keep.dim() != 2 or keep.shape[1] != len(pull):
        raise ValueError(f"`keep` must have shape (K, {len(pull)}), got {tuple(keep.shape)}")
    shape = (len(keep), *pull.shape)
    if noise is not None:
        check_real(noise, "the `noise` of exact_weights")
    if draw and (noise is None or tuple(noise.shape) != shape):
        got = None if noise is None else tuple(noise.shape)
        raise ValueError(f"`noise` must have shape {shape} where `draw` is not 0, got {got}")
    precision, keep = precision.double(), keep.to(precision.device)
    pull = pull.to(precision).reshape(len(pull), -1)
    epsilon = noise.to(precision).reshape(*keep.shape, -1) if draw and noise is not None else None
    # eigenvalues of principal blocks lie between those of the whole (Cauchy), so one look is mostly enough for all masks
    sound = _rank(precision) == len(precision)
    weights = []
    for k, mask in enumerate(keep):
        units = mask.nonzero().reshape(-1)
        block = precision.index_select(0, units).index_select(1, units)
        factor, failed = torch.linalg.cholesky_ex(block)
        if bool(failed) or not (sound or _rank(block) == len(units)):
            raise ValueError(
                f"mask {k} keeps {len(units)} weights, and its equations have rank {_rank(block)}:"
                " more labels, or a larger prior λ, determine them"
            )
        solved = torch.cholesky_solve(pull.index_select(0, units), factor)
        if epsilon is not None:
            ours = epsilon[k].index_select(0, units)
            solved = solved + draw * torch.linalg.solve_triangular(factor.mT, ours, upper=True)
        weights.append(torch.zeros_like(pull).index_copy(0, units, solved))
    return torch.stack(weights).reshape(shape) if weights else precision.new_zeros(shape)


class ExactDropout(DropoutSite):
    r"""Dropout and the linear layer behind it, where each of K functions has a mask and the best weights for it.

    Train it like ``nn.Dropout(p)`` and ``nn.Linear`` (or with ``p`` set to 0 meanwhile), then call :meth:`solve` with features
    and targets, or :meth:`fill` with normal equations. This fills a bank of K functions; function k reads with
    ``weight + bank[k]``. The bank is centred, so the mean over all K is the plain layer.

    What a call does, in this order:

    1. the call's ``mask`` multiplies the features, and the plain weights read them;
    2. frozen, with a filled bank: function k = the sample's index. Its seed is *not* looked at: the masks were drawn by the
       seed given to :meth:`fill`. An index may be an int, or a tensor: one index, or one for each row of the first axis;
    3. frozen with an empty bank, or in training with p > 0: inverted dropout, and the plain weights. Frozen, the mask has a
       bit for each feature and is the same along all other axes;
    4. else the plain weights.

    Weights that are trained further leave the bank as it was: :meth:`clear` it, or solve again.

    Args:
        features: F, size of the input's last axis.
        outputs: O, size of the output's last axis.
        p: the rate, probability of a feature to be dropped, in [0, 1).
        bias: whether to add a bias, which no mask drops and all functions share.

    Attributes:
        weight: the plain weights, shape (O, F), at first as those of ``nn.Linear``.
        bias: shape (O,), or None.
        bank: what function k's weights are beyond the plain ones, shape (K, O, F), K = 0 until it is filled; saved with
            the model.

    Raises:
        ValueError: if ``p`` is not in [0, 1), or ``features`` or ``outputs`` is less than 1.
    """

    bank: Tensor
    bias: nn.Parameter | None

    def __init__(self, features: int, outputs: int = 1, p: float = 0.3, *, bias: bool = True) -> None:
        super().__init__(p)
        features, outputs = (
            check_integer(features, "features", high=LARGEST),
            check_integer(outputs, "outputs", high=LARGEST),
        )
        if features < 1 or outputs < 1:
            raise ValueError(f"`features` and `outputs` must be at least 1, got {features} and {outputs}")
        check_table(outputs, features, "weights")
        linear = nn.Linear(features, outputs, bias=check_flag(bias, "bias"))
        self.weight = linear.weight
        self.register_parameter("bias", linear.bias)
        self.register_buffer("bank", torch.zeros(0, outputs, features))

    @property
    def n_functions(self) -> int:
        """How many functions the bank holds, 0 until it is filled."""
        return len(self.bank)

    @property
    def active(self) -> bool:
        """Whether a call without a mask would do anything but read with the plain weights."""
        if self._function is not None and self.n_functions:
            return bool(self.bank.any())
        return self._drops

    @property
    def _drops(self) -> bool:
        # not `super().active`, which torch.compile (2.13) takes for True whatever it is
        return (self.training or self._function is not None) and self.p > 0

    def check_samples(self, n: int) -> None:
        """Refuse more samples than a filled bank holds functions.

        Raises:
            ValueError: naming the number that it holds.
        """
        if 0 < self.n_functions < n:
            raise ValueError(
                f"the bank of ExactDropout holds {self.n_functions} functions, not {n}: `solve` or `fill` with a larger `n`"
                " makes more"
            )

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return a mask for the features ``x``, of values 0 and 1/(1−p), to be kept and given to later calls."""
        if self._function is None:
            return inverted(self.keep(x, x.shape, generator), self.p, x.dtype)
        lead = [x.shape[0], *[1] * (x.dim() - 2)] if x.dim() > 1 else []
        return inverted(self.keep(x, (*lead, x.shape[-1])), self.p, x.dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Read features, shape (…, F), and return (…, O).

        Raises:
            TypeError: if ``x`` is not floating point.
            ValueError: if it lacks the features, ``mask`` does not fit them, or a frozen sample is no function of the bank or
                does not fit its rows.
        """
        check_floating(x, "ExactDropout")
        features = self.weight.shape[1]
        if x.dim() < 1 or x.shape[-1] != features:
            raise ValueError(f"ExactDropout needs {features} features on the last axis, got shape {tuple(x.shape)}")
        check_same_dtype(x, self.weight, "ExactDropout")
        if mask is not None:
            x = x * check_mask(mask, x)
        elif self._function is not None and self.n_functions:
            return self._function_of_bank(x, self._function.sample)
        elif self._drops:
            if self._function is None and generator is None:
                x = functional.dropout(x, self.p, training=True)
            else:
                x = x * self.mask(x, generator)
        return functional.linear(x, self.weight, self.bias)

    def _function_of_bank(self, x: Tensor, sample: int | Tensor) -> Tensor:
        if not isinstance(sample, Tensor):
            if sample < 0:
                raise ValueError(f"a function's index must not be negative, got {sample}")
            self.check_samples(sample + 1)
            return functional.linear(x, self.weight + self.bank[sample], self.bias)
        sample = sample.to(self.bank.device)
        if sample.dim() == 0:  # `vmap` may run over it, so its value is torch's to check
            return functional.linear(x, self.weight + self._chosen(sample.reshape(1))[0], self.bias)
        if x.dim() < 2 or len(x) != len(sample):
            raise ValueError(f"{len(sample)} functions, one a row, do not fit features of shape {tuple(x.shape)}")
        y = torch.einsum("r...f,rof->r...o", x, self.weight + self._chosen(sample))
        return y if self.bias is None else y + self.bias

    def _chosen(self, samples: Tensor) -> Tensor:
        try:
            return self.bank.index_select(0, samples)
        except (IndexError, RuntimeError) as error:
            message = f"functions lie in [0, {self.n_functions}), the size of the bank of ExactDropout: {error}"
            raise ValueError(message) from error

    @torch.no_grad()
    def solve(
        self,
        features: Tensor,
        targets: Tensor,
        n: int = 64,
        *,
        prior: float | Tensor = 1.0,
        sigma: float | Tensor = 1.0,
        draw: float = 0.0,
        seed: int = 0,
        refit: bool = True,
    ) -> None:
        """Fill the bank with ``n`` functions by least squares of labels that are the layer's own output.

        All outputs share the masks. The bias is no part of them: with ``refit`` it is first set to the best one together with the
        plain weights (no prior pulls at it), else it stays. Solving again starts from the weights that are there by then.

        Args:
            features: the layer's inputs, shape (…, F).
            targets: what it should give, shape (…, O), or (…) for one output.
            n: number of functions, K.
            prior: λ, the precision of a prior of every weight around its present value; one for each feature by a tensor (F,).
            sigma: standard deviation of the targets' noise; one for each of them, of all outputs, by a tensor of shape (…).
            draw: noise from the posterior given the mask, as a multiple of its standard deviation.
            seed: of masks and noise; layers of one network want different ones, unless they are to share masks.
            refit: set the plain weights (and bias) to those without a mask: ridge regression.

        Raises:
            TypeError: if ``features`` or ``targets`` are not floating point.
            ValueError: if shapes do not fit, there are no rows, ``sigma`` is not positive, or as for :meth:`fill`.
        """
        outputs, size = self.weight.shape
        x, y = _table(features, size, "features"), _table(targets, outputs, "targets")
        if len(x) != len(y) or not len(x):
            raise ValueError(f"`features` and `targets` need equally many rows, 1 or more, got {len(x)} and {len(y)}")
        root = _numbers(sigma, "sigma", x.device).reshape(-1, 1)
        if len(root) not in (1, len(x)) or not bool((root.isfinite() & (root > 0)).all()):
            got = f"{len(root)}, the smallest {float(root.min())}" if len(root) else "none"
            raise ValueError(f"`sigma` must be positive and finite, one number or {len(x)}, got {got}")
        root = root.reciprocal().expand(len(x), 1)  # whitens the rows
        draw = _check_ratio(draw)
        bias = y.new_zeros(outputs) if self.bias is None else self.bias.to(y)
        if self.bias is not None and refit:
            centre_x, centre_y = ((root.square() * t).sum(0) / root.square().sum() for t in (x, y))
            centred, residual = root * (x - centre_x), root * (y - centre_y)
            plain = self._plain(centred.T @ centred, centred.T @ residual, prior)
            bias = centre_y - plain @ centre_x
        x, y = root * x, root * (y - bias)
        self.fill(x.T @ x, x.T @ y, n, prior=prior, draw=draw, seed=seed, refit=refit)
        if self.bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def fill(
        self,
        H: Tensor,
        pull: Tensor,
        n: int = 64,
        *,
        prior: float | Tensor = 1.0,
        draw: float = 0.0,
        seed: int = 0,
        refit: bool = True,
    ) -> None:
        r"""Fill the bank with ``n`` functions, from normal equations that the caller has summed up.

        With labels y of any kind that are linear in the weights, y = Jᵀw (outputs, their derivatives, sums of them), whitened by
        their noise: H = Σ J Jᵀ and pull = Σ J y = H w* + b, *without* the prior, which is added here, around the present
        weights w*. Of labels, subtract first what the weights do not make, such as the bias.

        Args:
            H: shape (F, F) for outputs that share it and the masks; or (O·F, O·F), a bit for each of the weights, in the order of
                ``weight.flatten()``.
            pull: shape (F, O), or (F,) for one output; with a joint H (O·F,).
            n: number of functions, K. Mask k does not depend on it; the mean of the bank, which is taken off, does.
            prior: λ, the precision of the prior; one for each row of H by a tensor.
            draw: noise from the posterior given the mask, as a multiple of its standard deviation.
            seed: of masks and noise; layers of one network want different ones, unless they are to share masks.
            refit: set the plain weights to those without a mask.

        Raises:
            ValueError: if shapes do not fit, H is not symmetric, something is not finite, ``n`` is less than 1, ``prior`` or
                ``draw`` is negative, or the equations of a mask do not determine its weights. The layer is then as before.
        """
        plain = self._plain(H, pull, prior) if refit else self.weight
        precision, pull = self._with_prior(H, pull, prior)
        draw, n = _check_ratio(draw), check_size(n, "n")
        noise = None
        if draw:
            noise = normal_noise(pull.numel(), seed=seed, samples=n, site=f"{SITE} draw", dtype=torch.float64)
            # in the order of `weight.flatten()`, so that joint and shared equations have the same noise
            noise = self._by_output(noise).mT if pull.dim() == 2 else noise
        keep = exact_masks(n, len(precision), self.p, seed=seed)
        weights = exact_weights(precision, pull, keep, draw=draw, noise=noise)
        weights = weights.mT if pull.dim() == 2 else self._by_output(weights)
        deviation = weights - weights[0]  # so that equal functions differ by 0, not by rounding
        deviation -= deviation.mean(0)
        self.weight.copy_(plain)
        self.bank = deviation.to(self.weight)

    def clear(self) -> None:
        """Empty the bank; the plain weights stay."""
        self.bank = self.bank.new_zeros(0, *self.weight.shape)

    def _by_output(self, flat: Tensor) -> Tensor:
        return flat.reshape(-1, *self.weight.shape)

    def _plain(self, H: Tensor, pull: Tensor, prior: float | Tensor) -> Tensor:
        """Return the weights without a mask, shape (O, F), float64."""
        precision, pull = self._with_prior(H, pull, prior)
        everything = torch.ones(1, len(pull), dtype=torch.bool)
        weights = exact_weights(precision, pull, everything)[0]
        return weights.mT if pull.dim() == 2 else weights.reshape(self.weight.shape)

    def _with_prior(self, H: Tensor, pull: Tensor, prior: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return A and r, float64, the latter of shape (F, O) or, of joint equations, (O·F,)."""
        (outputs, features), size = self.weight.shape, self.weight.numel()
        check_real(H, "the `H` of ExactDropout.fill")
        check_real(pull, "the `pull` of ExactDropout.fill")
        if outputs == 1 and tuple(pull.shape) == (features,):
            pull = pull[:, None]
        joint = tuple(pull.shape) == (size,)
        wanted = size if joint else features
        if tuple(H.shape) != (wanted, wanted) or not (joint or tuple(pull.shape) == (features, outputs)):
            raise ValueError(
                f"`H` and `pull` must have shapes {(features, features)} and {(features, outputs)}, or {(size, size)} and"
                f" {(size,)}, got {tuple(H.shape)} and {tuple(pull.shape)}"
            )
        strength = _numbers(prior, "prior", H.device)
        if tuple(strength.shape) not in ((), (wanted,)) or not bool((strength.isfinite() & (strength >= 0)).all()):
            got = float(strength) if strength.dim() == 0 else f"shape {tuple(strength.shape)}"
            raise ValueError(f"`prior` must be finite and not negative, one number or {wanted}, got {got}")
        strength = strength.expand(wanted)
        present = self.weight.to(strength)
        towards = strength * present.flatten() if joint else strength[:, None] * present.T
        return H.double() + torch.diag(strength), pull.to(towards) + towards

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """Take banks of any size."""
        saved = state_dict.get(f"{prefix}bank")
        if isinstance(saved, Tensor) and saved.shape[1:] == self.bank.shape[1:] and len(saved) != len(self.bank):
            self.bank = self.bank.new_zeros(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Say sizes, rate and how many functions there are."""
        outputs, features = self.weight.shape
        return f"{features}, {outputs}, p={self.p}, bias={self.bias is not None}, functions={self.n_functions}"


def _check_equations(precision: Tensor, pull: Tensor) -> None:
    check_real(precision, "the precision of normal equations")
    check_real(pull, "the pull of normal equations")
    if precision.dim() != 2 or precision.shape[0] != precision.shape[1] or not len(precision):
        raise ValueError(f"the precision must have shape (F, F), got {tuple(precision.shape)}")
    if pull.dim() not in (1, 2) or len(pull) != len(precision):
        size = len(precision)
        raise ValueError(f"the pull must have shape ({size},) or ({size}, O), got {tuple(pull.shape)}")
    if not bool(precision.isfinite().all() and pull.isfinite().all()):
        raise ValueError("normal equations must be finite: an entry is NaN or infinite")
    if float((precision - precision.mT).abs().max()) > 1e-5 * float(precision.abs().max()):
        raise ValueError("the precision must be symmetric")


def _check_ratio(draw: float) -> float:
    draw = check_number(draw, "draw")
    if not 0 <= draw < math.inf:
        raise ValueError(f"`draw` must be finite and not negative, got {draw}")
    return draw


def _numbers(value: float | Tensor, name: str, device: torch.device) -> Tensor:
    """Return one number, or a tensor of them, in float64."""
    if not isinstance(value, Tensor):
        value = torch.tensor(check_number(value, name))
    elif value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name} must hold real numbers, got {value.dtype}")
    return value.detach().to(device, torch.float64)


def _table(values: Tensor, columns: int, what: str) -> Tensor:
    """Return ``values`` as float64 rows of ``columns`` numbers."""
    check_real(values, f"ExactDropout.solve (`{what}`)")
    if what == "targets" and columns == 1 and (values.dim() < 2 or values.shape[-1] != 1):
        values = values[..., None]
    if values.dim() < 2 or values.shape[-1] != columns:
        raise ValueError(f"`{what}` must have shape (…, {columns}), got {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        raise ValueError(f"`{what}` must be finite: an entry is NaN or infinite")
    return values.reshape(-1, columns).double()


def _rank(precision: Tensor) -> int:
    """Return the rank of a symmetric matrix up to rounding, whatever the units of its rows are."""
    if not len(precision):
        return 0
    scale = precision.diagonal().clamp_min(0).rsqrt().nan_to_num(posinf=0.0)
    levels = torch.linalg.eigvalsh(precision * scale * scale[:, None])
    return int((levels > _ROUNDING * math.sqrt(len(levels)) * levels[-1].clamp_min(0)).sum())
