"""The ``forcedrop`` command: thin doors onto the functions of the library. ``scripts/`` call the same."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ParamSpec

import typer

P = ParamSpec("P")
app = typer.Typer(
    help="Force fields that know when they are wrong.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class Ensemble(StrEnum):
    """What dynamics keeps constant."""

    nve = "nve"
    nvt = "nvt"
    npt = "npt"


class OnHigh(StrEnum):
    """What a guarded run does where σ is too large."""

    stop = "stop"
    rollback = "rollback"


class Criterion(StrEnum):
    """What frames are ranked by."""

    max_force = "max_force"
    mean_force = "mean_force"
    energy_per_atom = "energy_per_atom"


Model = Annotated[Path, typer.Argument(help="model file, such as runs/ethanol/model.pt", show_default=False)]
Files = Annotated[list[Path], typer.Argument(help="xyz, traj, db, json, npz or h5 files", show_default=False)]
Samples = Annotated[int | None, typer.Option(help="number K of Monte-Carlo samples; by default the model's", min=2)]
Seed = Annotated[int | None, typer.Option(help="seed of the masks; by default the model's own")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 … or auto")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="drop and list bad frames instead of stopping")]
EnergyKey = Annotated[str | None, typer.Option(help="name of the energy in the files")]
ForcesKey = Annotated[str | None, typer.Option(help="name of the forces in the files")]
StressKey = Annotated[str | None, typer.Option(help="name of the stress in the files")]
EnergyUnit = Annotated[str, typer.Option(help="of the files: eV, meV, kcal/mol, kJ/mol, Hartree")]
LengthUnit = Annotated[str, typer.Option(help="of the files: Angstrom, Bohr, nm")]


def _clear_errors(command: Callable[P, None]) -> Callable[P, None]:
    """Turn the errors that users cause into one clear message and exit status 1 (130 when interrupted)."""

    @functools.wraps(command)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> None:
        from forcedrop.training import TrainingDiverged, TrainingInterrupted

        try:
            command(*args, **kwargs)
        except (TrainingInterrupted, KeyboardInterrupt) as error:
            typer.echo(f"\n{error or 'interrupted'}", err=True)
            raise typer.Exit(130) from None
        except (ValueError, TrainingDiverged, OSError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return guarded


@app.command()
@_clear_errors
def train(
    config: Annotated[Path, typer.Argument(help="training file (YAML)", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")] = False,
) -> None:
    """Train and calibrate a model as a YAML file says."""
    from forcedrop.report import save_figure, training_figure
    from forcedrop.training import load_config
    from forcedrop.training import train as train_model
    from forcedrop.training.parallel import is_first_process

    settings = load_config(config)
    model = train_model(settings, resume=resume)
    if not is_first_process():  # under torchrun
        return
    save_figure(training_figure(settings.output / "log.csv"), settings.output / "training.png")
    last = model.provenance["last_epoch"]
    typer.echo(
        f"{settings.output / 'model.pt'}: validation RMSE {last['val_forces_meV_A']:.1f} meV/Å, "
        f"{last['val_energy_meV_atom']:.2f} meV/atom"
        + (f"; {model.calibration.sentence()}" if model.calibration else "; no error bars were trained")
    )


@app.command()
@_clear_errors
def evaluate(
    model: Model,
    files: Files,
    output: Annotated[
        Path | None, typer.Option(help="folder for evaluation.json, the frames with σ, and plots")
    ] = None,
    write: Annotated[Path | None, typer.Option(help="also write the frames with σ, as .xyz or .h5")] = None,
    samples: Samples = None,
    seed: Seed = None,
    device: Device = "auto",
    skip_bad: SkipBad = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    energy_unit: EnergyUnit = "eV",
    length_unit: LengthUnit = "Angstrom",
) -> None:
    """Compare a model with labelled frames: errors, honesty of σ, plots."""
    from forcedrop.evaluation import evaluate as evaluate_frames
    from forcedrop.evaluation import predict_frames, with_uncertainties
    from forcedrop.report import detection_figure, evaluation_table, parity_figure, save_figure, sigma_figure
    from forcedrop.structures import write_frames

    if output is not None and any(path.resolve() == (output / "frames.h5").resolve() for path in files):
        raise ValueError(f"{output / 'frames.h5'} would be overwritten; choose another --output")
    loaded = _load(model, device)
    keys = (energy_key, forces_key, stress_key)
    frames = _read(files, loaded, keys, energy_unit, length_unit, skip_bad)
    predictions = predict_frames(loaded, frames, n_samples=samples, seed=seed, what="evaluate")
    result = evaluate_frames(loaded, frames, predictions=predictions)
    typer.echo(evaluation_table(result))
    noted = [with_uncertainties(frame, prediction) for frame, prediction in zip(frames, predictions, strict=True)]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        settings = {"model": str(model), "files": [str(f) for f in files], "samples": samples, "seed": seed}
        values = {"settings": settings, **result.as_dict()}
        (output / "evaluation.json").write_text(json.dumps(values, indent=1), encoding="utf-8")
        write_frames(output / "frames.h5", noted)
        title = ", ".join(path.name for path in files)
        save_figure(parity_figure(result, title), output / "parity.png")
        save_figure(sigma_figure(result, title), output / "sigma.png")
        if "forces" in result.error:
            save_figure(detection_figure(result, title), output / "detection.png")
        typer.echo(
            f"wrote evaluation.json, frames.h5 (with σ), parity.png, sigma.png, detection.png (with forces) to {output}"
        )
    if write is not None:
        write_frames(write, noted)
        typer.echo(f"wrote {write}")


@app.command()
@_clear_errors
def compare(
    models: Annotated[
        list[str], typer.Argument(help="model files; several joined by + are a deep ensemble", show_default=False)
    ],
    test: Annotated[list[Path], typer.Option(help="labelled frames to judge on; may be given several times")],
    calibration: Annotated[
        Path | None, typer.Option(help="labelled frames to calibrate all models on; else each keeps its own")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder for comparison.json and comparison.png")] = None,
    samples: Samples = None,
    device: Device = "auto",
) -> None:
    """Compare the error bars of several models, or deep ensembles of models, on the same frames."""
    from forcedrop.evaluation import compare as compare_models
    from forcedrop.report import comparison_figure, comparison_rows, comparison_table, save_figure
    from forcedrop.training import Committee

    loaded: dict[str, Any] = {}
    for text in models:
        members = [_load(Path(name), device) for name in text.split("+")]
        loaded[text] = members[0] if len(members) == 1 else Committee(members)
    if len(loaded) < len(models):
        raise ValueError("a model was given twice")
    first = next(iter(loaded.values()))

    def frames(path: Path) -> Any:
        return _read([path], first, (None, None, None), "eV", "Angstrom", skip_bad=False)

    sets = {path.stem: frames(path) for path in test}
    held = None if calibration is None else frames(calibration)
    found = compare_models(_short_names(loaded), sets, held, n_samples=samples)
    rows = comparison_rows(found)
    typer.echo(comparison_table(rows))
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "comparison.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        save_figure(comparison_figure(found), output / "comparison.png")
        typer.echo(f"wrote {output / 'comparison.json'}, comparison.png")


@app.command()
@_clear_errors
def md(
    model: Model,
    structure: Annotated[Path, typer.Argument(help="file with the start structure", show_default=False)],
    output: Annotated[Path, typer.Option(help="folder for md.csv, md.xyz, md.h5, md.json, md.png")] = Path("md"),
    ensemble: Annotated[Ensemble, typer.Option(help="constant energy, temperature, or pressure")] = Ensemble.nve,
    temperature: Annotated[float, typer.Option(help="[K]", min=0)] = 300.0,
    pressure: Annotated[float, typer.Option(help="[GPa], for npt")] = 0.0,
    friction: Annotated[float, typer.Option(help="[1/fs], for nvt (Langevin)", min=0)] = 0.01,
    steps: Annotated[int, typer.Option(help="number of steps", min=1)] = 2000,
    timestep: Annotated[float, typer.Option(help="[fs]")] = 0.5,
    index: Annotated[int, typer.Option(help="which frame of the file to start from")] = 0,
    repeat: Annotated[tuple[int, int, int], typer.Option(help="repetitions of the cell along a, b, c")] = (
        1,
        1,
        1,
    ),
    record_every: Annotated[int, typer.Option(help="steps between records", min=1)] = 10,
    uncertainty_every: Annotated[
        int,
        typer.Option(
            help="1: the mean of the samples moves the atoms; n: sample 0 does, and σ costs every n-th step", min=1
        ),
    ] = 1,
    low: Annotated[float | None, typer.Option(help="flag above this largest atomic force σ [eV/Å]")] = None,
    high: Annotated[float | None, typer.Option(help="stop or go back above this largest atomic force σ [eV/Å]")] = None,
    quantile: Annotated[
        float | None, typer.Option(help="instead of --low: this quantile of the calibration frames [0.95]")
    ] = None,
    false_flags: Annotated[
        float | None, typer.Option(help="instead of --low: from how many false flags per ps you accept")
    ] = None,
    false_stops: Annotated[
        float | None, typer.Option(help="instead of --high: from how many false stops per ps you accept")
    ] = None,
    correlation_time: Annotated[
        float, typer.Option(help="of σ [fs], for false alarms; 0 takes the steps for independent", min=0)
    ] = 0.0,
    on_high: Annotated[
        OnHigh, typer.Option(help="above the band, or where atoms overlap or the temperature runs away")
    ] = OnHigh.stop,
    spacing: Annotated[float, typer.Option(help="time between flagged frames that are kept [fs]")] = 50.0,
    check_every: Annotated[
        int | None, typer.Option(help="steps between looks of the guard; by default --record-every", min=1)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where a killed run stopped, or make it longer")
    ] = False,
    keep_velocities: Annotated[bool, typer.Option("--keep-velocities", help="use those in the file")] = False,
    samples: Samples = None,
    seed: Annotated[int, typer.Option(help="of velocities and thermostat")] = 0,
    mask_seed: Seed = None,
    device: Device = "auto",
) -> None:
    """Run molecular dynamics with error bars and flag the moments that the model does not know."""
    from forcedrop.calculator import DropoutCalculator
    from forcedrop.evaluation import device_of
    from forcedrop.md import NPT, NVE, NVT, run_md
    from forcedrop.report import run_figure, save_figure

    loaded = _load(model, device)
    frames = _read([structure], loaded, (None, None, None), "eV", "Angstrom", skip_bad=False)
    if not -len(frames) <= index < len(frames):
        raise ValueError(f"{structure} holds {len(frames)} frames, asked for frame {index}")
    start = frames[index].to_atoms()
    atoms = start.repeat(repeat) if repeat != (1, 1, 1) else start
    guard = _guard(
        loaded.calibration, (low, high), quantile, (false_flags, false_stops),
        ((check_every or record_every) * timestep, correlation_time), on_high, spacing, check_every,
    )  # fmt: skip
    kind: Any = {Ensemble.nve: NVE(), Ensemble.nvt: NVT(friction), Ensemble.npt: NPT(pressure)}[ensemble]
    calculator = DropoutCalculator(loaded, samples, mask_seed, device_of(device), uncertainty_every=uncertainty_every)
    run = run_md(
        atoms, calculator, output, ensemble=kind, temperature=temperature, steps=steps, timestep=timestep,
        record_every=record_every, seed=seed, guard=guard, velocities=not keep_velocities, resume=resume,
    )  # fmt: skip
    save_figure(run_figure(run), output / "md.png")
    typer.echo(run.summary())


@app.command()
@_clear_errors
def flag(
    model: Model,
    files: Files,
    output: Annotated[Path, typer.Option(help="where to write the flagged frames, .xyz or .h5")] = Path("flagged.xyz"),
    ranking: Annotated[Path | None, typer.Option(help="also write a CSV of all frames, most uncertain first")] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw σ of every frame")] = None,
    criterion: Annotated[Criterion, typer.Option(help="what to rank by")] = Criterion.max_force,
    threshold: Annotated[float | None, typer.Option(help="absolute σ [eV/Å, or eV per atom]")] = None,
    quantile: Annotated[float | None, typer.Option(help="instead: quantile of the calibration frames [0.95]")] = None,
    samples: Samples = None,
    seed: Seed = None,
    device: Device = "auto",
    skip_bad: SkipBad = False,
) -> None:
    """Rank the frames of any structure file or trajectory by σ and write those above a threshold."""
    from forcedrop.active import UNITS
    from forcedrop.active import flag as flag_frames
    from forcedrop.report import flag_figure, ranking_csv, save_figure
    from forcedrop.structures import write_frames

    loaded = _load(model, device)
    frames = _read(files, loaded, (None, None, None), "eV", "Angstrom", skip_bad)
    flags = flag_frames(
        loaded,
        frames,
        criterion=criterion.value,
        threshold=threshold,
        quantile=quantile,
        n_samples=samples,
        seed=seed,
    )
    typer.echo(flags.summary())
    if flags.flagged:
        write_frames(output, flags.flagged)
        typer.echo(f"wrote {len(flags.flagged)} frames to {output}")
    if ranking is not None:
        typer.echo(f"wrote {ranking_csv(flags, ranking)}")
    if plot is not None:
        figure = flag_figure(flags.values, flags.threshold, flags.criterion, UNITS[flags.criterion])
        typer.echo(f"wrote {save_figure(figure, plot)}")


@app.command()
@_clear_errors
def active(
    config: Annotated[Path, typer.Argument(help="file of the loop (YAML)", show_default=False)],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check the file and say what would be done")] = False,
    status: Annotated[bool, typer.Option("--status", help="print the table of the rounds so far")] = False,
) -> None:
    """Explore, flag, label and learn, round after round, as a YAML file says; the same command goes on after a kill."""
    from forcedrop.active import ActiveLoop, load_active_config
    from forcedrop.active.audit import round_rows
    from forcedrop.report import active_figure, rounds_table, save_figure

    settings = load_active_config(config)

    def show(rows: list[dict[str, Any]]) -> None:
        typer.echo(rounds_table(rows))
        if any(row["verdict"] is not None for row in rows):
            save_figure(active_figure(rows), settings.state / "rounds.png")

    loop = ActiveLoop(settings, show)
    if status:
        typer.echo(rounds_table(round_rows(loop.state)))
        typer.echo(loop.stopped() or "not over yet")
    elif dry_run:
        typer.echo(loop.describe())
    else:
        reason = loop.run()
        typer.echo(f"{reason}; {settings.state / 'model.pt'} is trained on {len(loop.state.frames())} labels")


@app.command()
@_clear_errors
def info(
    path: Annotated[Path, typer.Argument(help="a model or any file of structures", show_default=False)],
    skip_bad: SkipBad = False,
) -> None:
    """Say what is in a model file or a file of structures."""
    from forcedrop.report import describe_frames, describe_model
    from forcedrop.structures import read_checked
    from forcedrop.training import load_model

    if path.suffix == ".pt":
        typer.echo(describe_model(load_model(path)))
        return
    frames, problems = read_checked([path], skip_bad=skip_bad)
    _list_problems(problems)
    typer.echo(describe_frames(frames))


@app.command()
@_clear_errors
def report(
    folder: Annotated[
        Path, typer.Argument(help="what md, evaluate, train, compare or active learning wrote", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option(help="the page; by default page.html in the folder")] = None,
    frames: Annotated[int, typer.Option(help="most frames to show, apart from flagged ones", min=1)] = 200,
    title: Annotated[str | None, typer.Option(help="of the page")] = None,
) -> None:
    """Make one HTML file of a run, to look at offline: structures coloured by σ, plots, tables, settings."""
    from forcedrop.report import report_page

    page = report_page(folder, output, most=frames, title=title)
    typer.echo(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


def _guard(
    calibration: Any,
    band: tuple[float | None, float | None],
    quantile: float | None,
    rates: tuple[float | None, float | None],
    times: tuple[float, float],
    on_high: OnHigh,
    spacing: float,
    check_every: int | None,
) -> Any:
    """Return the guard that was meant; None for a model without a calibration where nothing is asked for."""
    from forcedrop.active import resolve_threshold
    from forcedrop.md import Band, GuardSettings, RollBack, Stop, band_from_calibration

    (low, high), (flags, stops) = band, rates
    if (flags is None) != (stops is None):
        raise ValueError("give --false-flags and --false-stops together")
    if flags is not None and stops is not None:
        if (low, high, quantile) != (None, None, None):
            raise ValueError("give false alarms, or --low, --high and --quantile, not both")
        found = band_from_calibration(
            calibration, flags_per_ps=flags, stops_per_ps=stops, interval=times[0], correlation_time=times[1]
        )
    elif low is None and calibration is None and quantile is None:
        if high is None:
            return None
        found = Band(high, high)
    else:
        level = resolve_threshold(calibration, "max_force", low, quantile)
        found = Band(level, float("inf") if high is None else high)
    answer = RollBack() if on_high is OnHigh.rollback else Stop()
    return GuardSettings(found, answer, spacing, check_every)


def _short_names(models: dict[str, Any]) -> dict[str, Any]:
    """Name each model by what distinguishes its path; a deep ensemble by its first member and its size."""
    named: dict[str, Any] = {}
    for text, model in models.items():
        members = [Path(name) for name in text.split("+")]
        first = members[0].with_suffix("")
        short = first.parent.name if first.name == "model" and first.parent.name else first.name
        short = short if len(members) == 1 else f"ensemble of {len(members)} ({short} …)"
        named[short if short not in named else text] = model
    return named


def _load(path: Path, device: str) -> Any:
    from forcedrop.evaluation import device_of
    from forcedrop.training import load_model

    return load_model(path, device_of(device))


def _read(
    files: Sequence[Path],
    model: Any,
    keys: tuple[str | None, str | None, str | None],
    energy_unit: str,
    length_unit: str,
    skip_bad: bool,
) -> Any:
    """Read frames that the model can compute, and list what was dropped."""
    from forcedrop.structures import LabelKeys, read_checked

    frames, problems = read_checked(
        files, keys=LabelKeys(*keys), energy_unit=energy_unit, length_unit=length_unit, elements=model.elements,
        skip_bad=skip_bad,
    )  # fmt: skip
    _list_problems(problems)
    return frames


def _list_problems(problems: Sequence[Any]) -> None:
    for problem in problems:
        typer.echo(f"skipped: {problem}", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command with the given arguments, or those of the process."""
    app(list(sys.argv[1:] if arguments is None else arguments), prog_name="forcedrop")
