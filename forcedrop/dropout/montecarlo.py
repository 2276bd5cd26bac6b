"""Monte-Carlo dropout: n function samples of any network with dropout layers, in one vectorised pass where that is possible.

Source: Gal & Ghahramani, ICML 2016 (arXiv 1506.02142), with masks that are functions: see :mod:`forcedrop.dropout.function`.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from forcedrop.dropout.checks import check_flag, check_integer, check_size
from forcedrop.dropout.freeze import UNSEEN, dropout_sites, drops_inside, frozen_as, seeded_rng, torch_rate
from forcedrop.dropout.function import FunctionSample
from forcedrop.dropout.masks import kept, random_bits, site_key
from forcedrop.dropout.site import DropoutSite

_LARGEST_TABLE = 1 << 20
"""Entries of a mask's table over all samples, at most; larger masks are computed sample by sample, where it costs less memory."""

_MOST_TABLES = 32
"""Tables that are remembered: 32 MB at most."""

_TABLES: OrderedDict[tuple[int, str, float, int, int, torch.device], Tensor] = OrderedDict()


def mc_samples(
    model: nn.Module,
    inputs: Any,
    n: int,
    seed: int = 0,
    *,
    chunk: int | None = None,
    vectorised: bool | None = None,
) -> Any:
    """Return ``n`` samples of a network's output, the sample axis first.

    Sample k is the network under the function sample (seed, k), as ``frozen(model, seed, k)`` makes it: its masks are shared by
    all entries of a batch and do not depend on ``n``, ``chunk`` or anything computed before. Everything but the dropout layers
    runs in evaluation mode (batch norm uses its running statistics); all flags are restored. No global random number generator
    is used up; the same call gives the same bits. Gradients flow; without need of them call under ``torch.no_grad()``.

    All samples are computed in one pass by ``torch.func.vmap``. Where that is impossible (modules that drop inside, see
    :func:`~forcedrop.dropout.freeze.frozen`; control flow that depends on values; ``torch.autograd.grad`` inside the network …)
    they are computed one after the other, with a ``RuntimeWarning`` that gives the reason unless ``vectorised=False`` asked for
    it. Both ways give the same numbers up to rounding.

    Args:
        model: any network with dropout layers, of this library or torch's; see :func:`~forcedrop.dropout.freeze.frozen` for what
            is seen and what is not.
        inputs: what the network is called with: a tuple is unpacked into its arguments, a dict into its keyword arguments,
            anything else is the only argument.
        n: how many samples.
        seed: the user's seed.
        chunk: how many samples share a pass; all by default. Smaller chunks need less memory.
        vectorised: True refuses to go one by one, False always does, None decides.

    Returns:
        A tensor of shape (n, …), or, as the network's output, a tuple, list or dict of such tensors, nested or not.

    Raises:
        ValueError: if there is no dropout layer, if all rates are 0, if no dropout layer is reached by the forward pass (all
            samples would be equal: that is no error bar), if a layer has fewer than ``n`` functions (``ExactDropout``), if ``n``
            or ``chunk`` is not positive, or if ``vectorised=True`` and a module drops inside.
        TypeError: if the output contains anything else than tensors, or an argument is of the wrong kind.
    """
    n, seed = check_size(n, "n"), check_integer(seed, "seed")
    chunk = None if chunk is None else check_size(chunk, "chunk")
    if vectorised is not None:
        check_flag(vectorised, "vectorised")
    sites = _active_sites(model)
    for site in sites.values():
        if isinstance(site, DropoutSite):
            site.check_samples(n)
    run = _Run(model, sites, inputs, seed, n)
    with evaluation_mode(model):
        outputs = run.loop() if vectorised is False else _vectorised_or_not(run, chunk, must=bool(vectorised))
    if not run.reached:
        raise ValueError(
            f"the forward pass of {type(model).__name__} in evaluation mode reaches none of its dropout layers ({_names(sites)}),"
            " so all samples would be equal"
        )
    return outputs


@dataclass
class _Run:
    """One call of :func:`mc_samples`.

    Attributes:
        reached: whether a site has asked for a mask.
    """

    model: nn.Module
    sites: dict[str, nn.Module]
    inputs: Any
    seed: int
    n: int
    reached: bool = False

    def one(self, sample: int | Tensor) -> Any:
        with frozen_as(self.model, self.sites, _Sample(self.seed, sample, self)):
            return call_with(self.model, self.inputs)

    def vectorised(self, chunk: int | None) -> Any:
        samples = torch.arange(self.n, device=_device(self.model, self.inputs))
        return torch.func.vmap(self.one, randomness="error", chunk_size=chunk)(samples)

    def loop(self) -> Any:
        device = _device(self.model, self.inputs)
        seeded = [device] if device.type == "cuda" else []
        outputs = []
        for sample in range(self.n):
            # whatever else is random in the network becomes a function of (seed, sample) too
            with seeded_rng(site_key(self.seed, f"sample {sample}"), *seeded):
                outputs.append(self.one(sample))
        return _stack(outputs)


