"""Commands that use a model: md, flag, active, report."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from forcedrop.cli.common import (
    STOPPED,
    Device,
    Files,
    MaskSeed,
    Model,
    Overwrite,
    Samples,
    app,
    clear_errors,
    load,
    members,
    read,
    reading_files,
    that_trains,
)
from forcedrop.files import claim, require_suffix, set_aside

FIGURES = (".png", ".pdf", ".svg")


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


@app.command()
@clear_errors
@reading_files
def md(
    model: Model,
    structure: Annotated[Path, typer.Argument(help="file with the start structure", show_default=False)],
    output: Annotated[Path, typer.Option(help="folder for md.csv, md.xyz, md.h5, md.json, md.png")] = Path("md"),
    ensemble: Annotated[Ensemble, typer.Option(help="constant energy, temperature, or pressure")] = Ensemble.nve,
    temperature: Annotated[
        float, typer.Option(help="of the first velocities, and of the thermostat of nvt and npt [K]", min=0)
    ] = 300.0,
    pressure: Annotated[float | None, typer.Option(help="for npt, and for it alone; by default 0 [GPa]")] = None,
    friction: Annotated[
        float | None, typer.Option(help="for nvt (Langevin), and for it alone; by default 0.01 [1/fs]", min=0)
    ] = None,
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
        OnHigh, typer.Option(help="above the band, or where atoms overlap, one leaves, or the temperature runs away")
    ] = OnHigh.stop,
    spacing: Annotated[float, typer.Option(help="time between flagged frames that are kept [fs]")] = 50.0,
    check_every: Annotated[
        int | None, typer.Option(help="steps between looks of the guard; by default --record-every", min=1)
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="go on where a killed run stopped, or make it longer")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="remove the run that is in the folder")] = False,
    keep_velocities: Annotated[
        bool, typer.Option("--keep-velocities", help="use those in the file, instead of drawing them")
    ] = False,
    samples: Samples = None,
    seed: Annotated[int, typer.Option(help="of what is drawn: velocities and the thermostat's forces")] = 0,
    mask_seed: MaskSeed = None,
    device: Device = "auto",
    *,
    reading: Any,
) -> None:
    """Run molecular dynamics with error bars and flag the moments that the model does not know.

    Constraints of the start structure (FixAtoms, move_mask, selective dynamics …) are obeyed. Exit code 3: the guard stopped it.
    """
    from forcedrop.calculator import DropoutCalculator
    from forcedrop.devices import pick_device
    from forcedrop.md import run_md
    from forcedrop.md.run import FILES, claim_folder
    from forcedrop.md.start import check_settings
    from forcedrop.report import run_figure, save_figure

    kind = _ensemble(ensemble, pressure, friction)
    check_settings(kind, temperature, timestep, steps, record_every)
    if resume and overwrite:
        raise ValueError("either go on with the run or overwrite it (--resume, --overwrite), not both")
    claim([output / name for name in FILES], [*members(model), structure], overwrite=True)
    if not (resume and (output / "restart.pt").exists()):
        claim_folder(output, overwrite=overwrite, resume=resume)
    loaded = load(model, device)
    atoms = _start(structure, index, repeat, loaded, reading)
    guard = _guard(
        loaded.calibration, (low, high), quantile, (false_flags, false_stops),
        ((check_every or record_every) * timestep, correlation_time), on_high, spacing, check_every,
    )  # fmt: skip
    calculator = DropoutCalculator(loaded, samples, mask_seed, pick_device(device), uncertainty_every=uncertainty_every)
    run = run_md(
        atoms, calculator, output, ensemble=kind, temperature=temperature, steps=steps, timestep=timestep,
        record_every=record_every, seed=seed, guard=guard, velocities=not keep_velocities, resume=resume,
        overwrite=overwrite,
    )  # fmt: skip
    save_figure(run_figure(run), output / "md.png")
    typer.echo(run.summary())
    if run.stopped is not None:
        raise typer.Exit(STOPPED)


@app.command()
@clear_errors
@reading_files
def flag(
    model: Model,
    files: Files,
    output: Annotated[
        Path, typer.Option(help="where to write the flagged frames: .xyz, .traj, .db, .json or .h5")
    ] = Path("flagged.xyz"),
    ranking: Annotated[
        Path | None, typer.Option(help="also write a table of all frames, most uncertain first, as .csv")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="also draw σ of every frame, as .png, .pdf or .svg")] = None,
    overwrite: Overwrite = False,
    criterion: Annotated[Criterion, typer.Option(help="what to rank by")] = Criterion.max_force,
    threshold: Annotated[float | None, typer.Option(help="absolute σ [eV/Å, or eV per atom]")] = None,
    quantile: Annotated[float | None, typer.Option(help="instead: quantile of the calibration frames [0.95]")] = None,
    number: Annotated[int | None, typer.Option(help="write at most so many flagged frames", min=1)] = None,
    diverse: Annotated[
        bool, typer.Option("--diverse", help="of the flagged frames, those that differ most, in the network's features")
    ] = False,
    known: Annotated[
        list[Path] | None,
        typer.Option(help="frames that are labelled already, for --diverse; may be given several times"),
    ] = None,
    samples: Samples = None,
    mask_seed: MaskSeed = None,
    device: Device = "auto",
    *,
    reading: Any,
) -> None:
    """Rank the frames of any structure file or trajectory by σ and write those above a threshold, without labels of a model.

    A file that an earlier flag wrote is kept as NAME.1, NAME.2 …; any other file in the place of the output is refused.
    """
    from forcedrop.active import flag as flag_frames
    from forcedrop.active.flagging import of_flag, select
    from forcedrop.report import flag_figure, ranking_csv, save_figure
    from forcedrop.structures import write_frames
    from forcedrop.structures.writers import require_frames_suffix
    from forcedrop.uncertainty.calibration import CRITERIA

    if known and not diverse:
        raise ValueError("--known is for --diverse")
    require_frames_suffix(output)
    require_suffix(ranking, [".csv"])
    require_suffix(plot, FIGURES)
    inputs = [*members(model), *files, *(known or [])]
    earlier = not overwrite and of_flag(output)
    claim([output], inputs, overwrite=overwrite or earlier)
    claim([output, ranking, plot], inputs, overwrite=True)
    claim([ranking, plot], inputs, overwrite=overwrite)
    loaded = load(model, device)
    frames = read(files, loaded, reading, predictions="drop")
    before = read(known, loaded, reading, predictions="drop") if known else []
    flags = flag_frames(
        loaded,
        frames,
        criterion=criterion.value,
        threshold=threshold,
        quantile=quantile,
        n_samples=samples,
        seed=mask_seed,
    )
    typer.echo(flags.summary())
    chosen = select(loaded, flags, number, diverse=diverse, known=before)
    if output.exists() and not overwrite:
        typer.echo(f"the {output} of an earlier flag is now {set_aside(output)}")
    if chosen:
        write_frames(output, chosen)
        typer.echo(f"wrote {len(chosen)} frames to {output}")
    else:
        output.unlink(missing_ok=True)
        typer.echo(f"nothing is flagged: there is no {output}")
    if ranking is not None:
        typer.echo(f"wrote {ranking_csv(flags, ranking)}")
    if plot is not None:
        figure = flag_figure(flags.values, flags.threshold, flags.criterion, CRITERIA[flags.criterion])
        typer.echo(f"wrote {save_figure(figure, plot)}")


@app.command()
@clear_errors
@that_trains
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
@clear_errors
def report(
    folder: Annotated[
        Path, typer.Argument(help="what md, evaluate, train, compare or active learning wrote", show_default=False)
    ],
    output: Annotated[Path | None, typer.Option(help="the page; by default page.html in the folder")] = None,
    frames: Annotated[int, typer.Option(help="most frames to show, apart from flagged ones", min=1)] = 200,
    title: Annotated[str | None, typer.Option(help="of the page")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make one HTML file of a run, to look at offline: structures coloured by σ, plots, tables, settings."""
    from forcedrop.report import report_page

    target = folder / "page.html" if output is None else output
    require_suffix(target, [".html", ".htm"])
    claim([target], overwrite=overwrite)
    page = report_page(folder, target, most=frames, title=title)
    typer.echo(f"wrote {page} ({page.stat().st_size / 1e6:.1f} MB)")


