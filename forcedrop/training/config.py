"""The training file: one YAML, checked before anything runs."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Literal, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

Rate = Field(ge=0.0, lt=1.0)


class ConfigError(ValueError):
    """A training file that cannot be used; the message names the key."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(_Section):
    """Where the structures come from and how they are split."""

    train: list[Path] = Field(description="files to train on (any format that `forcedrop info` reads)", min_length=1)
    validation: list[Path] | None = Field(None, description="own validation files; otherwise a share of `train`")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share held out to stop and choose on")
    calibration_fraction: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="share held out to calibrate on; 0 leaves σ uncalibrated. A plain network needs none",
    )
    calibration: list[Path] | None = Field(None, description="own calibration files; otherwise a share of `train`")
    isolated_atoms: Path | dict[str, float] | None = Field(
        None,
        description="file of single atoms, or energies [eV] by symbol; otherwise found in `train`, or fitted",
    )
    energy_key: str | None = Field(None, description="label of the energy in the file")
    forces_key: str | None = Field(None, description="label of the forces in the file")
    stress_key: str | None = Field(None, description="label of the stress in the file")
    energy_unit: str = Field("eV", description="unit of energies in the files; npz files say their own")
    length_unit: str = Field("Angstrom", description="unit of lengths in the files")
    skip_bad: bool = Field(False, description="drop and list bad frames instead of stopping")


class ModelSection(_Section):
    """The shape of the network."""

    cutoff: float = Field(5.0, gt=0, description="[Å]")
    n_channels: int = Field(64, ge=1)
    n_layers: int = Field(2, ge=1)
    l_max: int = Field(3, ge=1, le=6, description="highest l of the fields on the sphere")
    l_message: int = Field(2, ge=1, le=6, description="highest l of what atoms send, at most l_max")
    n_radial: int = Field(6, ge=1)
    cutoff_power: int = Field(6, ge=1, description="of the cutoff function; the lower, the more near neighbours weigh")
    n_hidden: int = Field(64, ge=1)
    zbl: bool = Field(False, description="add the short-range ZBL repulsion")
    n_heads: int = Field(
        0, ge=0, description="readouts of a shallow ensemble, learned in stage two, instead of a posterior; 0 for none"
    )


class DropoutSection(_Section):
    """Rates of the dropout sites (a site with rate 0 does not exist) and the masks that are trained.

    All rates are 0 unless asked for: with masks (update 0.1, readout 0.3) networks were 2 to 14 % less accurate, and the
    spread over masks said less about the error than the posterior of the readouts does (``benchmarks/honesty.py``).
    """

    edge: float = Field(0.0, ge=0, lt=1, description="one bit per pair of atoms")
    message: float = Field(0.0, ge=0, lt=1, description="channels of what is sent to neighbours")
    update: float = Field(0.0, ge=0, lt=1, description="channels of what a layer adds")
    readout: float = Field(0.0, ge=0, lt=1, description="hidden channels of the last readout")
    bank: int = Field(
        256,
        ge=2,
        description="number of masks: training draws from them, inference uses the first. Fewer than channels, and "
        "the network learns to be blind to them",
    )
    bank_seed: int = Field(0, description="seed of the masks; the calculator's default")

    @property
    def rates(self) -> dict[str, float]:
        """The rates by kind of site."""
        return self.model_dump(exclude={"bank", "bank_seed"})


class LossSection(_Section):
    """Weights of the squared errors, each made dimensionless by the forces' root mean square."""

    energy: float = Field(1.0, ge=0, description="per √N")
    forces: float = Field(1.0, ge=0, description="per component")
    stress: float = Field(0.1, ge=0, description="virial per √N")
    ramp: float = Field(
        0.01,
        gt=0,
        le=1,
        description="share of the energy and stress weights at the start of stage one; grows to 1 at its end",
    )


