r"""LSTM and GRU with dropout of their recurrent connections: four places with a rate each, every mask locked over time.

- ``input``: the layer's input (Gal & Ghahramani, NIPS 2016, arXiv 1512.05287);
- ``state``: h of the step before, where it enters the gates, "drop the memory" (ibid.);
- ``update``: the candidate g (LSTM) or n (GRU) that is written into the state, "drop the new information": what the state holds
  is never erased (Semeniuta, Severyn & Barth, COLING 2016, arXiv 1603.05118);
- ``weight``: entries of the recurrent weights, shared by the batch (Merity, Keskar & Socher, ICLR 2018, arXiv 1708.02182).

All are inverted: kept values times 1/(1−p). The loop over time is Python, of plain tensors: it runs under ``torch.func.vmap`` and
``torch.compile``, and is slower than the fused kernels of torch.nn.LSTM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NoReturn, Self, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from forcedrop.dropout.cells import RecurrentMasks, State, Step, Weights, check_masks, gru_step, lstm_step, run
from forcedrop.dropout.checks import (
    LARGEST,
    check_flag,
    check_integer,
    check_rank,
    check_rate,
    check_real,
    check_same_dtype,
    shown,
)
from forcedrop.dropout.elementwise import Dropout
from forcedrop.dropout.masks import check_table
from forcedrop.dropout.site import refuse_script


class Rates(TypedDict, total=False):
    """The rates of the four places, 0 if not given."""

    p_input: float
    p_state: float
    p_update: float
    p_weight: float


class _Sites(nn.Module):
    """The four dropout sites of one layer and direction."""

    def __init__(self, p_input: float, p_state: float, p_update: float, p_weight: float) -> None:
        super().__init__()
        self.input, self.state = Dropout(p_input), Dropout(p_state)
        self.update, self.weight = Dropout(p_update), Dropout(p_weight)

    def forward(
        self, x: Tensor, h: Tensor, hh: Tensor, generator: torch.Generator | None, always: bool
    ) -> RecurrentMasks:
        """Draw masks for inputs like ``x`` (B, F), states like ``h`` (B, H) and weights ``hh``; ``always``: in evaluation too."""

        def mask(site: Dropout, like: Tensor) -> Tensor | None:
            return site.mask(like, generator) if site.active or (always and site.p > 0) else None

        # a leading axis for the weights, because a site takes the first one for the batch
        weight = mask(self.weight, hh[None])
        return RecurrentMasks(
            mask(self.input, x), mask(self.state, h), mask(self.update, h), None if weight is None else weight[0]
        )


class _DropoutRNN(nn.Module):
    """What DropoutLSTM and DropoutGRU share: weights under torch's names, sites, layers and directions."""

    _n_gates: ClassVar[int]
    _n_states: ClassVar[int]
    _torch_class: ClassVar[type[nn.RNNBase]]
    _step: ClassVar[Step]

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        bidirectional: bool = False,
        *,
        p_input: float = 0.0,
        p_state: float = 0.0,
        p_update: float = 0.0,
        p_weight: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = (("input_size", input_size), ("hidden_size", hidden_size), ("num_layers", num_layers))
        input_size, hidden_size, num_layers = (check_integer(value, name, high=LARGEST) for name, value in sizes)
        for name, flag in (("bias", bias), ("batch_first", batch_first), ("bidirectional", bidirectional)):
            check_flag(flag, name)
        rates = {"p_input": p_input, "p_state": p_state, "p_update": p_update, "p_weight": p_weight}
        rates = {name: check_rate(rate, name) for name, rate in rates.items()}
        if min(input_size, hidden_size, num_layers) < 1:
            raise ValueError(f"sizes and layers must be at least 1, got {input_size}, {hidden_size} and {num_layers}")
        self.input_size, self.hidden_size, self.num_layers = input_size, hidden_size, num_layers
        self.bias, self.batch_first, self.bidirectional = bias, batch_first, bidirectional
        rows = self._n_gates * hidden_size
        check_table(rows * num_layers, max(self._input_sizes()) + hidden_size, "weights")
        for name, size in zip(self._suffixes(), self._input_sizes(), strict=True):
            for kind, shape in (("weight_ih", (rows, size)), ("weight_hh", (rows, hidden_size))):
                self.register_parameter(f"{kind}_{name}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            for kind in ("bias_ih", "bias_hh") if bias else ():
                self.register_parameter(f"{kind}_{name}", nn.Parameter(torch.empty(rows, device=device, dtype=dtype)))
        self.sites = nn.ModuleList(_Sites(**rates) for _ in self._suffixes())
        self.reset_parameters()

    def __prepare_scriptable__(self) -> NoReturn:
        refuse_script(self)

    def _suffixes(self) -> list[str]:
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{layer}{direction}" for layer in range(self.num_layers) for direction in directions]

    def _input_sizes(self) -> list[int]:
        directions = 1 + self.bidirectional
        return [self.input_size] * directions + [directions * self.hidden_size] * directions * (self.num_layers - 1)

    def reset_parameters(self) -> None:
        """Draw the weights as torch.nn.LSTM does: uniform in ±1/√(hidden size)."""
        bound = 1 / math.sqrt(self.hidden_size)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    @classmethod
    def from_torch(cls, rnn: nn.RNNBase, **rates: Unpack[Rates]) -> Self:
        """Return a layer with a copy of the weights, the settings and the mode of torch's.

        Args:
            rnn: a ``torch.nn.LSTM`` or ``torch.nn.GRU``, as the class.
            rates: ``p_input``, ``p_state``, ``p_update``, ``p_weight``.

        Raises:
            TypeError: if ``rnn`` is of another kind.
            ValueError: if it projects its states, or has a dropout of its own between layers.
        """
        if not isinstance(rnn, cls._torch_class):
            raise TypeError(f"{cls.__name__} takes weights of {cls._torch_class.__name__}, got {type(rnn).__name__}")
        if rnn.proj_size or rnn.dropout:
            raise ValueError(
                f"{cls.__name__} has neither projections nor a fresh mask per step between layers, got proj_size={rnn.proj_size} "
                f"and dropout={rnn.dropout}; set the latter to 0 and use `p_input`, which acts on every layer's input"
            )
        layer = cls(
            rnn.input_size,
            rnn.hidden_size,
            rnn.num_layers,
            rnn.bias,
            rnn.batch_first,
            rnn.bidirectional,
            **rates,
        ).to(next(rnn.parameters()))
        layer.load_state_dict(rnn.state_dict())
        return layer.train(rnn.training)

    def _weights(self, suffix: str) -> Weights:
        kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh") if self.bias else ("weight_ih", "weight_hh")
        return Weights(*(getattr(self, f"{kind}_{suffix}") for kind in kinds))

    def mask(self, x: Tensor, generator: torch.Generator | None = None) -> list[RecurrentMasks]:
        """Draw the masks of all layers and directions for inputs like ``x``, to be kept and given to later calls."""
        return self._masks(self._time_first(x), generator, always=True)

    def _masks(self, x: Tensor, generator: torch.Generator | None, always: bool) -> list[RecurrentMasks]:
        h = x.new_empty(x.shape[1], self.hidden_size)
        return [
            site(x.new_empty(x.shape[1], size), h, self._weights(suffix).hh, generator, always)
            for site, suffix, size in zip(self.sites, self._suffixes(), self._input_sizes(), strict=True)
        ]

    def _time_first(self, x: Tensor | PackedSequence) -> Tensor:
        """Return the input as (T, B, F).

        Raises:
            TypeError: if it is packed or not floating point.
            ValueError: if it has the wrong shape.
        """
        name = type(self).__name__
        if isinstance(x, PackedSequence):
            raise TypeError(f"{name} needs a padded tensor, got a PackedSequence")
        check_real(x, name)
        check_same_dtype(x, self._weights("l0").ih, name)
        check_rank(x, (2, 3), name)
        if x.shape[-1] != self.input_size:
            raise ValueError(f"{name} needs inputs of {self.input_size} features, got shape {tuple(x.shape)}")
        if x.dim() == 2:
            x = x[:, None]
        elif self.batch_first:
            x = x.transpose(0, 1)
        if x.shape[0] == 0:
            raise ValueError(f"{name} needs at least one time step, got none")
        return x

    def _initial(self, x: Tensor, hx: State | None, batched: bool) -> State:
        """Return the states at the start, (layers · directions, B, H) each: zero if not given.

        Raises:
            ValueError: if they have another shape.
        """
        shape = (len(self.sites), x.shape[1], self.hidden_size)
        if hx is None:
            return tuple(x.new_zeros(shape) for _ in range(self._n_states))
        if not isinstance(hx, tuple) or not all(isinstance(h, Tensor) for h in hx):
            wanted = "(h, c), two tensors" if self._n_states == 2 else "a tensor"
            raise TypeError(f"hx must be {wanted}, got {shown(hx)}")
        for h in hx:
            check_same_dtype(h, x, f"{type(self).__name__} (`hx`)")
        if not batched and all(h.dim() == 2 for h in hx):
            hx = tuple(h[:, None] for h in hx)
        if len(hx) != self._n_states or any(h.shape != shape for h in hx):
            shapes = [tuple(h.shape) for h in hx]
            raise ValueError(
                f"{type(self).__name__} needs {self._n_states} initial state(s) of shape {shape}, got {shapes}"
            )
        return hx

    def _forward(
        self, x: Tensor, hx: State | None, mask: Sequence[RecurrentMasks] | None, generator: torch.Generator | None
    ) -> tuple[Tensor, State]:
        out = self._time_first(x)
        batched = x.dim() == 3
        hx = self._initial(out, hx, batched)
        if mask is not None and not isinstance(mask, Sequence):
            raise TypeError(f"mask must be a list of RecurrentMasks, got {shown(mask)}")
        masks = self._masks(out, generator, always=False) if mask is None else mask
        if len(masks) != len(self.sites):
            raise ValueError(f"`mask` needs one entry per layer and direction, {len(self.sites)}, got {len(masks)}")
        if mask is not None:
            for at, size in enumerate(self._input_sizes()):
                check_masks(
                    masks[at], out.new_empty(out.shape[1], size), hx[0][at], self._weights(self._suffixes()[at]).hh
                )
        directions = 1 + self.bidirectional
        last: list[State] = []
        for layer in range(self.num_layers):
            outs = []
            for direction in range(directions):
                at = layer * directions + direction
                ordered = out.flip(0) if direction else out
                start = tuple(h[at] for h in hx)
                h, end = run(type(self)._step, ordered, start, self._weights(self._suffixes()[at]), masks[at])
                outs.append(h.flip(0) if direction else h)
                last.append(end)
            out = torch.cat(outs, -1)
        states = tuple(torch.stack(parts) for parts in zip(*last, strict=True))
        if not batched:
            return out[:, 0], tuple(h[:, 0] for h in states)
        return (out.transpose(0, 1) if self.batch_first else out), states

    def extra_repr(self) -> str:
        """Say the settings."""
        return (
            f"{self.input_size}, {self.hidden_size}, num_layers={self.num_layers}, bias={self.bias}, "
            f"batch_first={self.batch_first}, bidirectional={self.bidirectional}"
        )


class DropoutLSTM(_DropoutRNN):
    r"""``torch.nn.LSTM`` with dropout at its input, recurrent state, cell update and recurrent weights (see the module's text).

    In evaluation, or with all rates 0, it is torch's layer; ``state_dict`` is the same, so that either loads the other's.

    Args:
        input_size: features of the input.
        hidden_size: H, features of the state.
        num_layers: layers; each but the first takes the one before as its input, with ``p_input`` too.
        bias: whether there are biases.
        batch_first: inputs and outputs are (B, T, F), else (T, B, F); without a batch always (T, F).
        bidirectional: a second set of weights runs backwards; outputs have 2H features.
        p_input: rate of input features.
        p_state: rate of units of h where it enters the gates.
        p_update: rate of units of the candidate g.
        p_weight: rate of entries of the recurrent weights.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: if a rate is not in [0, 1), or a size is below 1.
    """

    _n_gates, _n_states, _torch_class = 4, 2, nn.LSTM
    _step = staticmethod(lstm_step)

    def forward(
        self,
        x: Tensor,
        hx: tuple[Tensor, Tensor] | None = None,
        mask: Sequence[RecurrentMasks] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return h at every step and the last (h, c), in the shapes of ``torch.nn.LSTM``.

        Args:
            x: shape (T, B, F), or (B, T, F) with ``batch_first``, or (T, F).
            hx: initial h and c, shape (layers · directions, B, H) each; zero if not given.
            mask: one entry per layer and direction, from :meth:`mask`; active in evaluation too.
            generator: for a fresh draw.

        Raises:
            TypeError: if ``x`` is packed or not floating point.
            ValueError: if a shape does not fit.
        """
        out, (h, c) = self._forward(x, hx, mask, generator)
        return out, (h, c)


class DropoutGRU(_DropoutRNN):
    r"""``torch.nn.GRU`` with dropout at its input, recurrent state, candidate and recurrent weights (see the module's text).

    In evaluation, or with all rates 0, it is torch's layer; ``state_dict`` is the same, so that either loads the other's.

    Args:
        input_size: features of the input.
        hidden_size: H, features of the state.
        num_layers: layers; each but the first takes the one before as its input, with ``p_input`` too.
        bias: whether there are biases.
        batch_first: inputs and outputs are (B, T, F), else (T, B, F); without a batch always (T, F).
        bidirectional: a second set of weights runs backwards; outputs have 2H features.
        p_input: rate of input features.
        p_state: rate of units of h where it enters the gates (the share z·h that is carried on is never dropped).
        p_update: rate of units of the candidate n.
        p_weight: rate of entries of the recurrent weights.
        device: of the weights.
        dtype: of the weights.

    Raises:
        ValueError: if a rate is not in [0, 1), or a size is below 1.
    """

    _n_gates, _n_states, _torch_class = 3, 1, nn.GRU
    _step = staticmethod(gru_step)

    def forward(
        self,
        x: Tensor,
        hx: Tensor | None = None,
        mask: Sequence[RecurrentMasks] | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return h at every step and the last h, in the shapes of ``torch.nn.GRU``.

        Args:
            x: shape (T, B, F), or (B, T, F) with ``batch_first``, or (T, F).
            hx: initial h, shape (layers · directions, B, H); zero if not given.
            mask: one entry per layer and direction, from :meth:`mask`; active in evaluation too.
            generator: for a fresh draw.

        Raises:
            TypeError: if ``x`` is packed or not floating point.
            ValueError: if a shape does not fit.
        """
        out, (h,) = self._forward(x, None if hx is None else (hx,), mask, generator)
        return out, h
