"""Training from a file to a model on disk: what ``forcedrop train`` and ``scripts/train.py`` call."""

from __future__ import annotations

import csv
import datetime
import io
import json
import platform
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from ase.data import atomic_numbers, chemical_symbols
from tqdm import tqdm

import forcedrop
from forcedrop.derive import geometry, pair_forces
from forcedrop.door import door, short
from forcedrop.files import load_tensors, make_folder, save_tensors, write_text
from forcedrop.graph import AtomicGraph, batch_graphs
from forcedrop.model import SAMPLES, TrainedModel, load_model, save_model
from forcedrop.potential import DropoutRates, EnergyModel, build
from forcedrop.structures import Frame
from forcedrop.structures.copies import signatures
from forcedrop.structures.prints import Prints
from forcedrop.training.board import Board
from forcedrop.training.config import ConfigError, TrainConfig
from forcedrop.training.data import Prepared, build_graphs, content_hash, prepare_data, ranges, residual_bias
from forcedrop.training.going_on import check_same, continued, from_start, settings_of, what_must_not_change
from forcedrop.training.loop import Trainer, TrainingDiverged, TrainingInterrupted
from forcedrop.training.output import CHECKPOINT, LOG, MODEL, claim_training, remove_training
from forcedrop.training.pairs import fit_bonds
from forcedrop.training.parallel import World, joined, own_device
from forcedrop.training.start import with_shape_of_start
from forcedrop.training.validate import Errors
from forcedrop.uncertainty.calibrate import calibrate
from forcedrop.uncertainty.errors import held_out_errors
from forcedrop.uncertainty.method import Labels, find_functions

_COLUMNS = (
    "epoch", "seconds", "schedule", "train_energy_meV", "train_forces_meV_A", "val_energy_meV",
    "val_energy_meV_atom", "val_forces_meV_A", "val_stress_meV_A3", "val_loss",
)  # fmt: skip


def train(config: TrainConfig, *, resume: bool = False, overwrite: bool = False) -> TrainedModel:
    """Train, calibrate and save a model in ``config.output``.

    The folder receives ``model.pt`` (the model), ``last.pt`` (to resume from), ``log.csv``, TensorBoard files and
    ``split.json`` (which frame was used for what). Under ``torchrun`` the processes train together; the first one writes.

    Args:
        config: from ``load_config``.
        resume: go on from ``last.pt`` to the numbers of an uninterrupted training; without it, start anew.
        overwrite: remove the training that is in ``config.output``.

    Raises:
        ValueError: for data or settings that cannot be used, or a checkpoint of other settings.
        TrainingDiverged: if the loss is not a number; the message names the frames.
        TrainingInterrupted: on Ctrl-C or SIGTERM, after a resumable checkpoint was written.
    """
    config = with_shape_of_start(config, resume=resume)
    with joined(own_device(config.device)) as world, _matrix_products("high" if config.tf32 else "highest"):
        trainer, data = _prepare(config, resume, overwrite, world)
        _run(trainer, config, data, resume)
        try:
            if world.first:
                return _finish(trainer, config, data)
        finally:
            world.barrier()
        return load_model(config.output / MODEL, trainer.device)


def _prepare(config: TrainConfig, resume: bool, overwrite: bool, world: World) -> tuple[Trainer, Prepared]:
    """Read the data and return a trainer that is ready to start, or to go on from the checkpoint."""
    out = config.output
    state = _load_checkpoint(config) if resume else None
    if state is None:
        claim_training(config, overwrite=overwrite, resume=resume)
    data = prepare_data(config, tqdm.write if world.first else _quiet)
    if state is not None:  # its weights are all there, whatever became of the model that it started from
        check_same(state, config, data, out / CHECKPOINT)
        config, data = config.model_copy(update={"start": None}), continued(data, state)
    elif config.start is not None:
        data = from_start(data, config)
    if world.first:
        _describe(data)
    trainer = build_trainer(config, data, world)
    if state is not None:
        with door(out / CHECKPOINT, "resume from"):
            trainer.load_state_dict(state["trainer"])
    world.barrier()  # nobody writes before everybody has looked
    if world.first:
        make_folder(out)
        if state is None:
            remove_training(out)
        _write_split(out, data)
    return trainer, data


