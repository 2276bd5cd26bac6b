"""The training loop, resumable at any step to the same numbers.

Everything random is a function of (seed, epoch, step), and the learning rate of the step, so a checkpoint holds numbers
and no generator: weights, averaged weights, optimiser moments, and where it was.

With several processes (``parallel.py``) each has the same weights, computes the gradient of its share of the batch, and takes
the same step from the sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from forcedrop.derive import geometry
from forcedrop.door import Refused, short
from forcedrop.graph import AtomicGraph, Batch, batch_graphs, graph_loader, pair_vectors
from forcedrop.potential import EnergyModel, GraphInputs
from forcedrop.training.compiled import CompiledStep
from forcedrop.training.config import TrainConfig
from forcedrop.training.losses import targets
from forcedrop.training.muon import make_optimisers
from forcedrop.training.parallel import World
from forcedrop.training.step import Objective, Step, StepInputs, eager_step
from forcedrop.training.validate import Errors, validate

CHECK_EVERY = 20
"""Steps after which a GPU is asked whether all is well; asking makes the processor wait for it. A CPU is asked every step."""

CENTRE_EVERY = 50
"""Steps after which it is measured anew about which values masks act."""


class TrainingDiverged(RuntimeError):
    """The loss is not a number; the message names the frames of the step."""


class TrainingInterrupted(RuntimeError):
    """Training was asked to stop; a resumable checkpoint was written."""


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        done: whether it is over.
        epoch: epochs finished.
        step: steps finished in this epoch.
        best_loss: lowest validation loss.
        best_epoch: when that was.
        seconds: time spent so far.
        history: one row an epoch.
    """

    done: bool = False
    epoch: int = 0
    step: int = 0
    best_loss: float = math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def check(self) -> None:
        """Check the values of a checkpoint.

        Raises:
            Refused: naming what cannot be.
        """
        counts = {"epoch": self.epoch, "step": self.step, "best_epoch": self.best_epoch + 1}
        for name, value in counts.items():
            if type(value) is not int or value < 0:
                raise Refused(f"`{name}` must be a whole number, got {short(value)}")
        if not isinstance(self.done, bool) or not isinstance(self.best_loss, float) or math.isnan(self.best_loss):
            raise Refused(f"`done` and `best_loss` cannot be {short(self.done)} and {short(self.best_loss)}")
        if not isinstance(self.history, list) or not isinstance(self.seconds, int | float):
            raise Refused(f"`history` and `seconds` cannot be {short(self.history)} and {short(self.seconds)}")


@dataclass(eq=False)
class Share(Batch):
    """What one process computes of a batch.

    Attributes:
        places: of its structures in the whole batch.
        n_whole: structures of the whole batch.
        label_counts: energies, force components and stress components of the whole batch, shape (3,).
    """

    places: list[int]
    n_whole: int
    label_counts: Tensor


