"""Hostile arguments for every public function and layer of ``forcedrop.dropout``: a right result, or one clear error.

Input (name, index) is always the same. Clear is a ValueError, TypeError or NotImplementedError of this library. A result is
taken for right if nothing that came in finite goes out as NaN; other tests compare values.
"""

from __future__ import annotations

import inspect
import math
import random
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forcedrop import dropout
from forcedrop.dropout import cells
from tests.dropout.abilities import CASES, first

CLEAR = (ValueError, TypeError, NotImplementedError)
FUNCTIONS = [name for name in dropout.__all__ if inspect.isfunction(getattr(dropout, name)) and name != "frozen"]
OTHERS = ["FunctionSample", "LinearSchedule", "frozen"]
SIZE = 4


def numbers(draw: random.Random) -> Any:
    return draw.choice(
        [
            *(
                0.3,
                0.5,
                0.0,
                1e-30,
                1e-300,
                0.999999999,
                1.0,
                -0.1,
                math.nan,
                math.inf,
                -math.inf,
                1e300,
                2,
                0,
                -1,
                10**400,
            ),
            *("0.5", None, True, 0.5j, [0.5], torch.tensor(0.5), torch.tensor(2), torch.ones(2), object, b"x", {}),
        ]
    )


def integers(draw: random.Random) -> Any:
    return draw.choice(
        [1, 2, 3, 4, 5, 8, 0, -1, 10**11, 2**63, -(10**30), 2.5, 3.0, "3", None, True, math.nan, torch.tensor(3), [2]]
    )


def tensors(draw: random.Random) -> Any:
    shape = [draw.choice([SIZE, SIZE, SIZE, 1, 0, 3, 2]) for _ in range(draw.choice([0, 1, 2, 2, 2, 3, 3, 4]))]
    kind = draw.choice(["normal"] * 6 + ["integer", "bool", "half", "double", "complex", "nothing"])
    if kind == "nothing":
        return draw.choice([None, 3, "x", [1.0, 2.0], (), object(), math.nan])
    if kind == "integer":
        return torch.randint(-1, 4, shape, generator=torch.Generator().manual_seed(draw.randrange(99)))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(draw.randrange(99)))
    types = {
        "normal": torch.float32,
        "bool": torch.bool,
        "half": torch.float16,
        "double": torch.float64,
        "complex": torch.complex64,
    }
    return values.to(types[kind])


def words(draw: random.Random) -> Any:
    return draw.choice(
        ["inverted", "classic", "fan_in", "fan_out", "relu", "linear", "tanh", "nonsense", "", None, 3, "é" * 99]
    )


def irreps(draw: random.Random) -> Any:
    blocks = [
        "2x0e+1x1o",
        "1x1",
        "4x0e",
        "",
        "x",
        "0x1o",
        "1x-1o",
        "99999999999x0e",
        "1x9999999999",
        "2x0e+",
        "9" * 5000,
    ]
    return draw.choice(
        [*blocks, [(2, 0), (1, 1)], [(10**11, 1)], [(1.5, 0)], [()], [None], None, 3, [(1, (0, 1))], [(-1, 0)]]
    )


def flags(draw: random.Random) -> Any:
    return draw.choice([True, False, True, False, None, 1, "yes", torch.tensor(True)])


def others(draw: random.Random) -> Any:
    return draw.choice(
        [None, 3, "cpu", torch.float32, torch.float64, torch.int64, object(), nn.Dropout(0.5), nn.Linear(4, 4), []]
    )


def modules(draw: random.Random) -> Any:
    good = [nn.Sequential(nn.Linear(SIZE, SIZE), dropout.Dropout(0.5)), nn.Dropout(0.5), nn.Sequential(nn.Dropout(1.0))]
    return draw.choice([*good, nn.Linear(SIZE, SIZE), None, 3, "net", [dropout.Dropout()], nn.Dropout])


def generators(draw: random.Random) -> Any:
    return draw.choice([None, None, torch.Generator().manual_seed(0), 3, "cpu"])


def recurrent(draw: random.Random) -> Any:
    cell = draw.choice([nn.LSTMCell(SIZE, SIZE), nn.GRUCell(SIZE, SIZE)])
    good = cells.Weights(*cell.parameters())
    return draw.choice([good, good, good, tuple(good), None, cells.Weights(torch.ones(2), torch.ones(3, 3)), 3])


def layers(draw: random.Random) -> Any:
    return draw.choice(
        [[dropout.Dropout()], [nn.Dropout()], [], None, [3], dropout.Dropout(), [dropout.ConcreteDropout()]]
    )


def states(draw: random.Random) -> Any:
    return draw.choice([torch.zeros(SIZE, SIZE), (torch.zeros(SIZE, SIZE),) * 2, None, 3, (1, 2), torch.zeros(2)])


def masks(draw: random.Random) -> Any:
    one = dropout.RecurrentMasks(state=torch.ones(1, SIZE))
    return draw.choice([one, dropout.RecurrentMasks(), dropout.RecurrentMasks(torch.ones(2, 3, 4, 5)), None, 3, [one]])


NAMED: dict[str, Callable[[random.Random], Any]] = {
    "irreps": irreps, "model": modules, "weights": recurrent, "layers": layers, "state": states, "masks": masks,
    "generator": generators, "device": lambda draw: draw.choice([None, "cpu"]), "dtype": others,
    "site": words, "scheme": words, "mode": words, "nonlinearity": words,
    "sample": integers, "samples": integers, "seed": integers, "rank": integers, "dim": integers, "n": integers, "step": integers,
    "n_steps": integers, "branches": integers, "chunk": integers, "first": integers, "features": integers, "block_size": integers,
    "kinds": integers, "inputs": tensors, "scale": numbers, "temperature": numbers, "draw": numbers, "a": numbers,
}  # fmt: skip
"""What an argument is made of, where its annotation does not tell."""


