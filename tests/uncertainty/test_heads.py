"""Functions that are trained: a shallow ensemble of readouts, and masks; no functions at all."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from forcedrop.derive import derive
from forcedrop.model import load_model
from forcedrop.structures import write_frames
from forcedrop.training import ConfigError, parse_config, train
from forcedrop.training.muon import is_matrix
from forcedrop.training.run import build_potential
from forcedrop.uncertainty.masks import Heads, Plain, TrainedMasks
from forcedrop.uncertainty.method import Labels
from forcedrop.uncertainty.sampling import predict
from tests.conftest import NONE, batch_of, emt_frames, ethanol, make_potential, settings
from tests.uncertainty.test_equations import moved

EMPTY = Labels([], [], quiet=True)


@pytest.mark.parametrize("kind", ["sphere", "painn"])
def test_samples_are_networks_with_the_heads_weights_and_their_mean_is_the_plain_one(kind: str) -> None:
    potential, batch = make_potential(rates=NONE, kind=kind), batch_of([ethanol()], 4.0)
    method = Heads(functions=4, seed=3)
    method.prepare(potential)
    assert potential.correction.bank.requires_grad
    assert not potential.correction.weight.requires_grad
    heads = potential.correction.bank.detach().clone()
    assert float(heads.std()) == pytest.approx(0.1 / potential.n_features**0.5, rel=0.2)
    method.fill(potential, EMPTY)
    assert not any(weight is potential.correction.bank for weight in potential.parameters())
    out = predict(potential, batch, n_samples=4)
    for k in range(4):
        expected = derive(moved(make_potential(rates=NONE, kind=kind), heads[k]), batch)
        torch.testing.assert_close(out.samples.forces[k], expected.forces, rtol=0, atol=1e-9)
        torch.testing.assert_close(out.samples.energy[k], expected.energy, rtol=0, atol=1e-9)
    mean = derive(moved(make_potential(rates=NONE, kind=kind), heads.mean(0)), batch)
    torch.testing.assert_close(derive(potential, batch).forces, mean.forces, rtol=0, atol=1e-9)
    torch.testing.assert_close(out.mean.forces, mean.forces, rtol=0, atol=1e-9)
    torch.testing.assert_close(predict(potential, batch, n_samples=3).mean.energy, mean.energy, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="bank holds 4 functions, asked for 5"):
        predict(potential, batch, n_samples=5)


def test_heads_are_not_a_map_between_channels() -> None:
    potential = make_potential(rates=NONE)
    Heads(functions=8).prepare(potential)
    assert not is_matrix("correction.bank", potential.correction.bank)


def test_training_learns_all_heads_and_the_model_keeps_them(tmp_path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(40, seed=0))
    config = parse_config(
        settings(
            tmp_path,
            uncertainty={"method": "heads", "functions": 5, "frames": None},
            epochs=4,
            optimiser={"warmup_steps": 0},
        )
        | {"uncertainty": {"method": "heads", "functions": 5}}
    )
    model = train(config)
    potential = model.potential
    assert (model.n_functions, model.uncertainty["method"]) == (5, "heads")
    assert model.calibration is not None
    from forcedrop.training.data import build_graphs, prepare_data

    data = prepare_data(config)
    graphs = build_graphs(data.split.train, 4.0, torch.float64, "", True)
    drawn = build_potential(config, data, graphs, torch.device("cpu"), torch.float64).correction.bank.detach()
    learned = potential.correction.weight + potential.correction.bank
    assert bool(((learned - drawn).abs().flatten(1).max(dim=1).values > 1e-4).all()), "every head is learned"
    spread = learned - drawn - (learned - drawn).mean(0)
    assert float(spread.abs().max()) > 1e-4, "and not all alike"
    torch.testing.assert_close(potential.correction.bank.mean(0), torch.zeros_like(learned[0]), rtol=0, atol=1e-12)
    again = load_model(tmp_path / "run" / "model.pt")
    batch = batch_of([emt_frames(1, seed=9)[0].to_atoms()], 4.0)
    one, two = (predict(p, batch, n_samples=5) for p in (potential, again.potential))
    np.testing.assert_array_equal(one.samples.forces, two.samples.forces)
    assert model.functions_for()[0] == 5


def test_masks_that_nothing_drops_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`uncertainty\.method: masks` needs a rate above 0 in `dropout`"):
        parse_config({"output": "o", "data": {"train": ["a.xyz"]}, "uncertainty": {"method": "masks"}})
    assert TrainedMasks(functions=7).training_functions([0.0, 0.1]) == 7


def test_what_a_method_trains() -> None:
    rates = [0.0, 0.1]
    assert (Heads(functions=5).training_functions(rates), Plain().training_functions([0.0])) == (5, 0)
    assert Plain().training_functions(rates) is None  # masks of a training that uses none afterwards: any number
    with pytest.raises(ValueError, match="`functions` must be at least 2, got 1"):
        Heads(functions=1)


def test_trained_masks_are_the_masks_of_training_and_are_kept(tmp_path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(24, seed=0))
    values = settings(tmp_path, epochs=2, dropout={"edge": 0.2, "update": 0.1, "readout": 0.3})
    values["uncertainty"] = {"method": "masks", "functions": 6, "seed": 2}
    model = train(parse_config(values))
    again = load_model(tmp_path / "run" / "model.pt")
    for found in (model, again):
        assert {site.p for site in found.potential.inner_sites.values()} == {0.0, 0.1, 0.2, 0.3}
        assert found.potential.n_functions is None
        assert (found.n_functions, found.seed, found.functions_for()) == (6, 2, (6, 2))
        with pytest.warns(UserWarning, match="trained with the 6 masks of seed 2, asked for 7 of seed 2"):
            found.functions_for(7)
        with pytest.warns(UserWarning, match="asked for 4 of seed 3"):
            found.functions_for(4, 3)


def test_no_functions_no_error_bars(tmp_path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(24, seed=0))
    values = settings(tmp_path, epochs=1, dropout={"readout": 0.3})
    values["uncertainty"] = {"method": "none"}
    model = train(parse_config(values))
    assert (model.calibration, model.potential.n_functions) == (None, 0)
    assert not any(site.p for site in model.potential.inner_sites.values())
    with pytest.raises(ValueError, match="no bank of functions and no dropout site"):
        model.functions_for()
