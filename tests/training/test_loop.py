import pytest
import torch

from forcedrop.derive import derive
from forcedrop.dropout import frozen
from forcedrop.graph import batch_graphs, graph_loader
from forcedrop.potential import DropoutRates, EnergyModel
from forcedrop.training import parse_config
from forcedrop.training.config import LossSection
from forcedrop.training.loop import Trainer, TrainingDiverged
from forcedrop.training.losses import plain_loss, targets
from forcedrop.uncertainty.masks import Heads
from forcedrop.uncertainty.sampling import predict
from tests.conftest import emt_frames, graph_of, make_potential, settings


def trainer(potential: EnergyModel | None = None, values: dict | None = None, **changes: object) -> Trainer:
    frames = emt_frames(12)
    graphs = [
        graph_of(f.to_atoms(), 4.0, energy=f.energy, forces=f.forces, stress=f.stress, source=f.source) for f in frames
    ]
    config = parse_config(values or settings("nowhere", **changes))
    return Trainer(potential or make_potential((29,), config.dropout.rates), graphs[:9], graphs[9:], config, scale=1.0)


def first_batch(made: Trainer):
    return next(iter(made.batches()))


MASKS = {
    "dropout": {"edge": 0.3, "message": 0.1, "update": 0.2, "readout": 0.5},
    "uncertainty": {"method": "masks", "functions": 4, "seed": 3},
}


def masked(**changes: object) -> Trainer:
    """A training of four masks."""
    values = settings("nowhere", **{k: v for k, v in {**MASKS, **changes}.items() if k != "uncertainty"})
    return trainer(values={**values, "uncertainty": MASKS["uncertainty"]})


def test_each_structure_of_a_step_takes_a_function_of_its_own() -> None:
    made = masked()
    batch = first_batch(made)
    functions, (species, *_) = made._functions(batch), made._graph_inputs(batch)
    assert functions.shape == species.shape
    for structure in range(batch.num_graphs):
        mine = functions[batch.batch == structure]
        assert (mine == mine[0]).all()  # shared over the structure's atoms
    again = made._functions(batch)
    seen = set()
    for step in range(12):
        made.progress.step = step
        seen |= set(made._functions(batch).tolist())
        if step == 1:
            assert not torch.equal(made._functions(batch), functions)
    assert torch.equal(functions, again)
    assert seen == {0, 1, 2, 3}
    anything = trainer(dropout={"update": 0.2})._functions(batch)
    assert len(set(anything.tolist()) - {0, 1, 2, 3}) == batch.num_graphs  # no bank: any mask there is
    assert trainer()._functions(batch) is None


@pytest.mark.parametrize("dropout", [True, False])
def test_a_step_minimises_the_error_of_masked_or_plain_networks(dropout: bool) -> None:
    """Each structure on its own, frozen to its function."""
    made = masked() if dropout else trainer()
    batch = first_batch(made)
    loss = made.compute(made._inputs(batch)).values[2]
    graphs = [next(g for g in made.graphs if g.source == source) for source in batch.source]
    parts = []
    for number, graph in enumerate(graphs):
        alone = batch_graphs([graph])
        if dropout:
            function = int(made._functions(batch)[batch.batch == number][0])
            with frozen(made.potential, 3, function):
                found = derive(made.potential, alone)
        else:
            found = derive(made.potential, alone)
        parts.append(plain_loss(found, targets(alone), LossSection(), made.scale, ramp=0.01).detach())
    torch.testing.assert_close(loss, torch.stack(parts).mean())


def test_heads_learn_side_by_side_each_from_the_structures_that_take_it() -> None:
    values = {**settings("nowhere"), "uncertainty": {"method": "heads", "functions": 5}}
    potential = make_potential((29,), DropoutRates())
    Heads(functions=5).prepare(potential)
    made = trainer(potential, values=values)
    batch = first_batch(made)
    result = made.compute(made._inputs(batch))
    place = [i for i, weight in enumerate(made.weights) if weight is potential.correction.bank]
    gradient = result.gradients[place[0]].flatten(1).abs().amax(1)
    taken = set(made._functions(batch).tolist())
    assert {k for k in range(5) if gradient[k] > 0} == taken
    assert len(taken) < 5


def test_energy_and_stress_weights_grow_while_the_rate_falls() -> None:
    made, seen = trainer(optimiser={"warmup_steps": 0}, loss={"ramp": 0.01}), []
    steps = made.config.epochs * made.steps_per_epoch
    for done in range(steps):
        made.progress.epoch, made.progress.step = divmod(done, made.steps_per_epoch)
        seen.append((made.ramp(), made.schedule()))
    ramp, rate = zip(*seen, strict=True)
    assert ramp[0] == pytest.approx(0.01)
    assert ramp[steps // 3] == pytest.approx(0.01 ** (2 / 3), rel=1e-6)
    assert list(ramp) == sorted(ramp)
    assert list(rate) == sorted(rate, reverse=True)
    made.progress.epoch, made.progress.step = made.config.epochs, 0
    assert made.ramp() == 1.0


def test_centres_are_measured_with_masks_and_left_alone_without() -> None:
    for dropout in (True, False):
        made = masked() if dropout else trainer()
        site = made.potential.hidden_dropout
        site.centre.zero_()
        made.run_step(first_batch(made))
        assert bool(site.centre.any()) is dropout
        assert torch.equal(made.ema.module.hidden_dropout.centre, site.centre)


def test_validation_is_of_the_plain_network_unless_masks_are_trained() -> None:
    for dropout in ({}, {"update": 0.2}):
        made = trainer(dropout=dropout)
        (batch,) = graph_loader(made.validation, [[0, 1, 2]])
        found = derive(made.potential, batch)
        expected = 1e3 * float((found.forces - batch.forces).square().mean().sqrt())
        assert made.validate().forces == pytest.approx(expected)
    made = masked()  # the mean of the first few of them
    (batch,) = graph_loader(made.validation, [[0, 1, 2]])
    mean = predict(made.potential, batch, n_samples=4, seed=3).mean
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
    with pytest.raises(TrainingDiverged, match=f"loss is nan.*epoch 1, step 2, in a batch of {sources}"):
        made.check()


def test_a_request_to_stop_is_remembered_until_asked_for() -> None:
    made = trainer(batch_size=2)
    made.check_every = 4
    for number, batch in enumerate(made.batches()):
        made.run_step(batch, ["SIGTERM"] if number == 1 else ())
    assert made.check()