class OptimiserSection(_Section):
    """Muon for the maps between channels and Adam with AMSGrad for all else, or Adam alone, under a cosine schedule."""

    muon: bool = Field(True, description="orthogonalised momentum for matrices; otherwise all weights are Adam's")
    learning_rate: float = Field(0.02, gt=0, description="Muon's")
    adam_learning_rate: float = Field(1e-2, gt=0, description="Adam's")
    weight_decay: float = Field(0.02, ge=0, description="decoupled, of Muon and Adam alike")
    warmup_steps: int = Field(100, ge=0)
    clip_gradient: float = Field(10.0, gt=0, description="largest norm of the gradient")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the averaged weights, which are the ones kept")


class StageOneSection(_Section):
    """Training on squared errors."""

    epochs: int = Field(200, ge=1)
    dropout: bool = Field(True, description="one mask of the bank per structure and step; otherwise plain")
    patience: int | None = Field(None, ge=1, description="stop after so many epochs without a better validation loss")


class StageTwoSection(_Section):
    """Optional: training on a Gaussian likelihood of energies and forces over several masks per structure, or all heads.

    Made for a plain stage one (``stage_one.dropout: false``). After one with masks it made σ worse in trials on ethanol (no
    committed benchmark yet): it fits σ to errors on training frames, which are smaller than those on others.
    """

    epochs: int = Field(0, ge=0, description="0 leaves the stage out")
    learning_rate_factor: float = Field(0.1, gt=0, description="of the learning rates of `optimiser`")
    samples: int = Field(4, ge=2, description="masks per structure and step")
    mean_weight: float = Field(1.0, ge=0, description="weight of the mean's own squared error beside the likelihood")
    patience: int | None = Field(None, ge=1)


class PosteriorSection(_Section):
    """After training: regression on what was left of the labels, and a posterior, from which every sample draws weights."""

    frames: int = Field(
        1000, ge=0, description="most training frames it is summed over (fewer of large ones); 0 leaves it out"
    )


class TrainConfig(_Section):
    """The whole file."""

    output: Path = Field(description="folder for checkpoints, logs and the model")
    start: Path | None = Field(
        None,
        description="model whose weights are the first ones (fine-tuning), of the same `model` and `dropout` rates",
    )
    data: DataSection
    model: ModelSection = ModelSection()
    dropout: DropoutSection = DropoutSection()
    loss: LossSection = LossSection()
    optimiser: OptimiserSection = OptimiserSection()
    stage_one: StageOneSection = StageOneSection()
    stage_two: StageTwoSection = StageTwoSection()
    posterior: PosteriorSection = PosteriorSection()
    batch_size: int = Field(5, ge=1, description="structures a step, of all processes together")
    eval_batch_size: int = Field(16, ge=1)
    seed: int = 0
    workers: int = Field(0, ge=0, description="processes that prepare batches; 0 does it in the training process")
    device: str = Field("auto", description="cpu, cuda, cuda:1 … or auto")
    precision: Literal["float32", "float64"] = "float32"
    compile: bool = Field(False, description="compile the step of stage one: minutes at the start, less time a step")
    tf32: bool = Field(False, description="TF32 matrix products on a GPU; energies are summed in float64 either way")
    checkpoint_seconds: float = Field(60.0, ge=0, description="a resumable checkpoint at most this often")

    @property
    def trains_masks(self) -> bool:
        """Whether there are dropout sites, and a stage that trains them."""
        return any(self.dropout.rates.values()) and (self.stage_one.dropout or self.stage_two.epochs > 0)

    @property
    def gives_error_bars(self) -> bool:
        """Whether the model will have something to sample: trained masks, or a posterior of its readouts."""
        return self.trains_masks or self.posterior.frames > 0 or self.model.n_heads > 0

    @property
    def n_functions(self) -> int:
        """Number of functions that were trained as such, masks or heads; 0 if any draw will do."""
        return self.model.n_heads or (self.dropout.bank if self.trains_masks else 0)

    @model_validator(mode="after")
    def _stages_fit_sites(self) -> Self:
        sites = any(self.dropout.rates.values())
        if self.model.n_heads:
            if sites or not self.stage_two.epochs or self.model.n_heads < 2:
                raise ValueError(
                    "a shallow ensemble needs `model.n_heads` of at least 2, `stage_two.epochs` above 0, where its heads are "
                    f"learned, and every rate in `dropout` 0; got {self.model.n_heads} heads, {self.stage_two.epochs} epochs"
                )
        elif self.stage_two.epochs and not sites:
            raise ValueError(
                "`stage_two.epochs` is above 0 but every rate in `dropout` is 0 and there are no `model.n_heads`: "
                "nothing to sample"
            )
        if sites and not self.trains_masks:
            raise ValueError(
                "`dropout` has rates above 0 but no stage trains with masks: set `stage_one.dropout` or `stage_two.epochs`, "
                "or every rate to 0 for a plain network"
            )
        if self.stage_two.samples > self.dropout.bank:
            raise ValueError(
                f"`stage_two.samples` must not exceed `dropout.bank`, got {self.stage_two.samples} of {self.dropout.bank}"
            )
        return self


