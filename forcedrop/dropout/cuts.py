r"""Edge dropout as a function of what a pair *is*: its kind and its distance.

One bit per pair of nodes belongs to their numbers: it breaks the symmetry under permutations, and its noise averages away in
large systems. Here each kind of pair (two chemical elements, say) has a cut radius ρ: with probability p drawn uniformly from
[a, c], else none. Beyond it edges fade out over a width w,

.. math:: f(r) = \frac{1 - S\big((r-\rho)/w\big)}{1 - p F(r)}, \qquad S(t) = 6t^5 - 15t^4 + 10t^3 \text{ on } [0, 1],

divided by their mean, as inverted dropout is: :math:`F(r) = \frac{1}{c-a}\int_a^c S((r-\rho)/w)\,d\rho`. A draw is a smooth
function of the distances, blind to the order of nodes, and the same for two copies of a system as for one.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from forcedrop.dropout.checks import (
    LARGEST,
    check_generator,
    check_integer,
    check_number,
    check_rate,
    check_real,
    check_tensor,
)
from forcedrop.dropout.site import DropoutSite

NEVER = 1e6
"""A radius beyond all pairs, and the largest cutoff and width."""

_NARROWEST = 1e-6


def smooth_step(t: Tensor) -> Tensor:
    """Return the quintic step: 0 up to t = 0, 1 from t = 1 on, with two continuous derivatives."""
    t = t.clamp(0, 1)
    return t**3 * (t * (6 * t - 15) + 10)


def _step_integral(t: Tensor) -> Tensor:
    """Return the integral of :func:`smooth_step` from 0 to t."""
    inside = t.clamp(0, 1)
    return inside**4 * (inside * (inside - 3) + 2.5) + (t - 1).clamp(min=0)


class EdgeCutDropout(DropoutSite):
    """Edge dropout by cut radii of each kind of pair; see the module's page.

    A fresh draw has radii for all pairs alike; functions by row have radii each, the rows being the first axis of the distances.
    A ``bank`` of radii, if set, is what frozen functions have instead of drawn ones: row k is that of sample k.

    Args:
        kinds: number of kinds of pairs.
        cutoff: c, the longest radius; pairs beyond count for nothing anyway.
        p: the rate, in [0, 1), of a kind to be cut.
        first: a, the shortest radius, in units of the distances.
        width: w, over which edges fade out.

    Raises:
        ValueError: if ``p`` is not in [0, 1), there are no kinds, or not 0 ≤ ``first`` < ``cutoff`` and ``width`` > 0.
    """

    bank: Tensor
    fixed = frozenset({"kinds"})

    def __init__(self, kinds: int, cutoff: float, p: float = 0.3, *, first: float = 1.8, width: float = 0.5) -> None:
        super().__init__(p)
        kinds = check_integer(kinds, "kinds", high=LARGEST)
        numbers = (("cutoff", cutoff), ("first", first), ("width", width))
        cutoff, first, width = (check_number(value, name) for name, value in numbers)
        if kinds < 1 or not 0 <= first < cutoff <= NEVER or not _NARROWEST <= width <= NEVER:
            raise ValueError(
                "cuts need kinds ≥ 1, 0 ≤ first < cutoff and width > 0 (1e-6 to 1e6), got"
                f" {kinds}, {first}, {cutoff}, {width}"
            )
        self.kinds, self.cutoff, self.first, self.width = kinds, cutoff, first, width
        self.register_buffer("bank", torch.empty(0, kinds))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("cutoff", "first", "width"):
            value = check_number(value, name)
            set_so_far = {"first": 0.0, "cutoff": math.inf, **vars(self), name: value}
            ordered = 0 <= set_so_far["first"] < set_so_far["cutoff"]
            if not ordered or not (_NARROWEST if name == "width" else 0) <= value <= NEVER:
                raise ValueError(f"cuts need 0 ≤ first < cutoff and width > 0 (1e-6 to 1e6), got {name} = {value}")
        super().__setattr__(name, value)

    @property
    def active(self) -> bool:
        """Whether a call without radii would cut anything."""
        # not `super().active`, which torch.compile (2.13) takes for True whatever it is
        frozen = self._function is not None
        return (self.p > 0 and (self.training or frozen)) or (frozen and len(self.bank) > 0)

    def check_samples(self, n: int) -> None:
        """Refuse more samples than a bank holds radii.

        Raises:
            ValueError: naming the number that it holds.
        """
        if 0 < len(self.bank) < n:
            raise ValueError(f"the bank of EdgeCutDropout holds {len(self.bank)} cut radii, not {n}")

    def radii(self, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return cut radii of each kind, shape (kinds,), or (rows, kinds) for functions by row.

        Raises:
            ValueError: if the bank has fewer functions than is asked for.
        """
        function = self._function
        if function is not None and len(self.bank):
            if isinstance(function.sample, int) and not 0 <= function.sample < len(self.bank):
                raise ValueError(f"function {function.sample} of a bank of {len(self.bank)} cut radii")
            sample = torch.as_tensor(function.sample, device=self.bank.device)
            chosen = self.bank.index_select(0, sample.reshape(-1)).to(like.dtype)  # `vmap` may run over the sample
            return chosen if function.by_row else chosen[0]
        shape = (1, 2 * self.kinds)
        if function is not None:
            u = function.uniform(self._site, shape, dtype=like.dtype, device=like.device)
        elif generator is None:  # torch.compile cannot trace `generator=None`
            u = torch.rand(shape, dtype=like.dtype, device=like.device)
        else:
            check_generator(generator)
            u = torch.rand(shape, generator=generator, dtype=like.dtype, device=like.device)
        chance, place = u.unflatten(1, (2, self.kinds)).unbind(1)
        radii = torch.where(chance < self.p, self.first + place * (self.cutoff - self.first), NEVER)
        return radii if function is not None and function.by_row else radii[0]

    def weights(self, r: Tensor, kind: Tensor, radii: Tensor) -> Tensor:
        """Return the weights f(r), of the shape of ``r``.

        Args:
            r: distances, shape (rows, …).
            kind: of each pair, integers in [0, kinds), of the same shape.
            radii: of each kind, shape (kinds,), or (rows, kinds).
        """
        kind = kind.to(torch.int64)
        try:  # neither takes a negative kind for the last one
            if radii.dim() == 1:
                cut = radii.index_select(0, kind.reshape(-1)).reshape(kind.shape)
            else:
                cut = radii.gather(1, kind.flatten(1)).reshape(kind.shape)
        except (IndexError, RuntimeError) as error:
            raise ValueError(f"`kind` must lie in [0, {radii.shape[-1]}): {error}") from error
        left = 1 - smooth_step((r - cut) / self.width)
        mean = _step_integral((r - self.first) / self.width) - _step_integral((r - self.cutoff) / self.width)
        return left / (1 - self.p * self.width / (self.cutoff - self.first) * mean)

    def forward(
        self, r: Tensor, kind: Tensor, radii: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """Return the weights of edges to multiply their messages by; None, for all 1, in evaluation.

        Args:
            r: distances, shape (rows, …).
            kind: of each pair, integers in [0, kinds), of the same shape; the same for both ends of a pair.
            radii: to be used as they are, see :meth:`weights`.
            generator: for a fresh draw.

        Raises:
            TypeError: if ``r`` is not floating point.
            ValueError: if ``kind`` has another shape or lies outside of [0, kinds), or ``radii`` have a wrong shape.
        """
        check_real(r, "EdgeCutDropout")
        check_tensor(kind, "kind")
        if kind.is_floating_point() or kind.is_complex() or kind.dtype == torch.bool:
            raise TypeError(f"kind must hold integers, got {kind.dtype}")
        if kind.shape != r.shape:
            raise ValueError(f"`kind` must have the shape of the distances, {tuple(r.shape)}, got {tuple(kind.shape)}")
        if radii is None:
            if not self.active:
                return None
            radii = self.radii(r, generator)
        else:
            self._check_radii(radii, r)
        return self.weights(r, kind, radii)

    def _check_radii(self, radii: Tensor, r: Tensor) -> None:
        check_real(radii, "the `radii` of EdgeCutDropout")
        by_row = (r.shape[0], self.kinds) if r.dim() else None
        if radii.shape not in ((self.kinds,), by_row):
            wanted = f"({self.kinds},) or {by_row}" if by_row else f"({self.kinds},)"
            raise ValueError(f"`radii` must have shape {wanted}, got {tuple(radii.shape)}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load a bank of any size."""
        bank = state_dict.get(f"{prefix}bank")
        if isinstance(bank, Tensor) and bank.dim() == 2:
            self.bank = self.bank.new_empty((len(bank), self.kinds))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Say the settings."""
        return f"{self.kinds}, cutoff={self.cutoff}, p={self.p}, first={self.first}, width={self.width}"


def edge_cut_dropout(
    r: Tensor,
    kind: Tensor,
    kinds: int,
    cutoff: float,
    p: float = 0.3,
    training: bool = True,
    *,
    first: float = 1.8,
    width: float = 0.5,
    radii: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Functional :class:`EdgeCutDropout`; 1 for every pair in evaluation.

    Raises:
        TypeError: if ``r`` is not floating point.
        ValueError: if ``kind`` has another shape, or for settings that cannot be.
    """
    check_real(r, "edge_cut_dropout")
    site = EdgeCutDropout(kinds, cutoff, check_rate(p), first=first, width=width).to(r.device).train(training)
    weights = site(r, kind, radii, generator)
    return torch.ones_like(r) if weights is None else weights
