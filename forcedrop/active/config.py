"""The file of a learning loop: one YAML, checked before anything runs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from forcedrop.training import ConfigError, TrainConfig, parse_config
from forcedrop.training.config import Section, explain, read_yaml


def _listed(values: int | list[int]) -> list[int]:
    return values if isinstance(values, list) else [values]


def _of_round(values: int | list[int], number: int) -> int:
    """Return the entry of round ``number``, from 1 on; the last one stands for those after it."""
    return _listed(values)[min(number, len(_listed(values))) - 1]


class StartSection(Section):
    """What is known at first."""

    files: list[Path] = Field(description="labelled frames, or structures to label", min_length=1)
    frames: int | None = Field(None, ge=1, description="so many of them, drawn at random; all otherwise")
    relabel: bool = Field(False, description="label all of them with the oracle; otherwise only those without labels")


class OracleSection(Section):
    """The reference method."""

    name: str = Field(description="emt, tblite:GFN2-xTB (or another method), or module:function")
    settings: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the calculator")
    retry_settings: dict[str, Any] = Field(
        default_factory=dict, description="those that change when a label is tried again, such as more SCF cycles"
    )


class RetrainingSection(Section):
    """How long a round trains, on all labels; the rest is in `training`."""

    steps: int | list[int] | None = Field(
        None,
        description="steps of a training, whatever the number of labels; a list is by round, its last entry for those after; "
        "otherwise `training` says epochs",
    )
    most_epochs: int = Field(2000, ge=1, description="limit on the epochs that steps come to")
    fine_tune_steps: int | None = Field(
        None,
        ge=1,
        description="from the second round on the network of the round before trains for so many; else a new one",
    )
    fine_tune_rate: float = Field(0.3, gt=0, description="then, of the learning rates")
    workers: int = Field(1, ge=1, description="members of a committee that train at once")

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if self.steps is not None and (self.steps == [] or min(_listed(self.steps)) < 1):
            raise ValueError(f"`steps` must be positive, got {self.steps}")
        return self


class ExploreSection(Section):
    """Dynamics with the model of the round."""

    temperatures: list[float] = Field(min_length=1, description="of thermostat and first velocities [K]")
    starts: int = Field(2, ge=1, description="structures to start from, at each temperature")
    start_files: list[Path] | None = Field(
        None, description="where they are drawn from; otherwise among all labelled frames"
    )
    seeds: int = Field(1, ge=1, description="runs from each start")
    steps: int = Field(1000, ge=1, description="of each run")
    timestep: float = Field(0.5, gt=0, description="[fs]")
    record_every: int = Field(20, ge=1, description="steps between records, which are what can be picked")
    ensemble: Literal["nve", "nvt", "npt"] = "nvt"
    friction: float = Field(0.02, ge=0, description="[1/fs], for nvt")
    pressure: float = Field(0.0, description="[GPa], for npt")
    samples: int | None = Field(None, ge=2, description="K; by default the model's")
    quantile: float = Field(
        0.95, ge=0, le=1, description="flagged is a largest atomic force σ above this of calibration frames"
    )
    threshold: float | None = Field(None, ge=0, description="instead: this σ [eV/Å]")
    stop_factor: float = Field(10.0, gt=1, description="a run ends where σ is so many times the threshold")
    stop_above: float | None = Field(None, gt=0, description="instead: this σ [eV/Å]")
    closest: float = Field(
        0.6, ge=0, lt=1, description="atoms nearer than this share of their radii's sum: a run's end"
    )
    hottest: float = Field(4.0, gt=1, description="an instantaneous temperature of so many times the target: likewise")
    workers: int = Field(1, ge=1, description="runs at once")


class PickSection(Section):
    """What is labelled next."""

    batch: int | list[int] = Field(20, description="labels a round; a list is by round, its last entry for those after")
    strategy: Literal["uncertain", "informative", "random", "committee"] = Field(
        "uncertain",
        description="by σ and distance; by what is left of the variance over all candidates; at random; by σ of several networks "
        "and distance",
    )
    members: int = Field(3, ge=2, description="networks of a committee")
    min_distance: float = Field(0.1, ge=0, description="between picks, and to what is labelled; nearer are duplicates")
    most_sigma: float | None = Field(
        None,
        gt=0,
        description="[eV/Å]; of a run only frames before the first with a σ (of the first network) above are picked; by default "
        "the root mean square force of the median labelled frame, at least twice the threshold of flagging; .inf for no limit",
    )
    check: int = Field(0, ge=0, description="of a batch, so many are drawn at random, to judge σ without a choice")

    @model_validator(mode="after")
    def _batches(self) -> Self:
        sizes = _listed(self.batch)
        if not sizes or min(sizes) < 1 or self.check > min(sizes):
            raise ValueError(f"`batch` must be positive and at least `check`, got {self.batch} and {self.check}")
        return self

    def size(self, number: int) -> int:
        """Return the labels of round ``number``, from 1 on."""
        return _of_round(self.batch, number)


class LabelSection(Section):
    """Where labels are computed, and which are believed."""

    workers: int = Field(1, ge=1, description="labels at once")
    cluster: str | None = Field(None, description="address of a Dask scheduler, or `local`; otherwise processes here")
    timeout: float = Field(3600.0, gt=0, description="of a label [s]")
    threads: int = Field(1, ge=1, description="of each label")
    retries: int = Field(1, ge=0, description="further attempts at a label that failed")
    largest_force: float = Field(100.0, gt=0, description="labels with a force above are refused [eV/Å]")
    stress: bool = Field(True, description="of periodic structures, where the oracle has it")


class StopSection(Section):
    """When it is over."""

    labels: int = Field(description="the budget: labels in all, those of the start frames included", ge=1)
    force_rmse: float | None = Field(
        None, gt=0, description="wanted on fresh labelled frames [eV/Å]; without it only the budget ends the loop"
    )
    z2: tuple[float, float] = Field((0.5, 2.0), description="mean z² of forces between these: error and σ agree")
    rounds: int = Field(100, ge=1, description="at most")


class ActiveConfig(Section):
    """The whole file."""

    state: Path = Field(description="folder of everything the loop knows and makes")
    start: StartSection
    oracle: OracleSection
    training: dict[str, Any] = Field(
        default_factory=dict, description="as in a training file, without `output`, `data.train` and `data.validation`"
    )
    retraining: RetrainingSection = RetrainingSection()
    explore: ExploreSection
    pick: PickSection = PickSection()
    label: LabelSection = LabelSection()
    stop: StopSection
    seed: int = 0
    device: str = Field("auto", description="of exploration; that of `training` has its own key")
    folder: Path = Field(Path(), description="what relative paths are relative to; the file's own folder")

    @model_validator(mode="after")
    def _training_is_one(self) -> Self:
        data = self.training.get("data", {})
        if not isinstance(data, dict):
            raise ValueError(f"`training.data` must hold keys and values, got {data!r}")
        given = [k for k in ("output", "start") if k in self.training] + [
            f"data.{k}" for k in ("train", "validation", "calibration") if k in data
        ]
        if given:
            raise ValueError(f"`training` must not hold `{given[0]}`: the loop sees to it")
        return self

    def train_config(
        self,
        files: Mapping[str, Sequence[Path]],
        output: Path,
        n_train: int,
        number: int = 1,
        member: int = 0,
        start: Path | None = None,
    ) -> TrainConfig:
        """Return the training of a round.

        Args:
            files: the labelled frames to ``train``, for ``validation`` and ``calibration``.
            output: folder of the training.
            n_train: how many there are to train on.
            number: of the round.
            member: of a committee; each has a seed of its own.
            start: the model to fine-tune; a new network otherwise.

        Raises:
            ConfigError: if the ``training`` block has a fault.
        """
        data = dict(self.training.get("data", {}))
        if isinstance(data.get("isolated_atoms"), str):
            data["isolated_atoms"] = str(self.folder / data["isolated_atoms"])
        data |= {name: [str(path) for path in paths] for name, paths in files.items() if paths}
        values = {**self.training, "data": data, "output": str(output), "start": start}
        seed = self.training.get("seed", 0)
        values["seed"] = seed + member if isinstance(seed, int) else seed
        config, retraining = parse_config(values, source="`training`"), self.retraining
        steps = None if retraining.steps is None else _of_round(retraining.steps, number)
        if start is not None:
            steps, rate = retraining.fine_tune_steps, retraining.fine_tune_rate
            rates = {name: rate * getattr(config.optimiser, name) for name in ("learning_rate", "adam_learning_rate")}
            config = config.model_copy(update={"optimiser": config.optimiser.model_copy(update=rates)})
        if steps is None:
            return config
        per_epoch = math.ceil(n_train / config.batch_size)
        epochs = min(max(1, round(steps / per_epoch)), retraining.most_epochs)
        return config.model_copy(update={"epochs": epochs})


def load_active_config(path: str | Path) -> ActiveConfig:
    """Read and check the file of a loop; relative paths in it are relative to the file.

    Raises:
        ConfigError: if the file is missing, is not YAML, or has an unknown or ill-typed key.
    """
    path = Path(path)
    return parse_active_config(read_yaml(path), str(path), path.parent)


def parse_active_config(values: dict[str, Any], source: str = "<memory>", folder: Path | None = None) -> ActiveConfig:
    """Check the settings of a loop given as nested dictionaries.

    Raises:
        ConfigError: naming every unknown key with the closest valid one, and every value of a wrong type or range.
    """
    folder = folder or Path()
    try:
        config = ActiveConfig.model_validate({"folder": folder, **values})
        training = config.train_config({"train": [Path("frames.h5")]}, Path("model"), 100)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n{explain(error, ActiveConfig, ('folder',))}") from None
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None
    if not training.gives_error_bars:
        raise ConfigError(f"{source}: a model of this `training` gives no error bars to pick by")
    if config.explore.threshold is None and not training.data.calibration_fraction:
        raise ConfigError(
            f"{source}: `explore.quantile` is one of calibration frames: `training.data.calibration_fraction` must not be 0, "
            "or give an `explore.threshold`"
        )
    if config.explore.threshold == 0 and config.explore.stop_above is None:
        raise ConfigError(f"{source}: with an `explore.threshold` of 0, `explore.stop_above` must say where runs end")
    explore, files = config.explore, config.explore.start_files
    return config.model_copy(
        update={
            "state": folder / config.state,
            "start": config.start.model_copy(update={"files": [folder / path for path in config.start.files]}),
            "explore": explore.model_copy(update={"start_files": files and [folder / path for path in files]}),
        }
    )
