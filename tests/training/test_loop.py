import pytest
import torch

from forcedrop.derive import derive
from forcedrop.graph import graph_loader
from forcedrop.potential import DropoutRates, Potential
from forcedrop.sampling import draw_masks, predict
from forcedrop.training import parse_config
from forcedrop.training.config import LossSection
from forcedrop.training.loop import Trainer, TrainingDiverged
from forcedrop.training.losses import plain_loss, targets
from tests.conftest import emt_frames, graph_of, make_potential, settings


def trainer(potential: Potential | None = None, **changes: object) -> Trainer:
    frames = emt_frames(12)
    graphs = [
        graph_of(f.to_atoms(), 4.0, energy=f.energy, forces=f.forces, stress=f.stress, source=f.source) for f in frames
    ]
    config = parse_config(settings("nowhere", **changes))
    return Trainer(potential or make_potential(elements=(29,)), graphs[:9], graphs[9:], config, scale=1.0)


def first_batch(made: Trainer):
    return next(iter(made.batches()))


def test_masks_of_a_step_come_from_the_bank_one_function_per_structure() -> None:
    made = trainer()
    batch = first_batch(made)
    masks = made._training_masks(batch, 3)
    bank = draw_masks(made.potential, batch, 0, 4)
    edges = {site.name for site in made.potential.sites if not site.n_channels}
    assert edges < set(masks) == set(bank)
    for name in set(masks) - edges:
        assert masks[name].shape[:2] == (3, batch.num_nodes)
        for structure in range(batch.num_graphs):
            mine = masks[name][:, batch.batch == structure]
            assert (mine == mine[:, :1]).all()  # shared over the structure's atoms
            number = [int((bank[name] == row).all(1).nonzero()[0, 0]) for row in mine[:, 0]]
            assert len({tuple(bank[name][k].tolist()) for k in number}) == len(
                {tuple(row.tolist()) for row in mine[:, 0]}
            )
    again = made._training_masks(batch, 3)
    made.progress.step += 1
    other = made._training_masks(batch, 3)
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    assert any(not torch.equal(masks[name], other[name]) for name in masks)


@pytest.mark.parametrize("dropout", [True, False])
def test_stage_one_minimises_the_error_of_masked_or_plain_networks(dropout: bool) -> None:
    made = trainer(stage_one={"dropout": dropout})  # stage two trains masks in both cases
    assert made.masked is dropout
    batch = first_batch(made)
    masks = {name: mask[0] for name, mask in made._training_masks(batch, 1).items()} if dropout else None
    expected = plain_loss(derive(made.potential, batch, masks), targets(batch), LossSection(), made.scale, ramp=0.01)
    loss = made.compute(made._inputs(batch)).values[2]
    torch.testing.assert_close(loss, expected.detach())


def test_energy_and_stress_weights_grow_while_the_rate_falls() -> None:
    made, seen = trainer(optimiser={"warmup_steps": 0}, loss={"ramp": 0.01}), []
    steps = made.config.stage_one.epochs * made.steps_per_epoch
    for done in range(steps):
        made.progress.epoch, made.progress.step = divmod(done, made.steps_per_epoch)
        seen.append((made.ramp(), made.schedule()))
    ramp, rate = zip(*seen, strict=True)
    assert ramp[0] == pytest.approx(0.01)
    assert ramp[steps // 2] == pytest.approx(0.1, rel=1e-6)
    assert list(ramp) == sorted(ramp)
    assert list(rate) == sorted(rate, reverse=True)
    made.progress.stage = 1
    assert made.ramp() == 1.0


def test_centres_are_measured_with_masks_and_left_alone_without() -> None:
    for dropout in (True, False):
        made = trainer(stage_one={"dropout": dropout})
        made.potential.mask.centre.zero_()
        made.run_step(first_batch(made))
        assert bool(made.potential.mask.centre.any()) is dropout
        assert torch.equal(made.ema.module.mask.centre, made.potential.mask.centre)


def test_a_network_without_sites_trains_plainly() -> None:
    plain = make_potential(elements=(29,), rates=DropoutRates(0, 0, 0, 0))
    made = trainer(plain, dropout={"edge": 0, "update": 0, "readout": 0, "message": 0}, stage_two={"epochs": 0})
    assert not made.masked
    made.run_step(first_batch(made))


def test_validation_of_stage_one_is_the_mean_of_the_first_masks() -> None:
    made = trainer()
    (batch,) = graph_loader(made.validation, [[0, 1, 2]])
    mean = predict(made.potential, batch, n_samples=4, seed=0).mean
    expected = 1e3 * float((mean.forces - batch.forces).square().mean().sqrt())
    assert made.validate().forces == pytest.approx(expected)


def test_workers_and_order_give_the_same_batches() -> None:
    alone, helped = trainer(), trainer(workers=1)
    for a, b in zip(alone.batches(), helped.batches(), strict=True):
        assert a.source == b.source
        assert torch.equal(a.nbr_reverse, b.nbr_reverse)
    assert sorted(s for batch in alone.batches() for s in batch.source) == sorted(g.source for g in alone.graphs)


def test_a_bad_gradient_that_is_noticed_later_counts_as_zero() -> None:
    """As on a GPU, which is asked only now and then."""
    made = trainer(batch_size=2)
    made.check_every = 4
    for number, batch in enumerate(made.batches(), 1):
        if number == 2:
            batch.forces[0] = float("nan")
            sources = ", ".join(batch.source)
        made.run_step(batch, ["SIGTERM"] if number == 3 else ())
        assert made.check_due is (number in (4, 5))
    assert all(torch.isfinite(w).all() for w in made.potential.parameters())
    with pytest.raises(TrainingDiverged, match=f"loss is nan.*stage 1, epoch 1, step 2, in a batch of {sources}"):
        made.check()


def test_a_request_to_stop_is_remembered_until_asked_for() -> None:
    made = trainer(batch_size=2)
    made.check_every = 4
    for number, batch in enumerate(made.batches()):
        made.run_step(batch, ["SIGTERM"] if number == 1 else ())
    assert made.check()
