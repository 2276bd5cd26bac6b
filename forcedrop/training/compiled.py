"""A training step as one compiled function: energy, forces and the gradients of the weights, traced together.

``torch.compile`` alone cannot train a force field: it does not differentiate twice. So the whole step, both derivatives
included, is first traced into one flat graph of operations (``make_fx``), which is then compiled and never differentiated.

Tracing is done once. It keeps the numbers of atoms, structures and neighbour slots open and everything else fixed.
It remembers no conditions on them, so sizes of 1, which PyTorch treats specially (broadcasting), are left to the eager step.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from forcedrop.potential import GraphInputs
from forcedrop.training.losses import Targets
from forcedrop.training.step import Objective, Step, StepInputs, StepResult, eager_step

_Flat = Callable[..., Sequence[Tensor]]


class CompiledStep:
    """A step that is traced and compiled at its first call, and eager where that fails; then it warns once and says why.

    Args:
        objective: what is minimised.
        compiler: turns the traced graph into a function; ``torch.compile`` if not given.
    """

    def __init__(self, objective: Objective, compiler: Callable[[Any], _Flat] = torch.compile) -> None:
        self.objective, self.compiler = objective, compiler
        self.eager: Step = eager_step(objective)
        self.failure: str | None = None
        self._function: _Flat | None = None
        self._used: list[bool] = []

    def __call__(self, inputs: StepInputs) -> StepResult:
        """Return the loss, statistics and gradients of one batch."""
        if self.failure is not None or 1 in (*inputs.graph.nbr.shape, inputs.graph.n_graphs):
            return self.eager(inputs)
        tracing: Any = importlib.import_module("torch.fx.experimental._config")

        try:
            with tracing.patch(use_duck_shape=False):  # equal sizes by chance are not equal for ever
                return self._run(inputs)
        except Exception as error:  # whatever tracers and compilers raise: training goes on
            text = str(error).strip() or "no reason given"
            self.failure = f"{type(error).__name__}: {text.splitlines()[0]}"
            warnings.warn(f"the training step runs eagerly, it could not be compiled: {self.failure}", stacklevel=2)
            return self.eager(inputs)

    def _run(self, inputs: StepInputs) -> StepResult:
        named = {**dict(self.objective.named_parameters()), **dict(self.objective.named_buffers())}
        fixed = [tensor.detach() for tensor in named.values()]
        free, open_axes, names = _flatten(inputs)
        if self._function is None:
            step = self._traceable(list(named), names)
            self._function = self.compiler(_trace(step, fixed, free, open_axes))
        for tensor, axes in zip(free, open_axes, strict=True):
            torch._dynamo.mark_dynamic(tensor, axes)
        values, *gradients = self._function(*fixed, *free)
        left = iter(gradients)
        return StepResult(values, tuple(next(left) if used else None for used in self._used))

    def _traceable(self, tensors: list[str], names: list[str]) -> _Flat:
        """Return the step as a function of the objective's tensors and of a batch's, that returns tensors."""
        weights = [name for name, weight in self.objective.named_parameters() if weight.requires_grad]

        def step(*arguments: Tensor) -> list[Tensor]:
            given = dict(zip(tensors, arguments[: len(tensors)], strict=True))
            for name in weights:
                given[name] = given[name].detach().requires_grad_(True)
            inputs = _unflatten(dict(zip(names, arguments[len(tensors) :], strict=True)))
            loss, values = torch.func.functional_call(self.objective, given, (inputs,))
            gradients = torch.autograd.grad(loss, [given[name] for name in weights], allow_unused=True)
            self._used = [g is not None for g in gradients]
            return [values, *(g for g in gradients if g is not None)]

        return step


def _trace(step: _Flat, fixed: list[Tensor], free: list[Tensor], open_axes: list[list[int]]) -> torch.fx.GraphModule:
    """Return the operations of the step, with the open axes of ``free`` as symbols."""
    from torch._dynamo.source import ConstantSource
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)

    def fake(number: int, tensor: Tensor, axes: list[int]) -> Tensor:
        sizes = [DimDynamic.DYNAMIC if axis in axes else DimDynamic.STATIC for axis in range(tensor.dim())]
        context: Any = StatelessSymbolicContext(dynamic_sizes=sizes)
        return mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(f"input{number}"))

    axes_of_all: list[list[int]] = [*([] for _ in fixed), *open_axes]
    fakes = [fake(k, t, axes) for k, (t, axes) in enumerate(zip([*fixed, *free], axes_of_all, strict=True))]
    with mode:
        return make_fx(step, _allow_non_fake_inputs=True)(*fakes)


def _flatten(inputs: StepInputs) -> tuple[list[Tensor], list[list[int]], list[str]]:
    """Return the tensors of a batch, the axes of each that differ from batch to batch, and their names."""
    rest = {"vec": inputs.vec, "ramp": inputs.ramp, **inputs.graph._asdict()}
    del rest["n_graphs"]  # a number would be fixed by tracing
    named = {
        **rest,
        **({} if inputs.functions is None else {"functions": inputs.functions}),
        **{f"target.{name}": value for name, value in inputs.target._asdict().items()},
    }
    axes: list[list[int]] = []
    for name in named:
        if name in ("ramp", "target.counts"):
            axes.append([])
        else:
            axes.append([0, 1] if name in ("vec", "nbr", "reverse") else [0])
    return [tensor.contiguous() for tensor in named.values()], axes, list(named)


def _unflatten(named: dict[str, Tensor]) -> StepInputs:
    """Undo :func:`_flatten`."""
    target = Targets(**{name: named[f"target.{name}"] for name in Targets._fields})
    n_graphs: Any = target.volume.shape[0]
    graph = GraphInputs(named["species"], named["batch"], named["nbr"], named["reverse"], n_graphs)
    return StepInputs(named["vec"], graph, named.get("functions"), target, named["ramp"])
