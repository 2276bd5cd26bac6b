"""What torch.nn.Dropout can do, every layer can, or says in one sentence why not: a table of layers and abilities."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from forcedrop import dropout
from forcedrop.dropout import frozen, mc_samples
from tests.dropout.abilities import CASES, REAL_ONLY, first

EVERY = pytest.mark.parametrize("name", sorted(CASES))


def make(name: str) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CASES[name][0]()


def inputs(name: str, rows: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return CASES[name][1](dtype, rows)


def test_no_layer_is_missing() -> None:
    public = {name for name in dropout.__all__ if isinstance(getattr(dropout, name), type)}
    layers = {name for name in public if issubclass(getattr(dropout, name), nn.Module)}
    assert layers - set(CASES) == {"DropoutSite"}
    assert set(CASES) <= layers


@EVERY
def test_scripting_is_refused_in_one_sentence(name: str) -> None:
    network = nn.Sequential(make(name))
    with (
        warnings.catch_warnings(action="ignore"),
        pytest.raises(NotImplementedError, match=f"torch.jit.script cannot compile {name}, .* use torch.compile"),
    ):
        torch.jit.script(network)
    assert type(network[0]).__name__ == name  # torch puts what it has prepared into the user's own network


@EVERY
def test_traced_in_training_it_draws_for_any_batch(name: str) -> None:
    layer = make(name).train()
    with warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(layer, inputs(name), check_trace=False)
    one, *more = (first(traced(*inputs(name, 7))) for _ in range(20))  # two draws of few channels may be equal
    assert one.shape == first(layer(*inputs(name, 7))).shape
    if name != "EdgeCutDropout":  # it may cut nothing
        assert not all(torch.equal(one, other) for other in more)


@EVERY
def test_traced_while_frozen_it_is_the_function(name: str) -> None:
    layer = make(name).eval()
    with frozen(layer, 0, 1), warnings.catch_warnings(action="ignore"):
        traced = torch.jit.trace(layer, inputs(name))
        expected = first(layer(*inputs(name)))
    torch.testing.assert_close(first(traced(*inputs(name))), expected)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_types(name: str, dtype: torch.dtype) -> None:
    layer, x = make(name).to(dtype).train(), inputs(name, dtype=dtype)
    for sample in (None, 1):
        with frozen(layer, 0, sample or 0):
            y = first(layer(*x))
        assert y.dtype == dtype
        assert bool(y.isfinite().all())
    assert first(layer(*x)).dtype == dtype


@EVERY
def test_complex_numbers_are_scaled_by_real_ones_or_refused(name: str) -> None:
    layer, real = make(name).train(), inputs(name)
    x = tuple(t * (1 + 2j) if t.is_floating_point() else t for t in real)
    if name in REAL_ONLY:
        with pytest.raises(TypeError, match=r"needs real numbers|needs inputs of that type"):
            layer(*x)
        return
    with frozen(layer, 0, 1):
        torch.testing.assert_close(first(layer(*x)), first(layer(*real)) * (1 + 2j))
    y = first(layer(*x))  # a fresh draw
    torch.testing.assert_close(y.imag, 2 * y.real)


@EVERY
def test_on_the_meta_device(name: str) -> None:
    layer, x = make(name).to("meta").train(), [t.to("meta") for t in inputs(name)]
    assert first(layer(*x)).is_meta
    with frozen(layer, 0, 1):
        assert first(layer(*x)).is_meta
    assert name in repr(layer)


@EVERY
def test_no_entries_at_all(name: str) -> None:
    layer, x = make(name).train(), inputs(name, 0)
    shape = first(layer(*x)).shape
    assert shape.numel() == 0
    with frozen(layer, 0, 1):
        assert first(layer(*x)).shape == shape


@EVERY
def test_compiles_and_exports_frozen(name: str) -> None:
    layer, x = make(name).eval(), inputs(name)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with frozen(layer, 0, 1):
        expected = first(layer(*x))
        torch.testing.assert_close(first(compiled(*x)), expected)
        with warnings.catch_warnings(action="ignore"):
            exported = torch.export.export(layer, x).module()
    torch.testing.assert_close(first(exported(*x)), expected)
    torch._dynamo.reset()


@EVERY
def test_vmap_over_inputs_and_over_functions(name: str) -> None:
    layer, x = make(name).train(), inputs(name)
    many = tuple(torch.stack([t] * 3) for t in x)
    drawn = torch.func.vmap(lambda *x: first(layer(*x)), randomness="different")(*many)
    assert drawn.shape == (3, *first(layer(*x)).shape)
    together = mc_samples(layer, x, 4, vectorised=True)
    torch.testing.assert_close(first(together), first(mc_samples(layer, x, 4, vectorised=False)))


@EVERY
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies_made_inside_a_context_stay_the_function(name: str, way: str) -> None:
    layer, x = make(name).eval(), inputs(name)
    plain = layer(*x)
    with frozen(layer, 0, 1):
        expected = first(layer(*x))
        twin = copied(layer, way)
    assert equal(layer(*x), plain)
    assert equal(first(twin(*x)), expected)
    with frozen(twin, 0, 2), frozen(layer, 0, 2):
        assert equal(first(twin(*x)), first(layer(*x)))
    assert equal(first(twin(*x)), expected)


def copied(network: nn.Module, way: str) -> nn.Module:
    if way == "deepcopy":
        return copy.deepcopy(network)
    if way == "pickle":
        twin: nn.Module = pickle.loads(pickle.dumps(network))
        return twin
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def equal(one: Any, other: Any) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(first(one), first(other))
