"""The training file: one YAML, checked before anything runs."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from forcedrop.potential import DropoutRates, kind_of
from forcedrop.structures import LabelKeys, Reading
from forcedrop.uncertainty import method_of
from forcedrop.uncertainty.exact_dropout import ExactDropout
from forcedrop.uncertainty.method import Method

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
    isolated_atoms: Path | dict[str | int, float] | None = Field(
        None,
        description="file of single atoms, or energies (in `energy_unit`) by symbol or number; otherwise found in `train`, "
        "or fitted",
    )
    energy_key: str | None = Field(None, description="name of the energy in all files of this section")
    forces_key: str | None = Field(None, description="name of the forces")
    stress_key: str | None = Field(None, description="name of the stress")
    virial_key: str | None = Field(None, description="name of the virial, instead of a stress")
    energy_unit: str | None = Field(None, description="of energies and virials; eV, or what an npz file says")
    length_unit: str | None = Field(None, description="of positions and cells; Angstrom")
    forces_unit: str | None = Field(
        None, description="the energy's over the length's; over Bohr for Hartree and Rydberg"
    )
    stress_unit: str | None = Field(None, description="the energy's over a volume, like forces")
    skip_bad: bool = Field(False, description="drop and list bad frames instead of stopping")
    trust_units: bool = Field(False, description="take numbers that can hardly be in their unit, with a word")
    predictions_as_labels: bool = Field(False, description="take a model's predictions, as in md.xyz, for labels")

    @property
    def reading(self) -> Reading:
        """How the files of this section are read.

        Raises:
            ValueError: for a unit that is not known, or both a stress and a virial.
        """
        return Reading(
            keys=LabelKeys(self.energy_key, self.forces_key, self.stress_key, self.virial_key),
            **{f.name: getattr(self, f.name) for f in fields(Reading) if f.name != "keys"},
        )

    @model_validator(mode="after")
    def _readable(self) -> Self:
        _ = self.reading  # says what is wrong
        return self


@dataclass(frozen=True)
class NetworkSettings:
    """The kind of a network, and its shape: the ``Shape`` of that kind."""

    kind: str = "sphere"
    shape: Any = field(default_factory=lambda: kind_of("sphere").Shape())

    @property
    def cutoff(self) -> float:
        """[Å]."""
        return float(self.shape.cutoff)


def _checked(values: Mapping[str, Any], settings: type[Any], section: str, tag: str) -> Any:
    """Return the settings, a dataclass, from a section of the file without its tag.

    Raises:
        ValueError: naming unknown keys with the closest valid one, and values of a wrong type or range.
    """
    known = [f.name for f in fields(settings)]
    for key in values:
        if key not in known:
            close = difflib.get_close_matches(key, [tag, *known], n=1, cutoff=0.4)
            hint = f"did you mean `{section}.{close[0]}`?" if close else f"valid are {', '.join([tag, *known])}"
            raise ValueError(f"unknown key `{section}.{key}`; {MOVED.get(f'{section}.{key}', hint)}")
    try:
        return TypeAdapter(settings).validate_python(dict(values))
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join([section, *map(str, item["loc"])])
            got = f", got {item['input']!r}" if item["loc"] else ""
            lines.append(f"`{key}`: {item['msg'].removeprefix('Value error, ')}{got}")
        raise ValueError("; ".join(lines)) from None


def _network(values: Any) -> Any:
    """Read the section ``model``: ``kind`` says which network, the rest is its shape."""
    if isinstance(values, NetworkSettings):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"must hold keys and values, got {type(values).__name__}")
    rest = dict(values)
    kind = rest.pop("kind", "sphere")
    return NetworkSettings(kind, _checked(rest, kind_of(kind).Shape, "model", "kind"))


def _method(values: Any) -> Any:
    """Read the section ``uncertainty``: ``method`` says which, the rest are its settings."""
    if isinstance(values, Method):
        return values
    if not isinstance(values, Mapping):
        raise ValueError(f"must hold keys and values, got {type(values).__name__}")
    rest = dict(values)
    return _checked(rest, method_of(rest.pop("method", ExactDropout.name)), "uncertainty", "method")


Network = Annotated[
    Any, BeforeValidator(_network), PlainSerializer(lambda value: {"kind": value.kind, **asdict(value.shape)})
]
Uncertainty = Annotated[
    Any, BeforeValidator(_method), PlainSerializer(lambda value: {"method": value.name, **asdict(value)})
]


class DropoutSection(_Section):
    """Rates of the dropout sites in training: one mask per structure and step, the same for all its atoms.

    What is dropped at inference is a matter of ``uncertainty``. All rates are 0 unless asked for. With edges dropped at 0.1
    validation errors of forces were 2 to 13 % larger, in seven of seven trainings (``benchmarks/dropout.py``). Masks on
    features cost accuracy: networks with update 0.1 and readout 0.3 were 2 to 14 % less accurate
    (``benchmarks/results/honesty.json``).
    """

    edge: float = Field(0.0, ge=0, lt=1, description="pairs of elements that are cut at a radius")
    message: float = Field(0.0, ge=0, lt=1, description="channels of what is sent to neighbours")
    update: float = Field(0.0, ge=0, lt=1, description="channels of what a layer adds")
    readout: float = Field(0.0, ge=0, lt=1, description="hidden channels of the last readout")

    @property
    def rates(self) -> DropoutRates:
        """The rates by kind of site."""
        return DropoutRates(**self.model_dump())


class LossSection(_Section):
    """Weights of the squared errors, each made dimensionless by the forces' root mean square."""

    energy: float = Field(1.0, ge=0, description="per √N")
    forces: float = Field(1.0, ge=0, description="per component")
    stress: float = Field(0.1, ge=0, description="virial per √N")
    ramp: float = Field(
        0.01,
        gt=0,
        le=1,
        description="share of the energy and stress weights at the start; grows to 1 at the end",
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


class TrainConfig(_Section):
    """The whole file."""

    output: Path = Field(description="folder for checkpoints, logs and the model")
    start: Path | None = Field(
        None,
        description="model whose weights are the first ones (fine-tuning); its kind and shape are the default of `model`",
    )
    data: DataSection
    model: Network = Field(default_factory=NetworkSettings, description="`kind` of network, and its shape")
    dropout: DropoutSection = DropoutSection()
    uncertainty: Uncertainty = Field(
        default_factory=ExactDropout, description="`method` by which functions are found, and its settings"
    )
    loss: LossSection = LossSection()
    optimiser: OptimiserSection = OptimiserSection()
    epochs: int = Field(200, ge=1)
    patience: int | None = Field(None, ge=1, description="stop after so many epochs without a better validation loss")
    batch_size: int = Field(5, ge=1, description="structures a step, of all processes together")
    eval_batch_size: int = Field(16, ge=1)
    seed: int = 0
    workers: int = Field(0, ge=0, description="processes that prepare batches; 0 does it in the training process")
    device: str = Field("auto", description="cpu, cuda, cuda:1 … or auto")
    precision: Literal["float32", "float64"] = "float32"
    compile: bool = Field(False, description="compile the step: minutes at the start, less time a step")
    tf32: bool = Field(False, description="TF32 matrix products on a GPU; energies are summed in float64 either way")
    checkpoint_seconds: float = Field(60.0, ge=0, description="a resumable checkpoint at most this often")

    @property
    def gives_error_bars(self) -> bool:
        """Whether the model will have functions."""
        return bool(self.uncertainty.gives_error_bars)

    @property
    def training_functions(self) -> int | None:
        """Of how many functions each structure of a step takes one; None for any number, 0 for the plain network."""
        found: int | None = self.uncertainty.training_functions(list(self.dropout.model_dump().values()))
        return found

    @model_validator(mode="before")
    @classmethod
    def _of_before(cls, values: Any) -> Any:
        """Read ``stage_one``, of files from before stages went, as the keys that took its place."""
        old = values.get("stage_one") if isinstance(values, Mapping) else None
        if not isinstance(old, Mapping) or not set(old) <= {"epochs", "patience"} or set(old) & set(values):
            return values
        warnings.warn("`stage_one` is read as `epochs` and `patience`, which now stand by themselves", stacklevel=2)
        return {key: value for key, value in values.items() if key != "stage_one"} | dict(old)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        _ = self.training_functions  # says what is wrong
        return self


MOVED = {
    "posterior": "the posterior is `uncertainty: {method: posterior, frames: …}`",
    "stage_one": "stages are gone: `epochs` and `patience` stand by themselves",
    "stage_two": "the second stage is gone (it made σ no better); for a shallow ensemble `uncertainty: {method: heads}`",
    "model.n_heads": "a shallow ensemble is `uncertainty: {method: heads, functions: …}`",
    "dropout.bank": "masks that are trained are `uncertainty: {method: masks, functions: …}`",
    "dropout.bank_seed": "masks that are trained are `uncertainty: {method: masks, seed: …}`",
}
"""Where keys of earlier versions went."""


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
    if key in MOVED:
        return f"unknown key `{key}`; {MOVED[key]}"
    if item["type"] == "extra_forbidden":
        valid = [name for name in _valid_keys(location[:-1], root) if name not in hidden]
        close = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.4)
        hint = f"did you mean `{'.'.join([*location[:-1], close[0]])}`?" if close else f"valid are {', '.join(valid)}"
        return f"unknown key `{key}`; {hint}"
    if item["type"] == "missing":
        return f"missing key `{key}`"
    message = item["msg"].removeprefix("Value error, ")
    where = f"`{key}`: " if key and not message.startswith(("`", "unknown key `")) else ""
    return f"{where}{message}" + (f", got {item['input']!r}" if key and item["type"] != "value_error" else "")


def _valid_keys(location: list[str], section: type[BaseModel]) -> list[str]:
    for part in location:
        annotation = section.model_fields[part].annotation
        candidates = [annotation, *get_args(annotation)]
        section = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(section.model_fields)
