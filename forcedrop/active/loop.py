"""The loop: train, explore, pick, label, judge, append, and again.

Every stage first asks whether it is over already (its file is there), and writes that file last. So the same command goes on
after a kill at any moment, and does nothing where all is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout
from tqdm import tqdm

from forcedrop.active.audit import round_rows, write_tables
from forcedrop.active.config import ActiveConfig
from forcedrop.active.design import MOST, information
from forcedrop.active.exploring import Limits, Run, Seen, before_high, credible, explore, explored, plan_runs, summary
from forcedrop.active.flagging import resolve_threshold
from forcedrop.active.gathering import fresh, gathered, mend
from forcedrop.active.judging import judge, stop_reason, verdict
from forcedrop.active.labelling import DaskCluster, Executor, ProcessPool, Rules, bare, label_frames
from forcedrop.active.oracles import Oracle, find_oracle
from forcedrop.active.picking import (
    STRATEGIES,
    Pick,
    Pool,
    Random,
    committee_sigma,
    scaled_features,
    structure_features,
)
from forcedrop.active.processes import at_once
from forcedrop.active.reopening import STOPPED, looking, reopen
from forcedrop.active.roles import role_files
from forcedrop.active.state import State, frame_key, read_json, write_json
from forcedrop.files import make_folder, write_bytes, write_text, writing
from forcedrop.model import TrainedModel, load_model
from forcedrop.structures import Frame, FrameStore, read_frames, write_frames
from forcedrop.training import ConfigError, TrainConfig, train
from forcedrop.training.config import DataSection
from forcedrop.training.data import read_labelled

CHECKPOINT, MODEL, TRAINED = "last.pt", "model.pt", "trained"


class ActiveLoop:
    """A learning loop in its folder.

    Args:
        config: from ``load_active_config``.
        on_round: called with the rows of ``rounds.csv`` whenever they change.

    Raises:
        ConfigError: if the folder belongs to another oracle.
        ValueError: if the oracle is not there.
    """

    def __init__(
        self, config: ActiveConfig, on_round: Callable[[list[dict[str, Any]]], None] = lambda rows: None
    ) -> None:
        self.config, self.on_round = config, on_round
        self.state = State(config.state)
        oracle = config.oracle
        self.oracle: Oracle = find_oracle(oracle.name, oracle.settings, oracle.retry_settings, config.folder.resolve())
        same = json.loads(json.dumps({"oracle": oracle.name, "settings": oracle.settings}, default=str))
        before: Any = read_json(self.state.folder / "loop.json")
        if before is not None and before != same and self.state.has_labels():
            raise ConfigError(
                f"{self.state.folder} holds labels of {before}, this file asks for {same}: choose another `state`"
            )
        self._same = same

    def run(self) -> str:
        """Go on until it is over, and return why it is.

        The last training is on all labels; ``model.pt`` in the folder is its model.

        Raises:
            ValueError: if another loop runs in the folder, or start frames or settings cannot be used.
            TrainingInterrupted: on Ctrl-C or SIGTERM while training.
        """
        make_folder(self.state.folder)
        lock = FileLock(self.state.folder / "lock", timeout=0)
        try:
            with writing(lock.lock_file):
                held = lock.acquire()
            with held:
                write_json(self.state.folder / "loop.json", self._same)
                settings = self.config.model_dump(exclude={"folder", "state"}, exclude_none=True)
                settings = json.loads(json.dumps(settings, default=str))
                write_text(self.state.folder / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
                self.state.clean()
                mend(self.state)
                reopen(self.state, self.config, self.number() - 1)
                return self._run()
        except Timeout:
            raise ValueError(f"another loop runs in {self.state.folder}") from None

    def describe(self) -> str:
        """Say what the loop would do, and where it stands; nothing is run or written.

        Raises:
            BadFrames: if start frames cannot be used.
        """
        config, explore = self.config, self.config.explore
        ready, others = self._start_frames()
        count = len(ready) + len(others)
        runs = len(explore.temperatures) * explore.starts * explore.seeds
        left = max(1, round(count * (1 - sum(self._shares().values()))))
        training = config.train_config({"train": [self.state.store]}, config.state, left)
        return "\n".join(
            [
                f"state: {config.state}, {len(self.state.frames())} labels so far",
                f"start: {count} frames, {len(ready)} of them labelled already; the rest by {self.oracle.name}",
                f"training: {training.epochs} epochs at first, batches of {training.batch_size}",
                f"exploration: {runs} runs a round of at most {explore.steps * explore.timestep / 1000:g} ps at "
                f"{', '.join(f'{t:g}' for t in explore.temperatures)} K, {explore.ensemble}",
                f"picks: {config.pick.size(1)} at first, {config.pick.strategy}",
                f"labels: {config.label.workers} at once "
                + (f"on the cluster {config.label.cluster}" if config.label.cluster else "in processes here")
                + f", at most {config.label.timeout:g} s each, {config.label.retries} retries",
                f"ends at {config.stop.labels} labels"
                + (f" or {config.stop.force_rmse:g} eV/Å with honest σ" if config.stop.force_rmse else ""),
            ]
        )

    def _run(self) -> str:
        if self.state.result(0, "append") is None:
            self._start()
        number = self.number()
        while True:
            models = self._train(number)
            self._tables()
            reason = self.stopped()
            if reason is not None:
                write_bytes(self.state.folder / MODEL, (self.state.round(number) / "model" / MODEL).read_bytes())
                write_json(self.state.folder / STOPPED, {"reason": reason, "labels": len(self.state.frames())})
                return reason
            limits = self._explore(number, models[0])
            self._pick(number, models, limits)
            self._label(number)
            self._judge(number, models[0])
            self._append(number)
            self._tables()
            number += 1

    def number(self) -> int:
        """Return the first round that is not over, from 1 on."""
        number = 1
        while self.state.result(number, "append") is not None:
            number += 1
        return number

    def stopped(self) -> str | None:
        """Return why the loop is over by now, or None; only rounds that are over count, and what they labelled."""
        rows = [row for row in round_rows(self.state) if row.get("verdict") is not None]
        for row in rows:  # by the limits of now
            row["verdict"] = verdict(self.state.result(row["round"], "judge"), self.config.stop)
        return stop_reason(rows, len(self.known(self.number())), self.config.stop)

    def _tables(self) -> None:
        self.on_round(write_tables(self.state))

    def _start(self) -> None:
        """Round 0: label what has to be labelled of the start frames."""
        if self.state.result(0, "pick") is None:
            ready, bare_ones = self._start_frames()
            picks = [replace(bare(f), info=_origin(f)) for f in bare_ones]
            write_frames(self.state.round(0) / "picks.h5", picks)
            write_frames(self.state.round(0) / "ready.h5", [replace(f, arrays={}, info=_origin(f)) for f in ready])
            self.state.finish(0, "pick", {"picked": len(picks), "ready": len(ready)})
        self._label(0)
        self._append(0)

    def _start_frames(self) -> tuple[list[Frame], list[Frame]]:
        """Return the start frames that have their labels, and those that are to be labelled; each structure once."""
        settings = self.config.start
        read, _ = read_labelled(settings.files, self._data(labels=not settings.relabel))
        frames = list({frame_key(frame): frame for frame in read}.values())
        if settings.frames is not None and settings.frames < len(frames):
            rng = np.random.default_rng([self.config.seed, 0])
            frames = [frames[i] for i in sorted(rng.choice(len(frames), settings.frames, replace=False))]
        ready = [f for f in frames if f.energy is not None and f.forces is not None and not settings.relabel]
        held = {frame_key(frame) for frame in ready}
        return ready, [f for f in frames if frame_key(f) not in held]

    def _train(self, number: int) -> list[TrainedModel]:
        """Train on all labels there are; one network, or the members of a committee."""
        members = self.config.pick.members if self.config.pick.strategy == "committee" else 1
        names = ["model" if m == 0 else f"model-{m}" for m in range(members)]
        folders = [self.state.round(number) / name for name in names]
        if self.state.result(number, "train") is None or not all((f / TRAINED).exists() for f in folders):
            start, n_frames = time.monotonic(), len(self.state.frames())
            files, n_train = self._files(number)
            fine = self.config.retraining.fine_tune_steps is not None and number > 1
            left = []
            for member, folder in enumerate(folders):
                before = self.state.round(number - 1) / folder.name / MODEL
                start_from = before if fine and before.exists() else None  # a member that is new starts from nothing
                settings = self.config.train_config(files, folder, n_train, number, member, start_from)
                if not (folder / TRAINED).exists():
                    left.append(settings)
            tqdm.write(f"round {number}: {'fine-tuning' if fine else 'training'} on {n_train} of {n_frames} labels")
            at_once(train_one, left, self.config.retraining.workers)
            model = load_model(folders[0] / MODEL)
            self.state.finish(
                number,
                "train",
                {
                    "labels": n_frames,
                    "seconds": model.provenance["training_seconds"] if len(folders) == 1 else time.monotonic() - start,
                    "validation_forces": model.provenance["validation"]["forces_meV_A"] / 1000,
                    "calibration": model.calibration.sentence() if model.calibration else None,
                },
            )
        return [load_model(folder / MODEL) for folder in folders]

    def _files(self, number: int) -> tuple[dict[str, list[Path]], int]:
        """Return the files to train on, to validate and calibrate in a round, and the number of labels to train on."""
        return role_files(self.state, number, self._shares(), self.config.seed)

    def _shares(self) -> dict[str, float]:
        """Return the shares of the labels that do not train."""
        data = self._data()
        return {"validation": data.validation_fraction, "calibration": data.calibration_fraction}

    def _data(self, labels: bool = True) -> DataSection:
        """Return how files are read; where labels do not matter, predictions may stand in their place."""
        data = self.config.train_config({"train": [self.state.store]}, self.config.state, 1).data
        return data if labels else data.model_copy(update={"predictions_as_labels": True})

    def limits(self, number: int, model: TrainedModel) -> Limits:
        """Return where frames are flagged and runs end in a round, by its model.

        What was flagged once stays flagged: uncertain frames that join the calibration frames do not raise the threshold.

        Raises:
            ValueError: if runs would end before anything is flagged.
        """
        settings = self.config.explore
        quantile = None if settings.threshold is not None else settings.quantile
        before = [self.state.result(n, "explore")["threshold"] for n in range(1, number)]
        threshold = min([resolve_threshold(model.calibration, "max_force", settings.threshold, quantile), *before])
        stop = settings.stop_above if settings.stop_above is not None else settings.stop_factor * threshold
        if stop <= threshold:
            raise ValueError(
                f"`explore.stop_above` must be above the threshold of flagging, got {stop:.3g} and {threshold:.3g} eV/Å: this "
                "model is too unsure of its own calibration frames to explore with; start from more frames, or train for longer"
            )
        most = self.config.pick.most_sigma
        if most is not None and most <= threshold and self.config.pick.strategy in ("uncertain", "informative"):
            raise ValueError(
                f"`pick.most_sigma` must be above the threshold of flagging, got {most:.3g} and {threshold:.3g} eV/Å: "
                "nothing could be picked"
            )
        return Limits(threshold, stop, settings.hottest, settings.closest, model.cutoff)

    def plan(self, number: int) -> list[tuple[Run, Frame]]:
        """Return the runs of a round, whose start frames are those that were labelled before it."""
        settings = self.config.explore
        files = settings.start_files
        starts = read_labelled(files, self._data(labels=False))[0] if files else self.known(number)
        return plan_runs(settings, [f for f in starts if len(f) > 1] or starts, self.config.seed, number)

    def known(self, number: int) -> list[Frame]:
        """Return the frames that were labelled before round ``number``."""
        return [frame for frame in self.state.frames() if int(frame.info["round"]) < number]

    def _explore(self, number: int, model: TrainedModel) -> Limits:
        limits, folder = self.limits(number, model), self.state.round(number)
        if self.state.result(number, "explore") is None:
            start, plan = time.monotonic(), self.plan(number)
            tqdm.write(
                f"round {number}: {len(plan)} runs; flagged above {limits.threshold:.3g} eV/Å, ended at {limits.stop_above:.3g}"
            )
            runs = explore(
                plan, folder / "model" / MODEL, folder / "runs", self.config.explore, limits, self.config.device
            )
            found = summary(runs, folder / "runs", limits)
            self.state.finish(number, "explore", {**found, "seconds": time.monotonic() - start})
        return limits

    def _pick(self, number: int, models: Sequence[TrainedModel], limits: Limits) -> None:
        if self.state.result(number, "pick") is not None:
            return
        known, tried = self.known(number), self.state.tried()
        seen = explored(self.state.result(number, "explore"), self.state.round(number) / "runs", limits)
        most = self.config.pick.most_sigma
        most = credible(known, limits.threshold) if most is None else most
        seen = before_high(seen, most)
        candidates = [s for key, s in {frame_key(s.frame): s for s in seen}.items() if key not in tried]
        n_candidates, n_flagged = len(candidates), int(sum(s.sigma > limits.threshold for s in candidates))
        if self.config.pick.strategy == "informative" and n_candidates > MOST:
            order = np.random.default_rng([self.config.seed, number, 3]).permutation(n_candidates)
            flagged_first = sorted(order, key=lambda k: candidates[k].sigma <= limits.threshold)
            candidates = [candidates[k] for k in sorted(flagged_first[:MOST])]
        picks, pool = self._choose(number, candidates, known, models, limits)
        frames = [
            replace(
                s.frame,
                info={
                    "round": number, "run": s.run.name, "temperature_K": s.run.temperature, "seed": s.run.seed,
                    "start": s.run.start, "time_fs": s.time, "reason": p.reason, "score": p.score,
                    "distance": p.distance, "sigma_pick": float(pool.sigma[p.index]),
                },
            )
            for p, s in ((p, candidates[p.index]) for p in picks)
        ]  # fmt: skip
        write_frames(self.state.round(number) / "picks.h5", frames)
        if len(models) > 1:  # flagged by a σ of their own
            n_flagged = int(pool.flagged.sum())
        values: dict[str, Any] = {
            "candidates": n_candidates,
            "flagged": n_flagged,
            "picked": len(frames),
            "most_sigma": most,
            "looking": looking(self.config),
        }
        self.state.finish(number, "pick", values)

    def _choose(
        self, number: int, seen: Sequence[Seen], known: Sequence[Frame], models: Sequence[TrainedModel], limits: Limits
    ) -> tuple[list[Pick], Pool]:
        """Return the picks and what they were picked from."""
        settings = self.config.pick
        if not seen:
            nothing = np.empty(0)
            return [], Pool(nothing, limits.threshold, nothing[:, None], nothing[:, None])
        frames = [s.frame for s in seen]
        labelled_before = [f for f in known if len(f) > 1] or known
        own, before = (structure_features(models[0], x) for x in (frames, labelled_before))
        features, before = scaled_features(own, before)
        sigma, threshold = np.array([s.sigma for s in seen]), limits.threshold
        if len(models) > 1:
            calibration = [f for path in self._files(number)[0]["calibration"] for f in read_frames(path)] or known
            sigma, threshold = committee_sigma(models, frames, calibration, self.config.explore.quantile)
        pool = Pool(sigma, threshold, features, before)
        if settings.strategy == "informative":
            noise = self.state.result(number, "train")["validation_forces"]
            pool = replace(pool, information=information(models[0], frames, noise))
        count = min(settings.size(number), self.config.stop.labels - len(known))
        rng = np.random.default_rng([self.config.seed, number, 1])
        strategy = STRATEGIES[settings.strategy](settings.min_distance)
        check = Random(settings.min_distance, "check").pick(pool, min(settings.check, count), rng)
        return [*check, *strategy.pick(pool, count - len(check), rng, check)], pool

    def _label(self, number: int) -> None:
        if self.state.result(number, "label") is not None:
            return
        folder, settings, start = self.state.round(number), self.config.label, time.monotonic()
        with FrameStore(folder / "picks.h5") as store:
            frames = store[:]
        rules = Rules(settings.retries, settings.largest_force, settings.stress)
        records = []
        if frames:
            executor = self._executor()
            try:
                records = label_frames(frames, self.oracle, executor, folder / "labels", rules, self.state.journal)
            finally:
                executor.close()
        good = sum(record["status"] == "labelled" for record in records)
        values = {"labelled": good, "failed": len(records) - good, "seconds": time.monotonic() - start}
        self.state.finish(number, "label", values)

    def _executor(self) -> Executor:
        settings = self.config.label
        if settings.cluster is not None:
            return DaskCluster(settings.cluster, settings.workers, settings.timeout, settings.threads)
        return ProcessPool(settings.workers, settings.timeout, settings.threads)

    def fresh(self, number: int) -> list[Frame]:
        """Return what was picked in a round and has got its label."""
        return fresh(self.state, number)

    def _judge(self, number: int, model: TrainedModel) -> None:
        """Compare the fresh labels with the model that has not seen them."""
        if self.state.result(number, "judge") is None:
            found, frames = judge(model, self.fresh(number))
            if frames:
                write_frames(self.state.round(number) / "judged.h5", frames)
            self.state.finish(number, "judge", {**found, "verdict": verdict(found, self.config.stop)})

    def _append(self, number: int) -> None:
        if self.state.result(number, "append") is not None:
            return
        frames = gathered(self.state, number)
        if not frames and number == 0:
            raise ValueError("none of the start frames has a label; see the reasons in rounds/000/labels")
        self.state.finish(number, "append", {"labels": self.state.append(frames)})


def train_one(config: TrainConfig) -> None:
    """Train a network, or go on with it; its folder says when it is over."""
    train(config, resume=(config.output / CHECKPOINT).exists())
    write_bytes(config.output / TRAINED, b"")


def _origin(frame: Frame) -> dict[str, Any]:
    """Return what is noted of a start frame."""
    return {"round": 0, "run": "", "reason": "start", "origin": Path(frame.source).name}
