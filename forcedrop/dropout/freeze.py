"""One function sample for all dropout layers of a network, this library's and torch's own, for as long as a context lasts."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from forcedrop.dropout.checks import check_floating, check_rate, shown
from forcedrop.dropout.function import FunctionSample
from forcedrop.dropout.site import DropoutSite, inverted

Forward = Callable[..., Any]

TORCH_LAYERS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
"""torch's layers that have a frozen form here."""

UNSEEN = "torch.nn.functional.dropout called inside a forward() cannot be seen, make it a layer"
"""A hint for errors."""

_RNG = threading.RLock()

_ALPHA = 1.7580993408473766  # −SELU(−∞) = scale · alpha of torch.nn.SELU


@contextmanager
def frozen(model: nn.Module, seed: int = 0, sample: int | Tensor = 0) -> Iterator[nn.Module]:
    """Within the context, ``model`` is one function: all its masks are pure functions of (seed, sample, site name).

    The masks are the same for every call and every entry of a batch, in training and in evaluation mode alike, which is left as
    it is (``model.eval()`` is what batch norm wants). A site's name is its module's path in ``model``, so a part of a network,
    frozen on its own, is another function. The first axis counts as the batch. Contexts nest; on leaving, also by an error, the
    network is as before.

    - **Layers of this library**: a layer that is used in several places has one mask there; give each place its own layer.
    - **torch's dropout layers** (``nn.Dropout``, ``Dropout1d`` to ``3d``, ``AlphaDropout``, ``FeatureAlphaDropout``): each call
      within one pass of ``model`` has its own mask, the n-th call the same one in every pass. ``inplace=True`` is not obeyed.
    - **Modules that drop inside** (``nn.LSTM``, ``nn.GRU``, ``nn.RNN`` and ``nn.MultiheadAttention`` with ``dropout`` > 0, and
      subclasses of torch's layers with a ``forward`` of their own) run in training mode under a seeded, forked random number
      generator: the same call gives the same numbers, but masks differ between the entries of a batch and depend on its shape.
    - ``torch.nn.functional.dropout`` called inside a ``forward``, and layers of other libraries, cannot be seen and are not
      frozen; put a layer of one of the first two kinds there.

    A network compiled by ``torch.compile``, outside or inside of the context, is frozen too.

    **Copies** made inside, by ``copy.deepcopy``, ``pickle`` or ``torch.save`` of the whole network, are networks with weights of
    their own, and *stay this function* when the context has ended and the original has thawed::

        with frozen(net, seed=0, sample=3):
            third = copy.deepcopy(net)  # function 3, for good

    ``frozen`` makes such a copy another function for as long as a context lasts; for a copy that is not frozen, copy outside. A
    shallow copy (``copy.copy``) shares its layers with the original and thaws with it. ``state_dict`` holds weights alone and may
    be taken from and loaded into a frozen network; parametrisations and ``torch.func.functional_call`` work inside as outside.

    Threads may call a frozen network (in evaluation mode) together, and freeze networks of their own; freezing one that another
    thread is using changes it under that thread's hands.

    Args:
        model: the network; changed for as long as the context lasts.
        seed: the user's seed.
        sample: the sample's index; an int, or an int64 tensor without axes (which ``torch.func.vmap`` may run over). Or one of
            shape (n,): each of the n rows of a batch is a function of its own, row i that of index ``sample[i]``. Give the atoms
            or nodes of one structure the same index; layers whose first axis is not the batch cannot do this.

    Yields:
        ``model`` itself.

    Raises:
        TypeError: if ``model`` is no module, or ``seed`` or ``sample`` no integer.
        ValueError: if ``model`` has no dropout layer, or a layer of torch's whose rate is 1.
    """
    function = FunctionSample(seed, sample)
    sites = dropout_sites(model)
    if not sites:
        raise ValueError(f"{type(model).__name__} has no dropout layer to freeze; {UNSEEN}")
    with frozen_as(model, sites, function):
        yield model


