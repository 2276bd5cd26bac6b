"""The shallow ensemble: several readouts of one body, learned in stage two."""

import numpy as np
import pytest
import torch

from forcedrop.derive import derive
from forcedrop.potential import READOUT_SHIFT, DropoutRates
from forcedrop.sampling import predict
from forcedrop.structures import write_frames
from forcedrop.training import load_model, parse_config, train
from forcedrop.training.config import ConfigError
from forcedrop.training.muon import is_matrix
from tests.conftest import batch_of, emt_frames, ethanol, make_potential
from tests.training.test_posterior import of_hidden, shifted

NONE = DropoutRates(0, 0, 0, 0)


def test_samples_are_networks_with_the_heads_readouts_and_their_mean_is_the_plain_one() -> None:
    potential, batch = make_potential(rates=NONE, n_heads=4), batch_of([ethanol()], 4.0)
    with torch.no_grad():
        potential.heads.copy_(of_hidden(potential, 4))
    out = predict(potential, batch, n_samples=4)
    for k in range(4):
        expected = derive(shifted(potential, potential.heads[k].detach() - potential.heads.detach().mean(0)), batch)
        torch.testing.assert_close(out.samples.forces[k], expected.forces, rtol=0, atol=1e-9)
    torch.testing.assert_close(out.mean.forces, derive(potential, batch).forces, rtol=0, atol=1e-9)
    torch.testing.assert_close(predict(potential, batch, n_samples=3).mean.energy, out.mean.energy, rtol=0, atol=1e-9)
    with pytest.raises(ValueError, match="has 4 heads, asked for 5 samples"):
        predict(potential, batch, n_samples=5)


def test_heads_are_not_a_map_between_channels() -> None:
    potential = make_potential(rates=NONE, n_heads=8)
    assert not is_matrix("heads", potential.heads)


def test_stage_two_learns_the_heads_and_the_model_keeps_them(tmp_path) -> None:
    write_frames(tmp_path / "train.h5", emt_frames(40, seed=0))
    config = parse_config(
        {
            "output": str(tmp_path / "run"),
            "data": {"train": [str(tmp_path / "train.h5")], "calibration_fraction": 0.2},
            "model": {"cutoff": 4.0, "n_channels": 4, "l_max": 2, "n_radial": 4, "n_hidden": 6, "n_heads": 5},
            "stage_one": {"epochs": 2},
            "stage_two": {"epochs": 2},
            "optimiser": {"warmup_steps": 0},
            "precision": "float64",
        }
    )
    model = train(config)
    potential = model.potential
    assert potential.posterior is None
    assert model.bank == 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = type(potential)(potential.config).double().heads
    moved = (potential.heads - drawn).abs().max(dim=1).values
    assert bool((moved > 1e-4).all()), "every head is learned"
    again = load_model(tmp_path / "run" / "model.pt")
    batch = batch_of([emt_frames(1, seed=9)[0].to_atoms()], 4.0)
    one, two = (predict(p, batch, n_samples=5) for p in (potential, again.potential))
    np.testing.assert_array_equal(one.samples.forces, two.samples.forces)
    assert model.masks_for(None, None)[0] == 5
    assert READOUT_SHIFT not in {site.name for site in potential.sites}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"n_heads": 1}, "stage_two": {"epochs": 2}},
        {"model": {"n_heads": 4}},
        {"model": {"n_heads": 4}, "stage_two": {"epochs": 2}, "dropout": {"update": 0.1}},
    ],
)
def test_heads_that_nothing_would_train_are_refused(changes) -> None:
    with pytest.raises(ConfigError, match="a shallow ensemble needs"):
        parse_config({"output": "o", "data": {"train": ["a.xyz"]}, **changes})
