r"""One time step of an LSTM or a GRU with masks at four places, as functions of plain tensors."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from forcedrop.dropout.checks import check_mask, check_real, check_same_dtype, shown


class RecurrentMasks(NamedTuple):
    """The masks of one layer and direction, for all time steps; None drops nothing.

    Attributes:
        input: shape (B, input size), or 1 for B.
        state: shape (B, H), or 1 for B.
        update: shape (B, H), or 1 for B.
        weight: shape (4H, H) for an LSTM, (3H, H) for a GRU.
    """

    input: Tensor | None = None
    state: Tensor | None = None
    update: Tensor | None = None
    weight: Tensor | None = None


class Weights(NamedTuple):
    """Weights of one layer and direction, in torch's order of gates: input, forget, cell, output; or reset, update, new.

    Attributes:
        ih: shape (gates · H, input size).
        hh: shape (gates · H, H).
        bias_ih: shape (gates · H,).
        bias_hh: shape (gates · H,).
    """

    ih: Tensor
    hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None


State = tuple[Tensor, ...]
"""(h, c) of an LSTM, (h,) of a GRU, each of shape (B, H)."""


class Step(Protocol):
    """One time step: (input's share of the gates, state, weights, masks) → state."""

    def __call__(self, gates: Tensor, state: State, weights: Weights, masks: RecurrentMasks) -> State:
        """Return the state after the step."""


def _check(x: Tensor, state: State, weights: Weights, masks: RecurrentMasks, gates: int, what: str) -> None:
    """Refuse what does not fit.

    Raises:
        TypeError: if something is no tensor, or ``weights`` or ``masks`` are of another kind.
        ValueError: if a shape does not fit.
    """
    if not isinstance(weights, Weights):
        raise TypeError(f"weights must be forcedrop.dropout.cells.Weights, got {shown(weights)}")
    if not isinstance(state, tuple) or len(state) != (2 if gates == 4 else 1):
        raise TypeError(f"the state of {what} must be {'(h, c)' if gates == 4 else 'a tensor'}, got {shown(state)}")
    check_real(x, f"`x` of {what}")
    for tensor in (*state, weights.ih, weights.hh):
        check_real(tensor, f"a state or a weight of {what}")
        check_same_dtype(x, tensor, what)
    h = state[0]
    if x.dim() != 2 or any(part.shape != (x.shape[0], h.shape[-1]) for part in state):
        shapes = [tuple(part.shape) for part in state]
        raise ValueError(
            f"{what} needs `x` of shape (B, F) and states of shape (B, H), got {tuple(x.shape)} and {shapes}"
        )
    rows = gates * h.shape[1]
    if weights.ih.shape != (rows, x.shape[1]) or weights.hh.shape != (rows, h.shape[1]):
        wanted = f"({rows}, {x.shape[1]}) and ({rows}, {h.shape[1]})"
        raise ValueError(
            f"{what} needs weights of {wanted}, got {tuple(weights.ih.shape)} and {tuple(weights.hh.shape)}"
        )
    for bias in (weights.bias_ih, weights.bias_hh):
        if bias is not None:
            check_real(bias, f"a bias of {what}")
            if bias.shape != (rows,):
                raise ValueError(f"{what} needs biases of shape ({rows},), got {tuple(bias.shape)}")
    check_masks(masks, x, h, weights.hh)


def check_masks(masks: RecurrentMasks, x: Tensor, h: Tensor, hh: Tensor) -> None:
    """Refuse masks that do not fit inputs ``x`` (B, F), states ``h`` (B, H) and recurrent weights ``hh``.

    Raises:
        TypeError: if ``masks`` are no :class:`RecurrentMasks` of tensors.
        ValueError: if a shape does not fit.
    """
    if not isinstance(masks, RecurrentMasks):
        raise TypeError(f"masks of one layer and direction must be RecurrentMasks, got {shown(masks)}")
    for name, mask, like in zip(masks._fields, masks, (x, h, h, hh), strict=True):
        if mask is not None:
            check_mask(mask, like, f"masks.{name}")


def _times(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask


def lstm_step(gates: Tensor, state: State, weights: Weights, masks: RecurrentMasks) -> State:
    """Return (h, c): a :class:`Step` of an LSTM."""
    h, c = state
    gates = gates + functional.linear(_times(h, masks.state), weights.hh, weights.bias_hh)
    i, f, g, o = gates.chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * _times(g.tanh(), masks.update)
    return o.sigmoid() * c.tanh(), c


def gru_step(gates: Tensor, state: State, weights: Weights, masks: RecurrentMasks) -> State:
    """Return (h,): a :class:`Step` of a GRU, with torch's r inside the candidate: tanh(W x + r (U h))."""
    (h,) = state
    r, z, n = gates.chunk(3, -1)
    h_r, h_z, h_n = functional.linear(_times(h, masks.state), weights.hh, weights.bias_hh).chunk(3, -1)
    z = (z + h_z).sigmoid()
    n = (n + (r + h_r).sigmoid() * h_n).tanh()
    return ((1 - z) * _times(n, masks.update) + z * h,)


def run(step: Step, x: Tensor, state: State, weights: Weights, masks: RecurrentMasks) -> tuple[Tensor, State]:
    """Run over the time axis of ``x``, (T, B, F); return h at every step, (T, B, H), and the last state."""
    gates = functional.linear(_times(x, masks.input), weights.ih, weights.bias_ih)
    weights = weights._replace(hh=_times(weights.hh, masks.weight))
    out = []
    for gates_t in gates.unbind(0):
        state = step(gates_t, state, weights, masks)
        out.append(state[0])
    return torch.stack(out), state


def lstm_cell(
    x: Tensor, state: tuple[Tensor, Tensor], weights: Weights, masks: RecurrentMasks = RecurrentMasks()
) -> tuple[Tensor, Tensor]:
    r"""Return (h, c) after one step of an LSTM with masks: :math:`c' = f c + i (g \cdot m)`, :math:`h' = o \tanh c'`.

    Args:
        x: the step's input, shape (B, F).
        state: h and c, shape (B, H) each.
        weights: of ``torch.nn.LSTMCell``, say.
        masks: give the same ones at every step of a sequence.

    Raises:
        TypeError: if something is no tensor of the weights' type, or of another kind.
        ValueError: if a shape does not fit.
    """
    _check(x, state, weights, masks, 4, "lstm_cell")
    _, (h, c) = run(lstm_step, x[None], state, weights, masks)
    return h, c


def gru_cell(x: Tensor, state: Tensor, weights: Weights, masks: RecurrentMasks = RecurrentMasks()) -> Tensor:
    r"""Return h after one step of a GRU with masks: :math:`h' = (1-z)(n \cdot m) + z h`.

    Args:
        x: the step's input, shape (B, F).
        state: h, shape (B, H).
        weights: of ``torch.nn.GRUCell``, say.
        masks: give the same ones at every step of a sequence.

    Raises:
        TypeError: if something is no tensor of the weights' type, or of another kind.
        ValueError: if a shape does not fit.
    """
    _check(x, (state,), weights, masks, 3, "gru_cell")
    _, (h,) = run(gru_step, x[None], (state,), weights, masks)
    return h
