"""The training loop: two stages, resumable at any step to the same numbers.

Everything random is a function of (seed, stage, epoch, step), and the learning rate of the step, so a checkpoint holds numbers
and no generator: weights, averaged weights, optimiser moments, and where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch_geometric.data import Batch

from forcedrop.derive import Derived, derive, derive_samples
from forcedrop.graph import AtomicGraph, batch_graphs, graph_loader
from forcedrop.potential import Potential
from forcedrop.sampling import Prediction, draw_masks, predict, reduce_samples
from forcedrop.training.config import OptimiserSection, TrainConfig
from forcedrop.training.losses import likelihood_loss, plain_loss, squared_errors
from forcedrop.training.muon import Muon, is_matrix

_FEW = 4
"""Masks of the bank whose mean is validated in stage one."""


class TrainingDiverged(RuntimeError):
    """The loss is not a number; the message names the frames of the step."""


class TrainingInterrupted(RuntimeError):
    """Training was asked to stop; a resumable checkpoint was written."""


@dataclass
class Errors:
    """Root mean square errors [meV, meV per atom, meV/Å, meV/Å³] and, with samples, the force likelihood and mean z²."""

    energy: float = math.nan
    energy_per_atom: float = math.nan
    forces: float = math.nan
    stress: float = math.nan
    loss: float = math.nan
    z2: float = math.nan


@dataclass
class Progress:
    """Where a training is.

    Attributes:
        stage: 0 squared errors, 1 likelihood, 2 done.
        epoch: epochs finished in this stage.
        step: steps finished in this epoch.
        best_loss: lowest validation loss of this stage.
        best_epoch: when that was.
        seconds: time spent so far.
        history: one row an epoch.
    """

    stage: int = 0
    epoch: int = 0
    step: int = 0
    best_loss: float = math.inf
    best_epoch: int = -1
    seconds: float = 0.0
    history: list[dict[str, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


class Trainer:
    """Owns the weights and moments of one training; the files around it belong to ``run.py``.

    Args:
        potential: the network, on its device, norms measured.
        graphs: training graphs.
        validation: validation graphs.
        config: the training file.
        scale: the forces' root mean square of the training set [eV/Å].
    """

    def __init__(
        self,
        potential: Potential,
        graphs: list[AtomicGraph],
        validation: list[AtomicGraph],
        config: TrainConfig,
        scale: float,
    ) -> None:
        self.config, self.potential = config, potential
        self.graphs, self.validation = graphs, validation
        self.device = potential.hidden_bias.device
        self.scale = torch.tensor(scale, dtype=potential.hidden_bias.dtype, device=self.device)
        self.progress = Progress()
        self.best: dict[str, Tensor] = {}
        self._running: list[Tensor] = []
        self._start_stage()

    @property
    def stage_settings(self) -> Any:
        """Epochs, patience and learning rate of the stage that runs."""
        return self.config.stage_two if self.progress.stage else self.config.stage_one

    @property
    def masked(self) -> bool:
        """Whether the stage that runs trains with masks."""
        return self.progress.stage > 0 or (self.config.stage_one.dropout and bool(self.potential.sites))

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one pass over the training set."""
        return math.ceil(len(self.graphs) / self.config.batch_size)

    @property
    def total_epochs(self) -> int:
        """Epochs of both stages."""
        return self.config.stage_one.epochs + self.config.stage_two.epochs

    @property
    def steps_done(self) -> int:
        """Steps behind us, counting a finished stage in full."""
        epochs = (0, self.config.stage_one.epochs, self.total_epochs)[self.progress.stage] + self.progress.epoch
        return epochs * self.steps_per_epoch + self.progress.step

    def _start_stage(self) -> None:
        settings = self.config.optimiser
        if self.best:
            self.potential.load_state_dict(self.best)
        self.optimisers = make_optimisers(self.potential, settings)
        self.ema = AveragedModel(self.potential, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))

    def schedule(self) -> float:
        """Return the next step's share of the learning rates: linear warm-up, then half a cosine to 0 at the stage's end."""
        base = self.config.stage_two.learning_rate_factor if self.progress.stage else 1.0
        total = self.stage_settings.epochs * self.steps_per_epoch
        now = self.progress.epoch * self.steps_per_epoch + self.progress.step
        warm = min(1.0, (now + 1) / (self.config.optimiser.warmup_steps + 1))
        return base * warm * 0.5 * (1 + math.cos(math.pi * now / total))

    def batches(self) -> Iterator[Batch]:
        """Yield what is left of this epoch; the order depends on (seed, stage, epoch) alone."""
        where = (self.config.seed * 2 + self.progress.stage) * 1_000_003 + self.progress.epoch
        order = torch.randperm(len(self.graphs), generator=torch.Generator().manual_seed(where)).tolist()
        size = self.config.batch_size
        left = [order[first : first + size] for first in range(self.progress.step * size, len(order), size)]
        pin = self.device.type == "cuda"
        for batch in graph_loader(self.graphs, left, workers=self.config.workers, pin_memory=pin):
            yield batch.to(self.device, non_blocking=pin)

    def run_step(self, batch: Batch) -> Tensor:
        """Take one step and return the loss.

        Raises:
            TrainingDiverged: if the loss or the gradient is not finite; the weights are those before the step.
        """
        share = self.schedule()
        for group in (g for optimiser in self.optimisers for g in optimiser.param_groups):
            group["lr"] = share * group["initial_lr"]
        self.potential.zero_grad(set_to_none=True)
        loss, mean = self._loss(batch)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.potential.parameters(), self.config.optimiser.clip_gradient)
        if not torch.isfinite(loss.detach() + norm):
            raise TrainingDiverged(f"the loss is {float(loss.detach())}, its gradient's norm {float(norm)}")
        for optimiser in self.optimisers:
            optimiser.step()
        self.ema.update_parameters(self.potential)
        self.progress.step += 1
        with torch.no_grad():
            energy, forces, _ = squared_errors(mean, batch, self.scale)
            per_frame = (mean.energy - batch.energy).square()[batch.has_energy]
            self._running.append(torch.stack([per_frame.mean().to(forces.dtype), forces * self.scale**2, energy]))
        return loss.detach()

    def _loss(self, batch: Batch) -> tuple[Tensor, Derived]:
        weights, two = self.config.loss, self.config.stage_two
        if self.progress.stage == 0:
            masks = None
            if self.masked:
                masks = {name: mask[0] for name, mask in self._training_masks(batch, 1).items()}
            derived = derive(self.potential, batch, masks, create_graph=True)
            return plain_loss(derived, batch, weights, self.scale), Derived(*(x.detach() for x in derived))
        samples = derive_samples(self.potential, batch, self._training_masks(batch, two.samples))
        loss = likelihood_loss(samples, batch, weights, self.scale, two.mean_weight)
        return loss, reduce_samples(Derived(*(x.detach() for x in samples))).mean

    def _training_masks(self, batch: Batch, samples: int) -> dict[str, Tensor]:
        """Return ``samples`` masks of the bank, different for each structure and step, shared by a structure's atoms.

        In stage one a share of the structures has none (a mask of ones).
        """
        dropout, progress = self.config.dropout, self.progress
        where = ((self.config.seed * 2 + progress.stage) * 1_000_003 + progress.epoch) * 1_000_003 + progress.step
        generator = torch.Generator().manual_seed(where)
        bank = draw_masks(self.potential, batch, dropout.bank_seed, dropout.bank)
        pick = torch.stack(
            [torch.randperm(dropout.bank, generator=generator)[:samples] for _ in range(batch.num_graphs)],
            dim=1,
        ).to(self.device)[:, batch.batch]
        atoms = torch.arange(batch.num_nodes, device=self.device)
        edges = {site.name for site in self.potential.sites if not site.n_channels}
        masks = {name: mask[pick, atoms] if name in edges else mask[pick] for name, mask in bank.items()}
        if progress.stage == 0:
            plain = torch.rand(batch.num_graphs, generator=generator) < dropout.plain_share
            without = plain.to(self.device)[batch.batch][:, None]
            masks = {name: torch.where(without, torch.ones_like(mask), mask) for name, mask in masks.items()}
        return masks

    def training_errors(self) -> Errors:
        """Return the errors of the epoch's steps so far, as they were made (weights in motion), and forget them."""
        if not self._running:
            return Errors()
        energy, forces, _ = torch.stack(self._running).nanmean(0).tolist()
        self._running.clear()
        return Errors(energy=1e3 * math.sqrt(energy), forces=1e3 * math.sqrt(forces))

    def validate(self) -> Errors:
        """Return the errors of the averaged weights on the validation set; where masks are trained, of the Monte-Carlo mean."""
        sums = torch.zeros(7, dtype=torch.float64)
        potential: Any = self.ema.module
        loss, size = 0.0, self.config.eval_batch_size
        for first in range(0, len(self.validation), size):
            batch = batch_graphs(self.validation[first : first + size]).to(self.device)
            share = batch.num_graphs / len(self.validation)
            if self.progress.stage == 0:
                mean = self._predict(potential, batch, _FEW).mean if self.masked else derive(potential, batch)
                loss += share * float(plain_loss(mean, batch, self.config.loss, self.scale))
            else:
                prediction = self._predict(potential, batch, self.config.dropout.bank)
                mean = prediction.mean
                nll = likelihood_loss(
                    prediction.samples, batch, self.config.loss, self.scale, mean_weight=0.0, beta=0.0
                )
                loss += share * float(nll)  # a proper score; what is minimised, weighted, is none
                z2 = ((mean.forces - batch.forces) / prediction.std.forces.clamp(min=1e-9)).square()
                sums[6] += z2[batch.has_forces[batch.batch]].double().sum().cpu()
            sums[:6] += _squares(mean, batch)
        energy, per_atom, n_energy, forces, n_forces, stress = sums[:6].tolist()
        n_stress = 6 * sum(bool(g.has_stress) for g in self.validation)
        return Errors(
            energy=_rms(energy, n_energy),
            energy_per_atom=_rms(per_atom, n_energy),
            forces=_rms(forces, n_forces),
            stress=_rms(stress, n_stress),
            loss=loss,
            z2=float(sums[6]) / n_forces if self.progress.stage and n_forces else math.nan,
        )

    def _predict(self, potential: Potential, batch: Batch, most: int) -> Prediction:
        """Return the prediction of the first masks of the bank, ``most`` of them at most."""
        dropout = self.config.dropout
        return predict(potential, batch, n_samples=min(most, dropout.bank), seed=dropout.bank_seed)

    def finish_epoch(self, errors: Errors) -> bool:
        """Note the validation errors and move on; return whether the stage ended with this epoch."""
        progress, settings = self.progress, self.stage_settings
        if errors.loss < progress.best_loss:
            progress.best_loss, progress.best_epoch = errors.loss, progress.epoch
            self.best = {k: v.detach().clone() for k, v in self.ema.module.state_dict().items()}
        progress.epoch, progress.step = progress.epoch + 1, 0
        patience = settings.patience
        stale = patience is not None and progress.epoch - 1 - progress.best_epoch >= patience
        if progress.epoch < settings.epochs and not stale:
            return False
        progress.stage += 1
        if progress.stage == 1 and self.config.stage_two.epochs == 0:
            progress.stage = 2
        progress.epoch, progress.best_loss, progress.best_epoch = 0, math.inf, -1
        self._start_stage()
        return True

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
        """Undo :meth:`state_dict`."""
        self.progress = Progress(**state["progress"])
        self.best = {}
        self._start_stage()
        self.potential.load_state_dict(state["weights"])
        self.ema.load_state_dict(state["ema"])
        for optimiser, values in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        self.best = {name: value.to(self.device) for name, value in state["best"].items()}
        self._running = list(state["running"])