def build_trainer(config: TrainConfig, data: Prepared, world: World | None = None) -> Trainer:
    """Return a training of a new network on prepared data, at its first step."""
    world = world or World()
    dtype = {"float32": torch.float32, "float64": torch.float64}[config.precision]
    cutoff, quiet = config.model.cutoff, not world.first
    graphs = build_graphs(data.split.train, cutoff, dtype, "neighbour lists", quiet)
    validation = build_graphs(data.split.validation, cutoff, dtype, "validation lists", quiet)
    potential = build_potential(config, data, graphs, own_device(config.device), dtype)
    return Trainer(potential, graphs, validation, config, data.energy_scale, world)


def build_potential(
    config: TrainConfig, data: Prepared, graphs: list[AtomicGraph], device: torch.device, dtype: torch.dtype
) -> EnergyModel:
    """Return a network with random weights from the seed, norms and energy offsets measured on training data; or the start's."""
    if config.start is not None:
        given = data.isolated if config.data.isolated_atoms is not None else {}
        potential = _start_weights(config, data.elements, given, device, dtype)
        potential.set_rates(config.dropout.rates)
        config.uncertainty.prepare(potential)
        return potential
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        shape = asdict(config.model.shape)
        potential = build(config.model.kind, shape, data.elements, data.isolated, data.energy_scale).to(dtype)
    potential.eval().set_rates(config.dropout.rates)
    config.uncertainty.prepare(potential)
    generator = torch.Generator().manual_seed(config.seed)
    pick = torch.randperm(len(graphs), generator=generator)[:64].tolist()
    batch = batch_graphs([graphs[i] for i in pick])
    fit_bonds(potential, graphs)
    if potential.repulsion is not None and bool(batch.has_forces.any()):
        own = (batch.forces - pair_forces(potential, batch))[batch.has_forces[batch.batch]]
        potential.energy_scale.copy_(own.square().mean().sqrt().clamp(min=1e-8))
    graph, vec = geometry(potential, batch)
    potential.measure(vec, graph)
    with torch.no_grad():
        local = potential(vec, graph).double()
    already = local.new_zeros(batch.num_graphs).index_add(0, batch.batch, local)
    frames = [data.split.train[i] for i in pick]
    bias = residual_bias(frames, data.elements, data.isolated, already.numpy())
    potential.offset(torch.as_tensor(bias / float(potential.energy_scale), dtype=dtype))
    return potential.to(device)


def _start_weights(
    config: TrainConfig,
    elements: Sequence[int],
    isolated: Mapping[int, float],
    device: torch.device,
    dtype: torch.dtype,
) -> EnergyModel:
    """Return the network of a model as its training left it, without what was found afterwards (regression, functions).

    Norms, unit and energies of isolated atoms are the model's: its weights mean nothing without them.

    Raises:
        ConfigError: if it has another shape than is asked for, does not know an element, or counts energies from others than
            ``isolated``.
    """
    path: Any = config.start
    potential, wanted = load_model(path, device).potential.to(dtype), config.model
    own = {"kind": potential.kind, **potential.settings()}
    asked = {"kind": wanted.kind, **asdict(wanted.shape)}
    if own != asked:
        differ = [name for name, value in asked.items() if own.get(name) != value]
        raise ConfigError(f"`start`: {path} has other settings; these differ: {', '.join(differ)}")
    if missing := sorted(set(elements) - set(potential.elements)):
        symbols = ", ".join(chemical_symbols[z] for z in missing)
        raise ConfigError(f"`start`: {path} does not know {symbols}, which the training data hold")
    own_zero = dict(zip(potential.elements, potential.isolated.tolist(), strict=True))
    for z, energy in isolated.items():
        if z in own_zero and abs(own_zero[z] - energy) > 1e-3:
            raise ConfigError(
                f"`start`: {path} counts from {own_zero[z]:.6g} eV for an isolated {chemical_symbols[z]}, "
                f"`data.isolated_atoms` says {energy:.6g}: its energies cannot be continued with these"
            )
    potential.forget_functions()
    return potential