@dataclass(frozen=True)
class _Sample(FunctionSample):
    """A function sample that notes that a site asks which sample it is, as every mask must, and looks small masks up."""

    run: _Run

    def __post_init__(self) -> None:
        """Check nothing: the run has, and nobody has asked for the sample yet."""

    def __reduce__(self) -> tuple[type[FunctionSample], tuple[int, int | Tensor]]:
        """Pickle as the function sample that it is, without the run."""
        return FunctionSample, (self.seed, self.sample)

    def __getattribute__(self, name: str) -> Any:
        if name == "sample":
            object.__getattribute__(self, "run").reached = True
        return object.__getattribute__(self, name)

    def keep(self, site: str, p: float, shape: Sequence[int], *, device: torch.device) -> Tensor:
        units = math.prod(shape)
        if units * self.run.n > _LARGEST_TABLE:
            return super().keep(site, p, shape, device=device)
        table = _table(self.seed, site, p, units, self.run.n, device)
        return table[self.sample].reshape(tuple(shape))


def _table(seed: int, site: str, p: float, units: int, n: int, device: torch.device) -> Tensor:
    """Return which of a site's units each sample keeps, shape (n, units): all samples at once, and remembered.

    It is a pure function, and a network is mostly asked for the same samples again, of another batch.
    """
    key = (seed, site, p, units, n, device)
    remembered = _TABLES.pop(key, None)  # and put back at the end: one step each, so that threads may share them
    if remembered is not None:
        _TABLES[key] = remembered
        return remembered
    with torch.inference_mode(False):  # so that it may be used under autograd later
        samples, identities = torch.arange(n, device=device), torch.arange(units, device=device)
        table = kept(random_bits(site_key(seed, site), samples, identities), p)
    if type(table) is Tensor:  # not while a tracer looks on
        _TABLES[key] = table
        with suppress(KeyError):  # another thread was faster
            if len(_TABLES) > _MOST_TABLES:
                _TABLES.popitem(last=False)
    return table


def _vectorised_or_not(run: _Run, chunk: int | None, *, must: bool) -> Any:
    inside = {name: module for name, module in run.sites.items() if drops_inside(module)}
    reason = f"masks are drawn inside of {_names(inside)}" if inside else ""
    if must and inside:
        raise ValueError(f"`vectorised=True` is impossible: {reason}")
    if not inside:
        try:
            return run.vectorised(chunk)
        except Exception as error:
            if must:
                raise
            reason = f"{type(error).__name__}: {error}"
    outputs = run.loop()  # raises the error again if it was not about vectorisation
    warnings.warn(
        f"mc_samples ran {run.n} passes one by one (vectorised=False does so without this warning): {reason}",
        RuntimeWarning,
        stacklevel=3,
    )
    return outputs


def _active_sites(model: nn.Module) -> dict[str, nn.Module]:
    sites = dropout_sites(model)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no dropout layer, so it has no samples; {UNSEEN}")
    active = {name: site for name, site in sites.items() if _is_active(site)}
    if not active:
        raise ValueError(
            f"all dropout layers of {type(model).__name__} have rate 0 ({_names(sites)}): no error bar, not a σ of 0"
        )
    return active


def _is_active(site: nn.Module) -> bool:
    if isinstance(site, DropoutSite):
        with frozen_as(site, {"": site}, FunctionSample(0, 0)):
            return site.active
    return drops_inside(site) or torch_rate(site) > 0


def _names(sites: dict[str, nn.Module]) -> str:
    return ", ".join(f"{name or 'the network itself'} ({type(site).__name__})" for name, site in sites.items())


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Set every module's flag to evaluation, and on leaving each one to what it was."""
    # by the flags themselves: some networks do more in train() and eval() than set them
    flags = {module: module.training for module in model.modules()}
    try:
        for module in flags:
            module.training = False
        yield
    finally:
        for module, training in flags.items():
            module.training = training


def call_with(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with a tuple of arguments, a dict of keyword arguments, or a single argument."""
    if isinstance(inputs, tuple):
        return model(*inputs)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def _device(model: nn.Module, inputs: Any) -> torch.device:
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else [inputs]
    tensors = [*(value for value in values if isinstance(value, Tensor)), *model.parameters(), *model.buffers()]
    return tensors[0].device if tensors else torch.device("cpu")


def _stack(outputs: list[Any]) -> Any:
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.stack(outputs)
    if isinstance(first, dict):
        return {key: _stack([output[key] for output in outputs]) for key in first}
    if isinstance(first, tuple | list):
        parts = [_stack(list(part)) for part in zip(*outputs, strict=True)]
        return type(first)(parts) if type(first) in (tuple, list) else type(first)(*parts)  # a NamedTuple
    raise TypeError(f"the network must return tensors, or tuples, lists or dicts of them, got {type(first).__name__}")