def argument(parameter: inspect.Parameter, draw: random.Random, owner: str) -> Any:
    name, kind = parameter.name, str(parameter.annotation)
    if owner == "attention" and name == "weights":
        return tensors(draw)
    if name == "masks" and "Tensor" in kind:
        return tensors(draw)
    if name in NAMED:
        return NAMED[name](draw)
    if "Tensor" in kind:
        return tensors(draw)
    makers = {"bool": flags, "float": numbers, "int": integers}
    return next((maker for part, maker in makers.items() if part in kind), others)(draw)


def arguments(call: Callable[..., Any], draw: random.Random, owner: str) -> dict[str, Any]:
    """Return hostile arguments; those with a default are mostly left out."""
    chosen = {}
    for parameter in inspect.signature(call).parameters.values():
        if parameter.default is inspect.Parameter.empty or draw.random() < 0.3:
            chosen[parameter.name] = argument(parameter, draw, owner)
    return chosen


def clear(error: Exception) -> bool:
    """Whether an error is of a clear kind and was raised here, not somewhere within torch."""
    if not isinstance(error, CLEAR) or not str(error) or len(str(error)) > 600:
        return False
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return "forcedrop" in last or last == __file__ or "torch/nn/" in last  # nn.Module.train, nn.init.calculate_gain


def of_the_caller(error: Exception) -> bool:
    """Whether torch names shapes of the caller's that do not fit, or the caller's own network refuses its inputs."""
    text, last = str(error), traceback.extract_tb(error.__traceback__)[-1].filename
    fit = "size of tensor" in text or "shapes cannot be multiplied" in text
    return isinstance(error, RuntimeError) and (fit or "torch/nn/modules" in last)


def run(call: Callable[[], Any], finite: bool) -> str | None:
    """Return what is wrong with a call, if anything."""
    try:
        with warnings.catch_warnings(action="ignore"):
            output = call()
    except Exception as error:
        if clear(error) or of_the_caller(error):
            return None
        return f"{type(error).__name__}: {error} ({traceback.extract_tb(error.__traceback__)[-1]})"
    if finite and isinstance(output, Tensor) and output.is_floating_point() and bool(output.isnan().any()):
        return "NaN from finite input"
    return None


def fuzz_function(name: str, index: int) -> str | None:
    draw, call = random.Random(f"{name} {index}"), getattr(dropout, name)
    chosen = arguments(call, draw, "attention" if name == "attention_dropout" else name)
    torch.manual_seed(index)

    def once() -> Any:
        if name != "frozen":
            return call(**chosen)
        with call(**chosen) as model:
            return model(torch.ones(2, SIZE))

    wrong = run(once, finite=name not in ("gru_cell", "lstm_cell", "regression_summary", "classification_summary"))
    return wrong and f"{name}{chosen}: {wrong}"


def fuzz_layer(name: str, index: int) -> str | None:
    """Make a layer from hostile settings, or set one later, or call a sound one with hostile tensors."""
    draw, kind = random.Random(f"{name} {index}"), getattr(dropout, name)
    torch.manual_seed(index)
    way = index % 3
    if way == 0:
        chosen = arguments(kind, draw, name)
        wrong = run(lambda: kind(**chosen), finite=False)
        return wrong and f"{name}{chosen}: {wrong}"
    layer, x = CASES[name][0](), CASES[name][1](torch.float32, SIZE)
    if way == 1:
        setting = draw.choice(
            [key for key in vars(layer) if not key.startswith("_") and key != "training"] or ["training"]
        )
        value = draw.choice([numbers, integers, flags, irreps])(draw)

        def set_and_call() -> Any:
            setattr(layer, setting, value)
            output = layer(*x)
            return output if output is None else first(output)

        wrong = run(set_and_call, finite=True) if isinstance(layer, dropout.DropoutSite) else None
        return wrong and f"{name}().{setting} = {value!r}: {wrong}"
    chosen = arguments(layer.forward, draw, "attention")
    sound = dict(zip(inspect.signature(layer.forward).parameters, x, strict=False))
    if draw.random() < 0.6:
        chosen = {**chosen, **sound}
    wrong = run(lambda: layer(**chosen), finite=False)
    return wrong and f"{name}()({chosen}): {wrong}"


def campaign(fuzz: Callable[[str, int], str | None], names: list[str], first_index: int, n: int) -> None:
    wrong = [found for index in range(first_index, first_index + n) for name in names if (found := fuzz(name, index))]
    assert not wrong, f"{len(wrong)} of {n * len(names)}:\n" + "\n".join(text[:700] for text in wrong[:20])


def test_functions() -> None:
    campaign(fuzz_function, [*FUNCTIONS, *OTHERS], 0, 30)


def test_layers() -> None:
    campaign(fuzz_layer, sorted(CASES), 0, 45)


@pytest.mark.slow
def test_ten_thousand_functions() -> None:
    campaign(fuzz_function, [*FUNCTIONS, *OTHERS], 1000, 400)


@pytest.mark.slow
def test_ten_thousand_layers() -> None:
    campaign(fuzz_layer, sorted(CASES), 1000, 600)


def test_the_fuzzer_sees_what_is_unclear() -> None:
    def unclear() -> None:
        torch.ones(2, 3) @ torch.ones(2, dtype=torch.int64)

    assert run(unclear, finite=True)
    assert run(lambda: torch.tensor(math.nan), finite=True) == "NaN from finite input"
    assert run(lambda: {}["x"], finite=True)
    assert run(lambda: dropout.Dropout(2.0), finite=True) is None