def _run(trainer: Trainer, config: TrainConfig, data: Prepared, resume: bool) -> None:
    """Run what is left; the first process shows a progress bar and writes logs and checkpoints."""
    out, start, before = config.output, time.monotonic(), trainer.progress.seconds
    last_saved, first, same = start, trainer.world.first, what_must_not_change(config, data)

    def save() -> None:
        trainer.progress.seconds = before + time.monotonic() - start
        if first:
            known = {"elements": list(trainer.potential.elements), "trainer": trainer.state_dict()}
            save_tensors({**same, **known}, out / CHECKPOINT)

    total = config.epochs * trainer.steps_per_epoch
    bar = tqdm(total=total, initial=trainer.steps_done, unit="step", smoothing=0.05, disable=not first)
    errors = Errors()
    with bar, _stop_signals() as stop:
        board = Board(out / "tensorboard") if first else None
        if not resume:
            save()
        while not trainer.progress.done:
            for batch in trainer.batches():
                try:
                    trainer.run_step(batch, stop)
                    stopping = trainer.check_due and trainer.check()
                except TrainingDiverged as error:
                    raise TrainingDiverged(f"{error}. The last good checkpoint is {out / CHECKPOINT}") from None
                bar.update()
                if not trainer.check_due:
                    continue
                if stopping or time.monotonic() - last_saved > config.checkpoint_seconds:
                    save()
                    last_saved = time.monotonic()
                if stopping:
                    who = stop[0] if stop else "a signal to another process"
                    raise TrainingInterrupted(f"stopped by {who}; go on with --resume ({out / CHECKPOINT})")
            rate, seconds = trainer.schedule(), before + time.monotonic() - start
            fitted, errors = trainer.training_errors(), trainer.validate()
            epoch = trainer.progress.epoch
            row = _row(epoch, seconds, rate, fitted, errors)
            trainer.progress.history.append(row)
            if board is not None:
                _log(out, board, trainer.progress.history, epoch)
            bar.set_postfix_str(_postfix(fitted, errors))
            if trainer.finish_epoch(errors):
                save()
                bar.n = trainer.steps_done  # one that stopped early leaves steps out


