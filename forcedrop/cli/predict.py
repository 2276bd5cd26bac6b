"""The command ``predict``: energies, forces, stress and σ of structures without labels."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from forcedrop.cli.common import (
    Device,
    Files,
    LengthUnit,
    MaskSeed,
    Model,
    Overwrite,
    Samples,
    SkipBad,
    app,
    clear_errors,
    list_problems,
    load,
    members,
)
from forcedrop.files import claim


@app.command()
@clear_errors
def predict(
    model: Model,
    files: Files,
    output: Annotated[
        Path, typer.Option(help="where to write: .xyz, .xyz.gz, .traj, .db, .json or .h5", show_default=False)
    ],
    overwrite: Overwrite = False,
    samples: Samples = None,
    mask_seed: MaskSeed = None,
    device: Device = "auto",
    skip_bad: SkipBad = False,
    length_unit: LengthUnit = None,
) -> None:
    """Predict energy [eV], forces [eV/Å], stress [eV/Å³] and their σ for structures of any file, however long.

    Predictions stand where ASE looks for them, and are marked, so that nobody takes them for labels.
    """
    from forcedrop.evaluation import predicted_frames
    from forcedrop.structures.writers import frames_writer, require_frames_suffix

    require_frames_suffix(output)
    claim([output], [*members(model), *files], overwrite=overwrite)
    loaded = load(model, device)
    loaded.functions_for(samples, mask_seed)
    bad, count = _look(files, loaded.elements, length_unit, skip_bad)
    frames = (frame for frame in _structures(files, length_unit) if frame.source not in bad)
    with frames_writer(output) as write, tqdm(total=count, desc="predict", unit="frame") as bar:
        for frame in predicted_frames(loaded, frames, n_samples=samples, seed=mask_seed):
            write([frame])
            bar.update()
    typer.echo(f"wrote {count} frames with predictions and σ to {output}")


def _structures(files: list[Path], length_unit: str | None) -> Iterator[Any]:
    from forcedrop.structures.streaming import structures_in

    for path in files:
        yield from structures_in(path, length_unit)


def _look(
    files: list[Path], elements: tuple[int, ...], length_unit: str | None, skip_bad: bool
) -> tuple[set[str], int]:
    """Check every structure before anything is computed; return the sources of bad ones, and how many are good."""
    from forcedrop.structures import BadFrames, check_frames

    problems, count = [], 0
    for frame in _structures(files, length_unit):
        count += 1
        problems += check_frames([frame], elements=elements)
    bad = {problem.source for problem in problems}
    if problems and not skip_bad:
        raise BadFrames(problems, hint="(--skip-bad drops and lists them)")
    if count == len(bad):
        raise (
            BadFrames(problems, hint="nothing is left")
            if bad
            else ValueError(f"no structures in {', '.join(map(str, files))}")
        )
    list_problems(problems)
    return bad, count - len(bad)