def load_config(path: str | Path) -> TrainConfig:
    """Read and check a training file; relative paths in it are relative to the file.

    Raises:
        ConfigError: if the file is missing, is not YAML, or has an unknown or ill-typed key.
    """
    path = Path(path)
    return parse_config(read_yaml(path, "training file"), source=str(path), folder=path.parent)


def read_yaml(path: Path, what: str = "file") -> dict[str, Any]:
    """Return the keys and values of a file, which an error calls ``what``.

    Raises:
        ConfigError: if it is missing, is not YAML, or holds anything else.
    """
    if not path.is_file():
        raise ConfigError(f"no such {what}: {path}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold keys and values, got {type(values).__name__}")
    return values


def parse_config(values: dict[str, Any], source: str = "<memory>", folder: Path | None = None) -> TrainConfig:
    """Check a training configuration given as nested dictionaries.

    Raises:
        ConfigError: naming every unknown key with the closest valid one, and every value of a wrong type or range.
    """
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{source}:\n{explain(error, TrainConfig)}") from None
    return _resolve_paths(config, folder) if folder else config


def _resolve_paths(config: TrainConfig, folder: Path) -> TrainConfig:
    data = config.data
    atoms = data.isolated_atoms
    update = {
        "train": [folder / p for p in data.train],
        "validation": data.validation and [folder / p for p in data.validation],
        "calibration": data.calibration and [folder / p for p in data.calibration],
        "isolated_atoms": folder / atoms if isinstance(atoms, Path) else atoms,
    }
    start = config.start and folder / config.start
    return config.model_copy(
        update={"output": folder / config.output, "start": start, "data": data.model_copy(update=update)}
    )


def explain(error: ValidationError, root: type[BaseModel], hidden: tuple[str, ...] = ()) -> str:
    """Return a line for each thing that is wrong, with the closest valid key where one is unknown.

    Args:
        error: of pydantic.
        root: the whole configuration.
        hidden: keys that users do not write.
    """
    return "\n".join(f"  {_describe(item, root, hidden)}" for item in error.errors())


def _describe(item: Any, root: type[BaseModel], hidden: tuple[str, ...]) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    if item["type"] == "extra_forbidden":
        valid = [name for name in _valid_keys(location[:-1], root) if name not in hidden]
        close = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.4)
        hint = f"did you mean `{'.'.join([*location[:-1], close[0]])}`?" if close else f"valid are {', '.join(valid)}"
        return f"unknown key `{key}`; {hint}"
    if item["type"] == "missing":
        return f"missing key `{key}`"
    message = item["msg"].removeprefix("Value error, ")
    where = f"`{key}`: " if key else ""
    return f"{where}{message}" + (f", got {item['input']!r}" if key and item["type"] != "value_error" else "")


def _valid_keys(location: list[str], section: type[BaseModel]) -> list[str]:
    for part in location:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