def _finish(trainer: Trainer, config: TrainConfig, data: Prepared) -> TrainedModel:
    """Find the functions of the best weights, calibrate them, and write the model."""
    potential, method = trainer.potential.eval(), config.uncertainty
    covered = ranges(data.split.train, trainer.graphs, data.elements)
    potential.set_shortest(
        {
            (atomic_numbers[a], atomic_numbers[b]): r
            for (a, b), r in ((pair.split("-"), r) for pair, r in covered["shortest_distance"].items())
        }
    )
    model = TrainedModel(
        potential=potential,
        uncertainty={"method": "none"},
        provenance={
            "forcedrop": forcedrop.__version__,
            "torch": str(torch.__version__),
            "machine": platform.machine(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "settings": settings_of(config),
            "training_rates": asdict(config.dropout.rates),
            "training_set": {
                "hash": content_hash(data.split.train),
                **covered,
            },
            "prints": data.prints.to_dict(),
            "calibration_prints": Prints.taken(signatures(data.split.calibration)).to_dict(),
            "isolated_energies": {"origin": data.isolated_origin, "compositions": data.compositions},
            "fine_tuned": config.start is not None,
            "training_seconds": trainer.progress.seconds,
            "last_epoch": dict(trainer.progress.history[-1]),
        },
    )
    if not method.keeps_masks:  # masks belonged to the training
        potential.set_rates(DropoutRates())
    if not method.learns:
        save_model(model, config.output / MODEL)  # whatever happens now, the weights are not lost
    labels = Labels(trainer.graphs, trainer.validation, stress=config.loss.stress > 0)
    model.uncertainty = find_functions(potential, method, labels)
    n_samples = min(SAMPLES, model.n_functions or SAMPLES)
    model.provenance["validation"] = held_out_errors(potential, trainer.validation, n_samples, model.seed)
    save_model(model, config.output / MODEL)
    if data.split.calibration and method.gives_error_bars:
        held = build_graphs(data.split.calibration, config.model.cutoff, model.dtype, "calibration lists")
        try:
            model.calibration = calibrate(potential, held, seed=model.seed)
        except ValueError as error:
            raise ValueError(
                f"{config.output / MODEL} was written, but could not be calibrated: {error}. Spreads of 0 mean that the "
                "layers with dropout died in training; a lower `optimiser.learning_rate` prevents that"
            ) from error
        save_model(model, config.output / MODEL)
    return model


def _load_checkpoint(config: TrainConfig) -> dict[str, Any] | None:
    path = config.output / CHECKPOINT
    if not path.exists():
        return None
    state = load_tensors(path)
    kinds = {"settings": str, "data_hash": str, "elements": list, "trainer": dict}
    for name, kind in kinds.items():
        if not isinstance(state.get(name, [] if name == "elements" else None), kind):
            raise ValueError(f"{path} is not a checkpoint of a training: `{name}` is {short(state.get(name))}")
    return state


@contextmanager
def _matrix_products(precision: str) -> Iterator[None]:
    """Set the precision of float32 matrix products on a GPU, and restore it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _stop_signals() -> Iterator[list[str]]:
    """Collect Ctrl-C and SIGTERM instead of dying from them, so that the step that runs can end."""
    caught: list[str] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(signal.Signals(number).name)

    old = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            old[number] = signal.signal(number, note)
        except ValueError:  # not in the main thread: signals are somebody else's
            break
    try:
        yield caught
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _row(epoch: int, seconds: float, rate: float, fitted: Errors, errors: Errors) -> dict[str, float]:
    values = (
        epoch + 1, round(seconds, 2), rate, fitted.energy, fitted.forces, errors.energy,
        errors.energy_per_atom, errors.forces, errors.stress, errors.loss,
    )  # fmt: skip
    return dict(zip(_COLUMNS, values, strict=True))


def _log(out: Path, board: Board, history: list[dict[str, float]], epoch: int) -> None:
    """Write the whole history, so that a resumed training leaves no double rows."""
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, _COLUMNS)
    writer.writeheader()
    writer.writerows(history)
    write_text(out / LOG, stream.getvalue())
    board.add({name: history[-1][name] for name in _COLUMNS[2:]}, epoch)


def _postfix(fitted: Errors, errors: Errors) -> str:
    return (
        f"train F {fitted.forces:.1f} meV/Å, E {fitted.energy:.1f} meV"
        f" | val F {errors.forces:.1f}, E {errors.energy:.1f} ({errors.energy_per_atom:.2f}/atom)"
    )


def _quiet(_: str) -> None:
    """Say nothing: another process does."""


def _describe(data: Prepared) -> None:
    split = data.split
    for problem in data.problems:
        tqdm.write(f"skipped: {problem}")
    for note in data.notes:
        tqdm.write(note)
    tqdm.write(
        f"{len(split.train)} frames to train on, {len(split.validation)} to validate, {len(split.calibration)} to "
        f"calibrate; force RMS {data.energy_scale:.3f} eV/Å; isolated-atom energies: {data.isolated_origin}"
    )


def _write_split(out: Path, data: Prepared) -> None:
    def sources(frames: list[Frame]) -> list[str]:
        return [frame.source for frame in frames]

    split = data.split
    names = {"train": split.train, "validation": split.validation, "calibration": split.calibration}
    text = json.dumps({name: sources(frames) for name, frames in names.items()}, indent=1)
    write_text(out / "split.json", text)
