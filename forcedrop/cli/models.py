"""Commands about models: train, evaluate, compare, fill, info; what they write is claimed first (``files.claim``)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from forcedrop.cli.common import (
    Device,
    Files,
    MaskSeed,
    Model,
    Overwrite,
    PredictionsAsLabels,
    Samples,
    app,
    clear_errors,
    load,
    members,
    read,
    reading_files,
    that_trains,
)
from forcedrop.files import claim, require_suffix

if TYPE_CHECKING:
    from forcedrop.structures.predictions import Use


@app.command()
@clear_errors
@that_trains
def train(
    config: Annotated[Path, typer.Argument(help="training file (YAML)", show_default=False)],
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="remove the training that is there and start anew")
    ] = False,
) -> None:
    """Train and calibrate a model as a YAML file says."""
    from forcedrop.report import describe_validation, save_figure, training_figure
    from forcedrop.training import load_config
    from forcedrop.training import train as train_model
    from forcedrop.training.parallel import is_first_process

    if resume and overwrite:
        raise ValueError("either go on with the training or overwrite it (--resume, --overwrite), not both")
    settings = load_config(config)
    model = train_model(settings, resume=resume, overwrite=overwrite)
    if not is_first_process():  # under torchrun
        return
    save_figure(training_figure(settings.output / "log.csv"), settings.output / "training.png")
    typer.echo(
        f"{settings.output / 'model.pt'}: {describe_validation(model.provenance)}"
        + (f"; {model.calibration.sentence()}" if model.calibration else "; no error bars were trained")
    )


@app.command()
@clear_errors
@reading_files
def evaluate(
    model: Model,
    files: Files,
    output: Annotated[
        Path | None, typer.Option(help="folder for evaluation.json, the frames with σ, and plots")
    ] = None,
    write: Annotated[
        Path | None, typer.Option(help="also write the frames with σ, as .xyz, .traj, .db, .json or .h5")
    ] = None,
    overwrite: Overwrite = False,
    predictions_as_labels: PredictionsAsLabels = False,
    samples: Samples = None,
    mask_seed: MaskSeed = None,
    device: Device = "auto",
    *,
    reading: Any,
) -> None:
    """Compare a model with labelled frames: errors, honesty of σ, plots."""
    from forcedrop.evaluation import evaluate as evaluate_frames
    from forcedrop.evaluation import predict_frames, with_uncertainties
    from forcedrop.files import write_text
    from forcedrop.report import detection_figure, evaluation_table, parity_figure, save_figure, sigma_figure
    from forcedrop.structures import write_frames
    from forcedrop.structures.writers import require_frames_suffix

    require_frames_suffix(write)
    names = ("evaluation.json", "frames.h5", "parity.png", "sigma.png", "detection.png")
    made = [] if output is None else [output / name for name in names]
    claim([*made, write], [*members(model), *files], overwrite=overwrite)
    loaded = load(model, device)
    frames = read(files, loaded, reading, predictions=_use(predictions_as_labels), labels_needed=True)
    predictions = predict_frames(loaded, frames, n_samples=samples, seed=mask_seed, what="evaluate")
    result = evaluate_frames(loaded, frames, predictions=predictions)
    typer.echo(evaluation_table(result))
    noted = [with_uncertainties(frame, prediction) for frame, prediction in zip(frames, predictions, strict=True)]
    if output is not None:
        settings = {"model": str(model), "files": [str(f) for f in files], "samples": samples, "mask_seed": mask_seed}
        values = {"settings": settings, **result.as_dict()}
        write_text(output / "evaluation.json", json.dumps(values, indent=1))
        write_frames(output / "frames.h5", noted)
        title = ", ".join(path.name for path in files)
        save_figure(parity_figure(result, title), output / "parity.png")
        save_figure(sigma_figure(result, title), output / "sigma.png")
        if "forces" in result.error:
            save_figure(detection_figure(result, title), output / "detection.png")
        else:
            (output / "detection.png").unlink(missing_ok=True)  # of an earlier evaluation
        typer.echo(
            f"wrote evaluation.json, frames.h5 (with σ), parity.png, sigma.png, detection.png (with forces) to {output}"
        )
    if write is not None:
        write_frames(write, noted)
        typer.echo(f"wrote {write}")


@app.command()
@clear_errors
@reading_files
def compare(
    models: Annotated[
        list[str], typer.Argument(help="model files; several joined by + are a deep ensemble", show_default=False)
    ],
    test: Annotated[list[Path], typer.Option(help="labelled frames to judge on; may be given several times")],
    calibration: Annotated[
        Path | None, typer.Option(help="labelled frames to calibrate all models on; else each keeps its own")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="folder for comparison.json and comparison.png")] = None,
    overwrite: Overwrite = False,
    predictions_as_labels: PredictionsAsLabels = False,
    samples: Samples = None,
    device: Device = "auto",
    *,
    reading: Any,
) -> None:
    """Compare the error bars of several models, or deep ensembles of models, on the same frames."""
    from forcedrop.evaluation import compare as compare_models
    from forcedrop.files import write_text
    from forcedrop.report import comparison_figure, comparison_rows, comparison_table, save_figure

    made = [] if output is None else [output / "comparison.json", output / "comparison.png"]
    given = [member for text in models for member in members(Path(text))]
    claim(made, [*given, *test, calibration], overwrite=overwrite)
    loaded: dict[str, Any] = {}
    for text in models:
        loaded[text] = load(Path(text), device)
    if len(loaded) < len(models):
        raise ValueError("a model was given twice")
    first = next(iter(loaded.values()))

    def frames(path: Path) -> Any:
        use = _use(predictions_as_labels)
        return read([path], first, reading, predictions=use, labels_needed=True)

    sets = {path.stem: frames(path) for path in test}
    held = None if calibration is None else frames(calibration)
    found = compare_models(_short_names(loaded), sets, held, n_samples=samples)
    rows = comparison_rows(found)
    typer.echo(comparison_table(rows))
    if output is not None:
        write_text(output / "comparison.json", json.dumps(rows, indent=1))
        save_figure(comparison_figure(found), output / "comparison.png")
        typer.echo(f"wrote {output / 'comparison.json'}, comparison.png")


@app.command()
@clear_errors
@reading_files
def fill(
    model: Model,
    data: Annotated[
        list[Path], typer.Option(help="labelled frames that trained the model; may be given several times")
    ],
    held_out: Annotated[list[Path], typer.Option(help="labelled frames that did not: to choose and to calibrate by")],
    functions: Annotated[int, typer.Option(help="how many", min=2)] = 64,
    method: Annotated[str, typer.Option(help="exact_dropout or posterior")] = "exact_dropout",
    seed: Annotated[int, typer.Option(help="of what is drawn: the functions")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="where to write; by default NAME_filled.pt beside the model NAME.pt")
    ] = None,
    overwrite: Overwrite = False,
    predictions_as_labels: PredictionsAsLabels = False,
    device: Device = "auto",
    *,
    reading: Any,
) -> None:
    """Find the functions of a trained model anew: more of them, or by another method; minutes, no training."""
    from forcedrop.model import fill as fill_model
    from forcedrop.model import save_model
    from forcedrop.report import describe_functions
    from forcedrop.uncertainty import method_of

    target = model.with_name(f"{model.stem}_filled.pt") if output is None else output
    require_suffix(target, [".pt"])
    claim([target], [*members(model), *data, *held_out], overwrite=overwrite)
    loaded = load(model, device)
    use = _use(predictions_as_labels)
    train, held = (read(files, loaded, reading, predictions=use, labels_needed=True) for files in (data, held_out))
    found = fill_model(loaded, train, held, method_of(method)(functions=functions, seed=seed))
    save_model(found, target)
    typer.echo("\n".join(describe_functions(found)))
    if found.calibration is not None:
        typer.echo(f"calibration: {found.calibration.sentence()}")
    typer.echo(f"wrote {target}")


@app.command()
@clear_errors
@reading_files
def info(
    path: Annotated[Path, typer.Argument(help="a model or any file of structures", show_default=False)],
    *,
    reading: Any,
) -> None:
    """Say what is in a model file or a file of structures."""
    from forcedrop.door import door
    from forcedrop.report import describe_frames, describe_model

    if path.suffix == ".pt":
        from forcedrop.model import load_model

        with door(path, "describe"):
            typer.echo(describe_model(load_model(path)))
        return
    from forcedrop.structures.predictions import predicted

    frames = read([path], None, replace(reading, trust_units=True), predictions="keep")
    typer.echo(describe_frames(frames))
    own = [names for names in map(predicted, frames) if names]
    if own:
        typer.echo(f"{len(own)} of them hold predictions of a model ({', '.join(own[0])}) in the place of labels")


def _use(predictions_as_labels: bool) -> Use:
    return "keep" if predictions_as_labels else "refuse"


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
