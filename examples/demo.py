"""The main job from beginning to end on the ethanol in ``data/``: train, calibrate, MD with error bars, flag, one page.

Everything lands in ``runs/demo``; open ``runs/demo/results.html``. Deleting the folder starts over; running again resumes.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
from ase import Atoms

from forcedrop.active import flag
from forcedrop.calculator import DropoutCalculator
from forcedrop.evaluation import Evaluation, evaluate
from forcedrop.md import NVE, NVT, run_md
from forcedrop.model import TrainedModel, load_model
from forcedrop.report import (
    Picture,
    Plain,
    Section,
    Text,
    describe_frames,
    describe_model,
    detection_figure,
    evaluation_table,
    flag_figure,
    folder_sections,
    functions_figure,
    md_figure,
    parity_figure,
    results_page,
    save_figure,
    sigma_figure,
    training_figure,
)
from forcedrop.structures import read_frames, write_frames
from forcedrop.training import TrainingInterrupted, load_config, train
from forcedrop.uncertainty.calibration import CRITERIA

ROOT = Path(__file__).resolve().parent.parent
DATA, OUT = ROOT / "data", ROOT / "runs" / "demo"
SAMPLES = 16


def main() -> None:
    """Run every step and write the page."""
    start = time.monotonic()
    if (OUT / "results.html").exists():
        shutil.rmtree(OUT)
    model, sections = trained()
    sections += [*evaluated(model), *simulated(model), flagged(model)]
    minutes = (time.monotonic() - start) / 60
    text = f"Made by examples/demo.py in {minutes:.1f} minutes. What you see is explained above each picture."
    page = results_page(
        OUT / "results.html", "forcedrop: ethanol with error bars", [Section("", [Text(text)]), *sections]
    )
    print(f"\n{minutes:.1f} minutes. Open {page.relative_to(ROOT)}; flagged frames are in runs/demo/flagged.xyz")


def trained() -> tuple[TrainedModel, list[Section]]:
    """Train on 300 K frames and calibrate on frames held out from them."""
    print("1/4  training on 300 K ethanol (GFN2-xTB)")
    config = load_config(ROOT / "examples" / "configs" / "ethanol.yaml").model_copy(update={"output": OUT})
    model = load_model(OUT / "model.pt") if (OUT / "model.pt").exists() else train(config, resume=True)
    about = describe_frames(read_frames(DATA / "ethanol_300K.h5"))
    text = (
        "An equivariant network was trained. Then dropout made 64 functions of it: each drops its own part of what energies are "
        "read from, and has weights of its own for the rest, solved in closed form from the training labels. What their spread "
        "is worth was fitted on frames that none of this had seen."
    )
    picture = save_figure(training_figure(OUT / "log.csv"), OUT / "training.png")
    known = Plain(f"Data\n  {indent(about)}\n\nModel\n  {indent(describe_model(model))}")
    return model, [Section("Training", [Text(text), known, Picture(picture)]), functions(model)]


def functions(model: TrainedModel) -> Section:
    """Show the dropout functions at work: the C–O bond of ethanol, pulled apart."""
    frames = read_frames(DATA / "ethanol_300K.h5")
    start = frames[0].to_atoms()
    oxygen = int(np.flatnonzero(start.numbers == 8)[0])
    carbon = min(np.flatnonzero(start.numbers == 6), key=lambda i: start.get_distance(i, oxygen))
    hydroxyl = [i for i in np.flatnonzero(start.numbers == 1) if start.get_distance(i, oxygen) < 1.2]
    seen = [frame.to_atoms().get_distance(carbon, oxygen) for frame in frames]
    lengths = np.linspace(1.25, 2.1, 35)
    calculator = DropoutCalculator(model, n_samples=SAMPLES, keep_samples=True)
    rows: list[tuple[np.ndarray, float, float]] = []
    references = []
    for length in lengths:
        atoms = start.copy()
        atoms.set_distance(carbon, oxygen, length, fix=0, indices=[oxygen, *hydroxyl])
        atoms.calc = calculator
        energy, results = atoms.get_potential_energy(), calculator.results
        rows.append((results["energy_ensemble"], energy, results["energy_uncertainty"]))
        references.append(reference_energy(atoms))
    samples, mean, sigma = (np.array(column) for column in zip(*rows, strict=True))
    known = None if None in references else np.array(references, float)
    figure = functions_figure(
        lengths, samples.T - mean.min(), mean - mean.min(), sigma, label="C–O distance [Å]",
        reference=None if known is None else known - known.min(), seen=(min(seen), max(seen)),
    )  # fmt: skip
    text = (
        "The C–O bond of one molecule, shortened and pulled apart: energies of the single functions (calibrated), and σ. Where "
        "there were training data they agree, and beyond they part. Each function is a force field of its own, smooth and "
        "conservative. Where the bond breaks σ grows two hundredfold, and the error more: there σ is a warning, not a measure."
    )
    return Section("Dropout functions at work", [Text(text), Picture(save_figure(figure, OUT / "functions.png"))])


def reference_energy(atoms: Atoms) -> float | None:
    """Return the energy by the method of the training data [eV], if tblite is installed."""
    try:
        from tblite.ase import TBLite
    except ImportError:
        return None
    copy = atoms.copy()
    copy.calc = TBLite(method="GFN2-xTB", verbosity=0, accuracy=0.1)
    return float(copy.get_potential_energy())


def evaluated(model: TrainedModel) -> list[Section]:
    """Compare with the reference at 300 K, 600 K and 1200 K."""
    print("2/4  errors and error bars at 300 K (held out), 600 K and 1200 K")
    held_out = json.loads((OUT / "split.json").read_text(encoding="utf-8"))["validation"]
    numbers = [int(source.rpartition("#")[2]) for source in held_out]
    everything = read_frames(DATA / "ethanol_300K.h5")
    sets = {
        "300 K": [everything[i] for i in numbers],
        "600 K": read_frames(DATA / "ethanol_600K.h5"),
        "1200 K": read_frames(DATA / "ethanol_1200K.h5"),
    }
    sections = []
    for name, frames in sets.items():
        result: Evaluation = evaluate(model, frames, n_samples=SAMPLES)
        table = evaluation_table(result)
        print(f"\n{name}\n{table}")
        stem = name.replace(" ", "")
        pictures = [
            save_figure(parity_figure(result, name), OUT / f"parity_{stem}.png"),
            save_figure(sigma_figure(result, name), OUT / f"sigma_{stem}.png"),
            save_figure(detection_figure(result, name), OUT / f"detection_{stem}.png"),
        ]
        text = (
            "Above: predictions against the reference. Below: |error| against σ, which honest error bars keep in the "
            "grey band, and how many errors lie inside their intervals."
        )
        sections.append(Section(f"Ethanol at {name}", [Text(text), Plain(table), *map(Picture, pictures)]))
    return sections


def simulated(model: TrainedModel) -> list[Section]:
    """Run dynamics with error bars at the temperature of the training and far above."""
    print("\n3/4  molecular dynamics with error bars")
    start = read_frames(DATA / "ethanol_300K.h5")[0].to_atoms()
    threshold = model.calibration.threshold("max_force", 0.95) if model.calibration else None
    sections = []
    for name, ensemble, temperature in (
        ("NVE, 300 K", NVE(), 300.0),
        ("Langevin, 1200 K", NVT(0.02), 1200.0),
    ):
        calculator = DropoutCalculator(model, n_samples=8)
        folder = OUT / f"md_{temperature:.0f}K"
        run = run_md(
            start.copy(), calculator, folder, ensemble=ensemble, temperature=temperature, steps=600, record_every=5,
            threshold=threshold, stop_above=None if threshold is None else 10 * threshold,
            overwrite=True,
        )  # fmt: skip
        print(run.summary())
        picture = save_figure(md_figure(run.rows, run.flagged, run.threshold), folder / "md.png")
        text = (
            "The samples are fixed, so their mean is one smooth potential and the total energy stays level in NVE. "
            "Red ticks mark the moments that the model flags; at ten times that σ the run ends."
        )
        structures, *_ = folder_sections(folder)
        blocks = [Text(text), Plain(run.summary()), Picture(picture), *structures.blocks]
        sections.append(Section(f"Dynamics: {name}", blocks))
    return sections


def flagged(model: TrainedModel) -> Section:
    """Flag what the model does not know among frames of all temperatures."""
    print("\n4/4  flagging uncertain frames")
    frames = [
        frame for temperature in (300, 600, 1200) for frame in read_frames(DATA / f"ethanol_{temperature}K.h5")[:60]
    ]
    flags = flag(model, frames, n_samples=SAMPLES)
    write_frames(OUT / "flagged.xyz", flags.flagged)
    print(flags.summary())
    picture = save_figure(
        flag_figure(flags.values, flags.threshold, flags.criterion, CRITERIA[flags.criterion]), OUT / "flags.png"
    )
    text = (
        "60 frames each at 300 K, 600 K and 1200 K, in this order, judged by their largest atomic force σ alone; the "
        "threshold is the level that 95 % of the calibration frames stay below. "
        "Those above are in flagged.xyz, most uncertain first, with σ "
        "per atom: send them to the reference method and train again."
    )
    return Section("Flagged frames", [Text(text), Plain(flags.summary()), Picture(picture)])


def indent(text: str) -> str:
    """Indent a block, which the page then shows as it is."""
    return text.replace("\n", "\n  ")


if __name__ == "__main__":
    try:
        main()
    except TrainingInterrupted as error:
        sys.exit(f"{error}; or run the demo again")