def make_optimisers(potential: Potential, settings: OptimiserSection) -> list[torch.optim.Optimizer]:
    """Return the optimisers of all weights: Adam, and Muon for the maps between channels if ``settings`` say so."""
    matrices, rest = [], []
    for name, parameter in potential.named_parameters():
        (matrices if settings.muon and is_matrix(name, parameter) else rest).append(parameter)
    decay, fused = settings.weight_decay, potential.hidden_bias.dtype == torch.float32
    made: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(rest, lr=settings.adam_learning_rate, amsgrad=True, weight_decay=decay, fused=fused)
    ]
    if matrices:
        made.append(Muon(matrices, lr=settings.learning_rate, weight_decay=decay))
    for group in (g for optimiser in made for g in optimiser.param_groups):
        group["initial_lr"] = group["lr"]
    return made


def _squares(mean: Derived, batch: Batch) -> Tensor:
    """Return sums of squares and counts: energy, energy per atom, count, forces, count, stress."""
    n_atoms = torch.bincount(batch.batch, minlength=batch.num_graphs)
    energy = (mean.energy - batch.energy)[batch.has_energy]
    forces = (mean.forces - batch.forces)[batch.has_forces[batch.batch]]
    stress = (mean.stress - batch.stress)[batch.has_stress]
    per_atom = energy / n_atoms[batch.has_energy]
    values = [energy.square().sum(), per_atom.square().sum(), energy.numel()]
    values += [forces.double().square().sum(), forces.numel(), stress.double().square().sum()]
    return torch.tensor([float(v) for v in values], dtype=torch.float64)


def _rms(total: float, count: float) -> float:
    """Return 1000 times the root mean square; nan where there is nothing."""
    return 1e3 * math.sqrt(total / count) if count else math.nan
