"""The traced and compiled step gives the numbers of the eager one, on batches of other shapes than the one it was traced on."""

import shutil
import warnings

import numpy as np
import pytest
import torch
from ase import Atoms

from forcedrop.graph import batch_graphs
from forcedrop.potential import DropoutRates
from forcedrop.training import parse_config
from forcedrop.training.compiled import CompiledStep
from forcedrop.training.loop import Share, Trainer
from forcedrop.training.step import eager_step
from tests.conftest import copper, ethanol, graph_of, make_potential, settings, silicon

RATES = {"edge": 0.3, "message": 0.1, "update": 0.2, "readout": 0.5}
HAS_COMPILER = any(shutil.which(name) for name in ("g++", "clang++", "c++"))


def labelled(atoms: Atoms, seed: int = 0):
    generator = np.random.default_rng(seed)
    return graph_of(atoms, 4.0, energy=-30.0, forces=generator.normal(size=(len(atoms), 3)), stress=np.full(6, 0.01))


def trainer(**shape: object) -> Trainer:
    potential = make_potential(rates=DropoutRates(**RATES), **{"n_channels": 6, "l_max": 1, **shape})
    config = parse_config(settings("nowhere", dropout=RATES))
    return Trainer(potential, [labelled(ethanol())], [labelled(ethanol())], config, scale=1.0)


def batch(*images: Atoms):
    graphs = [labelled(atoms, k) for k, atoms in enumerate(images)]
    made = batch_graphs(graphs)
    counts = torch.tensor([len(graphs), 3 * made.num_nodes, 6 * len(graphs)])
    return Share(**vars(made), places=list(range(len(graphs))), n_whole=len(graphs), label_counts=counts)


def assert_equal_steps(made: Trainer, compiled: CompiledStep, tolerance: float = 1e-10) -> None:
    """Traced on ethanol and silicon; then more and fewer structures, atoms and neighbours."""
    shapes = [
        (ethanol(), silicon()),
        (silicon(), silicon(1), silicon(2)),
        (ethanol(), ethanol(1), silicon(), ethanol(2), ethanol(3)),
        (Atoms("H2", [[0, 0, 0], [0, 0, 0.74]]), Atoms("HO", [[0, 0, 0], [0, 0, 1.0]]), ethanol()),
        (ethanol(),),
        (copper(),),
        (Atoms("H"), Atoms("H")),
    ]
    for images in shapes:
        inputs = made._inputs(batch(*images))
        found, expected = compiled(inputs), made.compute(inputs)
        assert compiled.failure is None
        torch.testing.assert_close(found.values, expected.values, rtol=tolerance, atol=tolerance, equal_nan=True)
        for a, b in zip(found.gradients, expected.gradients, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.abs().max() + 1))


def test_the_trace_holds_for_other_shapes_and_weights() -> None:
    made, traces = trainer(), []
    compiled = CompiledStep(made.objective, compiler=lambda graph: traces.append(graph) or graph)
    assert_equal_steps(made, compiled)
    made.compute = compiled
    for _ in range(2):
        made.run_step(batch(ethanol(), silicon()))
    made.compute = eager_step(made.objective)
    assert_equal_steps(made, compiled)
    assert len(traces) == 1


@pytest.mark.slow  # minutes of compilation
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.skipif(not HAS_COMPILER, reason="NOT TESTED: the compiled step, there is no C++ compiler here")
def test_compiled_code_gives_the_same_numbers() -> None:
    made = trainer(n_layers=1, n_channels=3)
    assert_equal_steps(made, CompiledStep(made.objective))


def test_where_compilation_fails_training_goes_on_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("no C++ compiler\nand a long trace")

    made = trainer()
    compiled, inputs = CompiledStep(made.objective), made._inputs(batch(ethanol(), silicon()))
    monkeypatch.setattr("forcedrop.training.compiled._trace", broken)
    with pytest.warns(UserWarning, match=r"runs eagerly.*RuntimeError: no C\+\+ compiler$"):
        found = compiled(inputs)
    assert torch.equal(found.values, made.compute(inputs).values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(compiled(inputs).values, found.values)  # it warns once


def test_the_key_compiles_the_step() -> None:
    graphs = [labelled(ethanol()), labelled(silicon())]
    made = Trainer(make_potential(), graphs, graphs, parse_config(settings("nowhere", compile=True)), scale=1.0)
    assert isinstance(made.compute, CompiledStep)
    plain = Trainer(make_potential(), graphs, graphs, parse_config(settings("nowhere")), scale=1.0)
    assert not isinstance(plain.compute, CompiledStep)