@contextmanager
def frozen_as(model: nn.Module, sites: dict[str, nn.Module], function: FunctionSample) -> Iterator[None]:
    """Freeze ``model``, whose :func:`dropout_sites` are ``sites``, to a given function sample; see :func:`frozen`."""
    with ExitStack() as stack:
        calls = _Calls()
        for name, module in sites.items():
            if isinstance(module, DropoutSite):
                stack.callback(_set_function, module, module._function, module._site)
                _set_function(module, function, name)
            elif drops_inside(module):
                original = vars(module).get("forward")
                if isinstance(original, _Seeded):
                    original = original.original
                _override(stack, module, _Seeded(module, function, name, calls, original))
            elif torch_rate(module) == 1:  # which torch allows
                raise ValueError(f"`p` of the dropout layer {name!r} must lie in [0, 1), got 1.0")
            else:
                _override(stack, module, _FrozenTorch(module, function, name, calls))
        _hook(stack, model, calls.begin, calls.end)
        for module in model.modules():
            if isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
                # its fused kernel passes by the dropout layers in evaluation mode
                _hook(stack, module, _SlowPath.begin, _SlowPath.end)
        yield


def dropout_sites(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of ``model`` that drop something, by path: this library's, torch's, and those that drop inside.

    Raises:
        TypeError: if ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {shown(model)}")
    return {
        # torch.compile's wrapper is no part of the name, so that a compiled network is the same function
        ".".join(part for part in name.split(".") if part != "_orig_mod"): module
        for name, module in model.named_modules()
        if isinstance(module, (DropoutSite, *TORCH_LAYERS)) or drops_inside(module)
    }


def drops_inside(module: nn.Module) -> bool:
    """Whether ``module`` draws masks where only a seeded random number generator can reach them."""
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    return isinstance(module, TORCH_LAYERS) and all(type(module).forward is not layer.forward for layer in TORCH_LAYERS)


def torch_rate(layer: nn.Module) -> float:
    """Return the rate of one of torch's dropout layers."""
    return float(cast(nn.Dropout, layer).p)


@contextmanager
def seeded_rng(seed: int, *devices: torch.device) -> Iterator[None]:
    """Seed torch's global generators of the CPU and of the GPUs among ``devices``, and restore them afterwards.

    Raises:
        ValueError: if a device is neither the CPU nor a CUDA device.
    """
    if other := {device.type for device in devices} - {"cpu", "cuda"}:
        raise ValueError(f"seeded dropout needs tensors on the CPU or on CUDA devices, got {sorted(other)}")
    gpus = sorted({device.index for device in devices if device.type == "cuda"})
    with torch.random.fork_rng(devices=gpus):
        torch.default_generator.manual_seed(seed)
        for gpu in gpus:
            torch.cuda.default_generators[gpu].manual_seed(seed)
        yield


class _Calls:
    """Which call of a layer this is within one forward pass of the network; 0 if called from outside of one.

    Each thread counts for itself. A copy of it, made with a copy of the network, starts anew.
    """

    def __init__(self) -> None:
        self._passes: dict[int, tuple[int, dict[str, int]]] = {}

    def __reduce__(self) -> tuple[type[_Calls], tuple[()]]:
        return _Calls, ()

    def name(self, site: str) -> str:
        """Return the site's name for its next call."""
        _depth, counts = self._passes.get(_thread(), (0, None))
        if counts is None:
            return site
        count = counts.get(site, 0)
        counts[site] = count + 1
        return f"{site}#{count}" if count else site

    def begin(self, network: nn.Module, args: Any) -> None:
        """Let a pass begin, if it is not one of a network that calls itself."""
        depth, counts = self._passes.get(_thread(), (0, {}))
        self._passes[_thread()] = depth + 1, counts

    def end(self, network: nn.Module, args: Any, output: Any) -> None:
        """Let the pass end."""
        depth, counts = self._passes.pop(_thread(), (0, {}))
        if depth > 1:
            self._passes[_thread()] = depth - 1, counts


def _thread() -> int:
    # torch.compile traces one thread, whose number it cannot see
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class _SlowPath:
    """How many transformers, of any thread, are within a pass for which torch's fused kernel is switched off."""

    lock = threading.Lock()
    depth = 0
    before = True

    @classmethod
    def begin(cls, transformer: nn.Module, args: Any) -> None:
        """Switch it off; compiled code does not take it where there are hooks, such as this one."""
        if torch.compiler.is_compiling():
            return
        with cls.lock:
            if not cls.depth:
                cls.before = torch.backends.mha.get_fastpath_enabled()
                torch.backends.mha.set_fastpath_enabled(False)
            cls.depth += 1

    @classmethod
    def end(cls, transformer: nn.Module, args: Any, output: Any) -> None:
        """Switch it on again, if this was the last."""
        if torch.compiler.is_compiling():
            return
        with cls.lock:
            cls.depth = max(cls.depth - 1, 0)
            if not cls.depth:
                torch.backends.mha.set_fastpath_enabled(cls.before)


def _hook(stack: ExitStack, module: nn.Module, begin: Callable[..., None], end: Callable[..., None]) -> None:
    """Call ``begin`` and ``end`` around each pass of ``module``, also one that fails, as long as the stack lasts."""
    stack.callback(module.register_forward_pre_hook(begin).remove)
    stack.callback(module.register_forward_hook(end, always_call=True).remove)


def _set_function(site: DropoutSite, function: FunctionSample | None, name: str) -> None:
    site._function, site._site = function, name


def _override(stack: ExitStack, module: nn.Module, forward: Forward) -> None:
    previous = vars(module).get("forward")

    def restore() -> None:
        if previous is None:
            del module.forward
        else:
            module.forward = previous

    module.forward = forward
    stack.callback(restore)


@dataclass
class _FrozenTorch:
    """The ``forward`` of one of torch's dropout layers while it is frozen; copied or pickled with the layer, it is the copy's."""

    module: nn.Module
    function: FunctionSample
    site: str
    calls: _Calls

    def __call__(self, input: Tensor) -> Tensor:
        """Return the input under the mask of this call."""
        check_floating(input, type(self.module).__name__)
        p = check_rate(torch_rate(self.module))
        if not p:
            return input
        keep = self.function.keep(self.calls.name(self.site), p, _mask_shape(self.module, input), device=input.device)
        if isinstance(self.module, (nn.AlphaDropout, nn.FeatureAlphaDropout)):
            return _alpha_drop(input, keep, p)
        return input * inverted(keep, p, input.dtype)


def _mask_shape(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Return the shape of a frozen mask of one of torch's layers: that of its fresh masks, with one entry for the batch."""
    if isinstance(module, (nn.Dropout, nn.AlphaDropout)):
        return (1, *x.shape[1:]) if x.dim() > 1 else tuple(x.shape)
    # these two take inputs without a batch axis; the other layers of channels do not
    unbatched = x.dim() == (2 if isinstance(module, nn.Dropout1d) else 4 if isinstance(module, nn.Dropout3d) else None)
    channel = 0 if unbatched else 1
    if x.dim() < 2:
        raise ValueError(f"{type(module).__name__} needs an input of 2 axes or more, got shape {tuple(x.shape)}")
    return tuple(size if axis == channel else 1 for axis, size in enumerate(x.shape))


def _alpha_drop(x: Tensor, keep: Tensor, p: float) -> Tensor:
    """Klambauer et al., arXiv 1706.02515 (2017), section 3: dropped units become −α, then mean and variance are restored."""
    a = 1 / math.sqrt((1 - p) * (1 + p * _ALPHA**2))
    kept = keep.to(x.dtype)
    return x * (kept * a) + ((kept - 1) * (_ALPHA * a) + _ALPHA * a * p)


@dataclass
class _Seeded:
    """The ``forward`` of a module that drops inside while it is frozen; copied or pickled with the module, it is the copy's."""

    module: nn.Module
    function: FunctionSample
    site: str
    calls: _Calls
    original: Forward | None
    """What was set in place of the class's ``forward``, if anything was."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module in training mode under the random numbers of this call."""
        module, function = self.module, self.function
        if function.by_row:
            raise ValueError(
                f"{self.site or type(module).__name__} drops inside: it cannot be another function for every row"
            )
        high, low = function.bits(self.calls.name(self.site), torch.arange(2)).tolist()
        tensors = [*module.parameters(), *(arg for arg in args if isinstance(arg, Tensor))]
        devices = {tensor.device for tensor in tensors}
        forward = self.original or partial(type(module).forward, module)
        with _RNG:  # the generators belong to all threads
            training = module.training
            module.training = True
            try:
                # cuDNN keeps a dropout state of its own, which no seed resets
                with seeded_rng(high << 31 | low, *devices), torch.backends.cudnn.flags(enabled=False):
                    return forward(*args, **kwargs)
            finally:
                module.training = training