def _ensemble(ensemble: Ensemble, pressure: float | None, friction: float | None) -> Any:
    """Return the ensemble that was meant.

    Raises:
        ValueError: for a setting of another one.
    """
    from forcedrop.md import NPT, NVE, NVT

    if pressure is not None and ensemble is not Ensemble.npt:
        raise ValueError(f"--pressure belongs to --ensemble npt, got {ensemble.value}")
    if friction is not None and ensemble is not Ensemble.nvt:
        raise ValueError(f"--friction belongs to --ensemble nvt, got {ensemble.value}")
    if ensemble is Ensemble.nvt:
        return NVT() if friction is None else NVT(friction)
    return NVE() if ensemble is Ensemble.nve else NPT(pressure or 0.0)


def _start(structure: Path, index: int, repeat: tuple[int, int, int], model: Any, reading: Any) -> Any:
    """Return the atoms to start from.

    Raises:
        ValueError: if there is no such frame, or it cannot be repeated.
    """
    from forcedrop.structures import BadFrames

    try:
        frames = read([structure], model, reading, predictions="drop")
    except BadFrames as error:
        more = f" (and {len(error.problems) - 1} more problems)" if len(error.problems) > 1 else ""
        raise ValueError(f"cannot start from {error.problems[0]}{more}") from None
    if reading.skip_bad and index >= 0:  # frames keep their numbers
        found = next((frame for frame in frames if frame.source == f"{structure}#{index}"), None)
        if found is None:
            raise ValueError(f"{structure} has no good frame {index}")
    elif not -len(frames) <= index < len(frames):
        raise ValueError(f"{structure} holds {len(frames)} frames, asked for frame {index}")
    else:
        found = frames[index]
    start = found.to_atoms()
    if repeat == (1, 1, 1):
        return start
    if any(times < 1 or (times > 1 and not periodic) for times, periodic in zip(repeat, start.pbc, strict=True)):
        raise ValueError(
            f"--repeat needs positive numbers, above 1 only along periodic directions; got {repeat} for pbc {start.pbc.tolist()}"
        )
    return start.repeat(repeat)


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