class Trainer:
    """Owns the weights and moments of one training; the files around it belong to ``run.py``.

    Args:
        potential: the network, on its device, norms measured.
        graphs: training graphs.
        validation: validation graphs.
        config: the training file.
        scale: the forces' root mean square of the training set [eV/Å].
        world: the processes that train together.
    """

    def __init__(
        self,
        potential: EnergyModel,
        graphs: list[AtomicGraph],
        validation: list[AtomicGraph],
        config: TrainConfig,
        scale: float,
        world: World | None = None,
    ) -> None:
        # masks are functions that are handed in, never drawn within a network in training mode
        self.config, self.potential = config, potential.eval()
        self.functions = config.training_functions
        self.graphs, self.validation = graphs, validation
        self.device = potential.device
        self.scale = torch.tensor(scale, dtype=potential.dtype, device=self.device)
        self.world = world or World()
        self.world.copy_from_first([*potential.parameters(), *potential.buffers()])
        self.check_every = CHECK_EVERY if self.device.type == "cuda" else 1
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self._labels = _label_counts(graphs)
        some = torch.randperm(len(graphs), generator=torch.Generator().manual_seed(config.seed))[:24].tolist()
        self._typical = batch_graphs([graphs[i] for i in some]).to(self.device)
        self._running: list[Tensor] = []
        self._start()

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the training set."""
        return math.ceil(len(self.graphs) / self.config.batch_size)

    @property
    def steps_done(self) -> int:
        """Steps behind us; all of them once the training is over."""
        return self.config.epochs * self.steps_per_epoch if self.progress.done else self._now

    def _start(self) -> None:
        settings = self.config.optimiser
        self.optimisers = make_optimisers(self.potential, settings)
        self.ema = AveragedModel(self.potential, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))
        self.objective = Objective(self.potential, self.config.loss, self.scale, self.config.uncertainty.seed)
        self.weights = self.objective.weights
        self.compute: Step = CompiledStep(self.objective) if self.config.compile else eager_step(self.objective)
        self._verdict = torch.tensor([0.0, -1.0, 0.0, 0.0], dtype=torch.float64, device=self.device)

    def schedule(self) -> float:
        """Return the next step's share of the learning rates: linear warm-up, then half a cosine to 0 at the end."""
        warm = min(1.0, (self._now + 1) / (self.config.optimiser.warmup_steps + 1))
        return warm * 0.5 * (1 + math.cos(math.pi * self._passed))

    def ramp(self) -> float:
        """Return the next step's factor of the energy and stress weights: grows geometrically to 1."""
        return self.config.loss.ramp ** (1 - self._passed)

    @property
    def _now(self) -> int:
        """Steps that are behind us."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    @property
    def _passed(self) -> float:
        """The share of the steps that is behind us."""
        return self._now / (self.config.epochs * self.steps_per_epoch)

    def _batch_indices(self) -> list[list[int]]:
        """Return the structures of every batch of this epoch, in an order that depends on (seed, epoch) alone."""
        where = (self.config.seed * 2_000_006 + self.progress.epoch) % 2**63
        order = torch.randperm(len(self.graphs), generator=torch.Generator().manual_seed(where)).tolist()
        size = self.config.batch_size
        return [order[first : first + size] for first in range(0, len(order), size)]

    def batches(self) -> Iterator[Share]:
        """Yield what is left of this epoch: of every batch, this process's share.

        Where there is nothing to share, a structure without labels stands in.
        """
        whole = self._batch_indices()[self.progress.step :]
        mine = [self.world.share(indices) or indices[:1] for indices in whole]
        pin = self.device.type == "cuda"
        loader = graph_loader(self.graphs, mine, workers=self.config.workers, pin_memory=pin)
        for indices, batch in zip(whole, loader, strict=True):
            if self.world.rank >= len(indices):
                none = {name: torch.zeros_like(batch[name]) for name in ("has_energy", "has_forces", "has_stress")}
                batch = replace(batch, **none)
            counts = self._labels[indices].sum(0)
            share = Share(
                **vars(batch),
                places=self.world.share(range(len(indices))) or [0],
                n_whole=len(indices),
                label_counts=counts.pin_memory() if pin else counts,
            )
            yield share.to(self.device, non_blocking=pin)

    def run_step(self, batch: Share, stop: Sequence[str] = ()) -> None:
        """Take one step; ``stop`` holds something once this process was asked to stop.

        Raises:
            TrainingDiverged: on a CPU, if the loss or the gradient is not finite; the weights are those before the step. On a
                GPU the gradient counts as 0 from then on, until :meth:`check` raises.
        """
        if self.functions != 0 and self._now % CENTRE_EVERY == 0:
            graph, vec = geometry(self.potential, self._typical)
            self.potential.measure_centres(vec, graph)
        share = self.schedule()
        for group in (g for optimiser in self.optimisers for g in optimiser.param_groups):
            group["lr"] = share * group["initial_lr"]
        values, gradients = self.compute(self._inputs(batch))
        weights = [w for w, g in zip(self.weights, gradients, strict=True) if g is not None]
        own = [values, values.new_full((1,), float(bool(stop))), *(g.flatten() for g in gradients if g is not None)]
        values, asked, gradient = self.world.sum(torch.cat(own)).split([3, 1, sum(w.numel() for w in weights)])
        norm = gradient.norm()
        self._judge(asked[0], values[2], norm)
        if self.check_every == 1:
            self._raise_if_diverged()
        gradient = gradient * (self.config.optimiser.clip_gradient / (norm + 1e-6)).clamp(max=1.0)
        if self.check_every > 1:
            gradient = torch.where(self._verdict[1] < 0, gradient, 0.0)
        for weight, part in zip(weights, gradient.split([w.numel() for w in weights]), strict=True):
            weight.grad = part.view_as(weight)
        for optimiser in self.optimisers:
            optimiser.step()
        self.ema.update_parameters(self.potential)
        self.progress.step += 1
        self._running.append(values)

    def _judge(self, asked: Tensor, loss: Tensor, norm: Tensor) -> None:
        """Note who asked to stop, and the first step whose loss or gradient is not finite: step, loss and norm."""
        old = self._verdict
        bad = (old[1] < 0) & ~torch.isfinite(loss + norm)
        new = torch.stack([torch.full_like(old[1], self.progress.step), loss.to(old.dtype), norm.to(old.dtype)])
        self._verdict = torch.cat([old[:1] + asked, torch.where(bad, new, old[1:])])

    @property
    def check_due(self) -> bool:
        """Whether :meth:`check` is to be called now, on all processes alike, as before anything is written."""
        return self.progress.step % self.check_every == 0 or self.progress.step == self.steps_per_epoch

    def check(self) -> bool:
        """Return whether any process was asked to stop.

        Raises:
            TrainingDiverged: if the loss or the gradient of a step was not finite; the message names its frames.
        """
        self._raise_if_diverged()
        return bool(self._verdict[0] > 0)

    def _raise_if_diverged(self) -> None:
        _, step, loss, norm = self._verdict.tolist()
        if step < 0:
            return
        where = f"epoch {self.progress.epoch + 1}, step {int(step) + 1}"
        sources = ", ".join(self.graphs[i].source for i in self._batch_indices()[int(step)])
        raise TrainingDiverged(f"the loss is {loss}, its gradient's norm {norm} at {where}, in a batch of {sources}")

    def _inputs(self, batch: Share) -> StepInputs:
        """Return what the step needs."""
        graph = self._graph_inputs(batch)
        vec = pair_vectors(batch, 2 * self.potential.cutoff, self.potential.dtype)
        ramp = self._moved(torch.tensor(self.ramp(), dtype=vec.dtype))
        return StepInputs(vec, graph, self._functions(batch), targets(batch, batch.label_counts), ramp)

    def _graph_inputs(self, batch: Batch) -> GraphInputs:
        """Return the neighbour lists; the elements were checked when the network was made for them."""
        return GraphInputs(
            species=self.potential.species_of_z[batch.z],
            batch=batch.batch,
            nbr=batch.nbr,
            reverse=batch.nbr_reverse,
            n_graphs=batch.num_graphs,
        )

    def _functions(self, batch: Share) -> Tensor | None:
        """Return the function of every atom's structure, another for each structure and step; None for the plain network."""
        if self.functions == 0:
            return None
        where = (self.config.seed * 2_000_006 + self.progress.epoch) * 1_000_003 + self.progress.step
        where %= 2**63
        generator = torch.Generator().manual_seed(where)
        drawn = torch.randint(self.functions or 2**62, (batch.n_whole,), generator=generator)
        return self._moved(drawn[batch.places])[batch.batch]

    def _moved(self, values: Tensor) -> Tensor:
        """Return the values on the device, without waiting for it."""
        if self.device.type == "cuda":
            return values.pin_memory().to(self.device, non_blocking=True)
        return values

    def training_errors(self) -> Errors:
        """Return the errors of the epoch's steps so far, as they were made (weights in motion), and forget them."""
        if not self._running:
            return Errors()
        energy, forces, _ = torch.stack(self._running).nanmean(0).tolist()
        self._running.clear()
        return Errors(energy=1e3 * math.sqrt(energy), forces=1e3 * math.sqrt(forces))

    def validate(self) -> Errors:
        """Return the errors of the averaged weights on the validation set; where masks are trained, of the mean of some."""
        ema: Any = self.ema.module
        trained = bool(self.functions)
        return validate(ema, self.validation, self.config, self.scale, functions=trained, world=self.world)

    def finish_epoch(self, errors: Errors) -> bool:
        """Note the validation errors and move on; return whether the training ended with this epoch."""
        progress, patience = self.progress, self.config.patience
        if errors.loss < progress.best_loss:
            progress.best_loss, progress.best_epoch = errors.loss, progress.epoch
            self.best = {k: v.detach().clone() for k, v in self.ema.module.state_dict().items()}
        progress.epoch, progress.step = progress.epoch + 1, 0
        stale = patience is not None and progress.epoch - 1 - progress.best_epoch >= patience
        progress.done = stale or progress.epoch == self.config.epochs
        if progress.done and self.best:
            self.potential.load_state_dict(self.best)
        return progress.done

    def state_dict(self) -> dict[str, Any]:
        """Return everything a resumed training needs, as tensors and plain values."""
        return {
            "progress": self.progress.to_dict(),
            "weights": self.potential.state_dict(),
            "ema": self.ema.state_dict(),
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "best": self.best,
            "running": self._running,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo :meth:`state_dict`.

        Raises:
            Refused: if numbers in it are not finite, or it does not say where the training is.
        """
        progress = Progress(**state["progress"])
        progress.check()
        for name in ("weights", "ema", "best"):
            for entry, value in state[name].items():
                if not torch.isfinite(value).all():
                    raise Refused(f"`{name}`: {short(entry)} holds a number that is not finite")
        self.progress = progress
        self._start()
        self.potential.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, values in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        self.best = {name: value.to(self.device) for name, value in state["best"].items()}
        self._running = list(state["running"])


def _label_counts(graphs: Sequence[AtomicGraph]) -> Tensor:
    """Return the numbers of energies, force components and stress components of every graph, shape (n, 3)."""
    rows = [(bool(g.has_energy), 3 * g.num_nodes * bool(g.has_forces), 6 * bool(g.has_stress)) for g in graphs]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)
