"""What the commands share: options, clear errors, and reading of models and frames."""

from __future__ import annotations

import functools
import inspect
import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer

from forcedrop.door import one_line

if TYPE_CHECKING:
    from forcedrop.structures.predictions import Use

P = ParamSpec("P")
app = typer.Typer(
    help=(
        "Force fields that know when they are wrong.\n\n"
        "Nothing is overwritten: a command whose output exists stops before it computes anything; --overwrite replaces it. "
        "Units are eV, Å, fs, K and GPa. --seed is the seed of what a command draws itself (velocities, thermostat, functions); "
        "--mask-seed that of dropout masks that are drawn at inference, which few models have.\n\n"
        "Exit codes: 0 done; 1 refused or failed, with one line that says why; 2 a command line that cannot be understood; "
        "3 dynamics ended by its guard; 130 interrupted."
    ),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # or units in brackets would be taken for markup
)

STOPPED = 3
"""Exit code of dynamics that its guard ended."""


Model = Annotated[Path, typer.Argument(help="model file, such as runs/ethanol/model.pt", show_default=False)]
Files = Annotated[list[Path], typer.Argument(help="xyz, traj, db, json, npz or h5 files", show_default=False)]
Samples = Annotated[int | None, typer.Option(help="number K of Monte-Carlo samples; by default the model's", min=2)]
MaskSeed = Annotated[
    int | None, typer.Option(help="of dropout masks drawn at inference, if the model has any; by default its own")
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … or auto")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="drop and list bad frames instead of stopping")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace output that exists")]
PredictionsAsLabels = Annotated[
    bool, typer.Option("--predictions-as-labels", help="take a model's own predictions, as in md.xyz, for labels")
]
LengthUnit = Annotated[
    str | None, typer.Option(help="of positions and cells in the files: Angstrom (default), Bohr, nm")
]


def clear_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn errors into one clear message and exit status 1 (130 when interrupted).

    A fault of the program is said to be one; ``FORCEDROP_TRACEBACK=1`` in the environment shows where any error comes from.
    """

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as error:
            typer.echo(f"\n{str(error) or 'interrupted'}", err=True)
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            typer.echo(f"error: {_sentence(error)}", err=True)
            if os.environ.get("FORCEDROP_TRACEBACK"):
                traceback.print_exception(error)
            raise typer.Exit(1) from None

    return guarded


def _sentence(error: Exception) -> str:
    """Return what to say about an error: its own words, if it was written to be read, else that it is not the user's fault."""
    if isinstance(error, ValueError | OSError) or (isinstance(error, MemoryError) and str(error)):
        return str(error)
    if isinstance(error, RuntimeError | MemoryError):
        from forcedrop.devices import out_of_memory

        if out_of_memory(error):
            return "there is not enough memory; take fewer atoms, functions (--samples) or frames at once"
    text = one_line(f"{type(error).__name__}: {error}")
    return f"{text} (not foreseen, which is a fault of forcedrop; FORCEDROP_TRACEBACK=1 shows where)"


def that_trains(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the ways in which a training ends early into errors that :func:`clear_errors` knows."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        from forcedrop.training import TrainingDiverged, TrainingInterrupted

        try:
            command(*args, **kwargs)
        except TrainingInterrupted as error:
            raise KeyboardInterrupt(str(error)) from None
        except TrainingDiverged as error:
            raise ValueError(str(error)) from None

    return guarded


def members(model: Path) -> list[Path]:
    """Return the model files behind a name: several are joined by +."""
    return [Path(name) for name in str(model).split("+")]


def load(path: Path, device: str) -> Any:
    """Read a model file onto a device."""
    from forcedrop.devices import pick_device
    from forcedrop.model import load_model

    return load_model(path, pick_device(device))


def reading_files(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of how files are read; it gets them as its argument ``reading``."""
    options = inspect.signature(_reading, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def wrapped(**values: Any) -> None:
        chosen = {name: values.pop(name) for name in options}
        command(**values, reading=_reading(**chosen))

    kept = [parameter for name, parameter in own.parameters.items() if name != "reading"]
    parameters = [*kept, *options.values()]
    wrapped.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapped


def _reading(
    skip_bad: SkipBad = False,
    energy_key: Annotated[str | None, typer.Option(help="name of the energy in the files")] = None,
    forces_key: Annotated[str | None, typer.Option(help="name of the forces in the files")] = None,
    stress_key: Annotated[str | None, typer.Option(help="name of the stress in the files")] = None,
    virial_key: Annotated[str | None, typer.Option(help="name of the virial in the files")] = None,
    energy_unit: Annotated[
        str | None, typer.Option(help="of the files: eV (default), meV, kcal/mol, kJ/mol, Hartree, Rydberg")
    ] = None,
    length_unit: LengthUnit = None,
    forces_unit: Annotated[
        str | None,
        typer.Option(help="of the files; by default the energy's over the length's, over Bohr for Hartree and Rydberg"),
    ] = None,
    stress_unit: Annotated[
        str | None, typer.Option(help="of the files: eV/Angstrom^3, GPa, kbar …; by default like forces, over a volume")
    ] = None,
    trust_units: Annotated[
        bool, typer.Option("--trust-units", help="take numbers that can hardly be in their unit")
    ] = False,
) -> Any:
    """Return how files are read; the options of every command that reads structures."""
    from forcedrop.structures import LabelKeys, Reading

    return Reading(
        keys=LabelKeys(energy_key, forces_key, stress_key, virial_key),
        energy_unit=energy_unit,
        length_unit=length_unit,
        forces_unit=forces_unit,
        stress_unit=stress_unit,
        skip_bad=skip_bad,
        trust_units=trust_units,
    )


def read(
    files: Sequence[Path],
    model: Any,
    reading: Any,
    *,
    predictions: Use = "refuse",
    labels_needed: bool = False,
) -> Any:
    """Read frames that the model can compute (any, if it is None), say how, and list what was dropped.

    ``predictions`` says what labels may be, ``labels_needed`` whether there must be some.
    """
    from forcedrop.structures import read_checked

    frames, problems = read_checked(
        files,
        reading,
        elements=None if model is None else model.elements,
        labels_needed=labels_needed,
        predictions=predictions,
        tell=say,
    )
    list_problems(problems)
    return frames


def say(text: str) -> None:
    """Print a line beside the results."""
    typer.echo(text, err=True)


def list_problems(problems: Sequence[Any]) -> None:
    """Say what was left out, and why."""
    for problem in problems:
        typer.echo(f"skipped: {problem}", err=True)
