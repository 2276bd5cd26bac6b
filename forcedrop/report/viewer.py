"""The viewer of structures: atoms coloured by σ, with chemiscope's script embedded in the page.

Chemiscope (Fraux et al., J. Open Source Softw. 5, 2117, 2020; BSD licence) ships its viewer in its wheel.
"""

from __future__ import annotations

import html
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
from ase import Atoms

from forcedrop.report.page import Block
from forcedrop.structures import Frame

_SIGMA, _SIZE, _ERROR = "atomic force σ", "force", "force error"
_LARGEST_SIGMA, _LARGEST_ERROR = "largest atomic force σ", "largest force error"
_INFO = {  # names that md and active learning write into each frame
    "time_fs": ("time", "fs"),
    "temperature_K": ("temperature", "K"),
    "total_eV": ("total energy", "eV"),
    "pressure_GPa": ("pressure", "GPa"),
    "round": ("round", ""),
    "sigma_max_force": (_LARGEST_SIGMA, "eV/Å"),
    "error_max_force": (_LARGEST_ERROR, "eV/Å"),
}
_BRIGHTEST = 0.99
_DIGITS = 5


@dataclass(frozen=True)
class ShownFrame:
    """What the viewer tells of a frame; ``None`` where the frame does not say.

    Attributes:
        forces: predicted, the norm of each atom's [eV/Å], shape (N,).
        sigma: norm of each atom's component σ [eV/Å], shape (N,); calibrated where the model is.
        error: norm of each atom's error [eV/Å], shape (N,), where there is a reference.
        energy: predicted [eV].
        energy_sigma: [eV].
        energy_error: predicted − reference, per atom [eV].
    """

    forces: np.ndarray | None
    sigma: np.ndarray | None
    error: np.ndarray | None
    energy: float | None
    energy_sigma: float | None
    energy_error: float | None


def look_at(frame: Frame) -> ShownFrame:
    """Return predictions, σ and errors of a frame.

    Frames of ``evaluate`` and ``flag`` carry predictions as ``forcedrop_forces`` beside their labels; in those of ``md`` the
    forces are the predictions.
    """
    predicted, reference = frame.arrays.get("forcedrop_forces"), frame.forces
    energy, label = frame.info.get("forcedrop_energy"), frame.energy
    if predicted is None:
        predicted, reference, energy, label = frame.forces, None, frame.energy, None
    sigma = frame.arrays.get("forces_uncertainty", frame.arrays.get("forces_std"))
    return ShownFrame(
        forces=None if predicted is None else _norms(predicted),
        sigma=None if sigma is None else _norms(sigma),
        error=None if predicted is None or reference is None else _norms(predicted - reference),
        energy=energy,
        energy_sigma=frame.info.get("energy_uncertainty", frame.info.get("energy_std")),
        energy_error=None if energy is None or label is None else (energy - label) / len(frame),
    )


def choose_frames(n_frames: int, most: int, always: Collection[int] = ()) -> list[int]:
    """Return the indices of ``most`` frames, evenly spread, and of those that must be there, in order.

    Raises:
        ValueError: if there is no frame, none is allowed, or one that must be there does not exist.
    """
    if n_frames < 1 or most < 1:
        raise ValueError(f"the viewer needs at least one frame, got {n_frames} frames and at most {most} of them")
    if missing := [i for i in always if not 0 <= i < n_frames]:
        raise ValueError(f"frame {missing[0]} must be shown, but there are {n_frames} frames")
    spread = np.linspace(0, n_frames - 1, min(n_frames, most)).round().astype(int).tolist()
    return sorted({*spread, *always})


@dataclass(frozen=True)
class Viewer(Block):
    """Structures with their σ, a map of the frames beside them, and a slider.

    Attributes:
        frames: all that is shown.
        numbers: of each frame in its file; 0, 1, 2 … by default.
        flagged: positions in ``frames`` of those to be marked.
        threshold: σ of force above which a frame is flagged [eV/Å], for the legend.
        trajectory: whether the frames follow one another in time.
        name: distinguishes several viewers on a page.
    """

    frames: Sequence[Frame]
    numbers: Sequence[int] = ()
    flagged: Collection[int] = ()
    threshold: float | None = None
    trajectory: bool = False
    name: str = "viewer"
    _shown: list[ShownFrame] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not self.frames:
            raise ValueError("the viewer needs at least one frame, got none")
        if self.numbers and len(self.numbers) != len(self.frames):
            raise ValueError(f"got {len(self.numbers)} numbers for {len(self.frames)} frames")
        object.__setattr__(self, "_shown", [look_at(frame) for frame in self.frames])

    def dataset(self) -> dict[str, Any]:
        """Return what chemiscope shows: structures, properties of atoms and of frames, settings."""
        import chemiscope  # costs half a second

        atoms = [_geometry(frame) for frame in self.frames]
        properties = self._of_atoms() | self._of_frames()
        return dict(
            chemiscope.create_input(
                structures=atoms,
                metadata={"name": " "},
                properties=properties,
                environments=chemiscope.all_atomic_environments(atoms) if self._all("sigma") else None,
                settings=self._settings(properties),
            )
        )

    def colour_range(self) -> tuple[float, float] | None:
        """Return σ [eV/Å] of the first and the last colour, the same for all frames; None where σ is missing.

        It ends where 99 % of the atoms lie below, or at the threshold if that is higher: one atom gone astray shall not darken
        all others.
        """
        sigma = self._all("sigma")
        if sigma is None:
            return None
        high = max(float(np.quantile(np.concatenate(sigma), _BRIGHTEST)), self.threshold or 0.0)
        if high == 0:
            return 0.0, 1.0
        digit = 10.0 ** (np.floor(np.log10(high)) - 1)
        return 0.0, _round(float(np.ceil(high / digit) * digit))  # two digits, which is what the viewer's labels show

    @property
    def _first(self) -> int | None:
        """The frame that is shown first: that of the largest σ, where something is to be seen."""
        sigma = self._all("sigma")
        return None if sigma is None else int(np.argmax([values.max() for values in sigma]))

    def _all(self, name: str) -> list[Any] | None:
        """Return an attribute of every frame shown, or None if one of them lacks it: the viewer has no gaps."""
        values = [getattr(shown, name) for shown in self._shown]
        return None if any(value is None or not np.isfinite(value).all() for value in values) else values

    def _of_atoms(self) -> dict[str, dict[str, Any]]:
        if self._all("sigma") is None:  # without environments chemiscope takes no values of atoms
            return {}
        described = {
            "sigma": (_SIGMA, "norm of the σ of the three components"),
            "forces": (_SIZE, "norm of the predicted force"),
            "error": (_ERROR, "norm of predicted − reference"),
        }
        return {
            name: {"target": "atom", "values": _rounded(np.concatenate(values)), "units": "eV/Å", "description": what}
            for key, (name, what) in described.items()
            if (values := self._all(key)) is not None
        }

    def _of_frames(self) -> dict[str, dict[str, Any]]:
        found: dict[str, tuple[Sequence[Any], str]] = {}
        for key, (name, unit) in _INFO.items():
            noted = [frame.info.get(key) for frame in self.frames]
            if all(value is not None for value in noted):
                found[name] = noted, unit
        found["frame"] = list(self.numbers or range(len(self.frames))), ""
        for key, name in (("sigma", _LARGEST_SIGMA), ("error", _LARGEST_ERROR)):
            if (norms := self._all(key)) is not None:
                found[name] = [values.max() for values in norms], "eV/Å"
        energies = {"energy": "energy", "energy_sigma": "σ of energy", "energy_error": "energy error"}
        for key, name in energies.items():
            if (values := self._all(key)) is not None:
                found[name] = values, "eV/atom" if key == "energy_error" else "eV"
        properties: dict[str, dict[str, Any]] = {
            name: {"target": "structure", "values": _rounded(np.array(values, dtype=float)), "units": unit}
            for name, (values, unit) in found.items()
        }
        if self.flagged:
            words = ["flagged" if i in self.flagged else "not flagged" for i in range(len(self.frames))]
            properties["flag"] = {"target": "structure", "values": words}
        return properties

    def _settings(self, properties: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Return what is drawn first: σ along time where there is a time, error against σ where there are errors."""
        names = [name for name, property_ in properties.items() if property_["target"] == "structure"]
        x = "time" if "time" in names else "frame"
        y = next((name for name in (_LARGEST_SIGMA, "energy") if name in names), "frame")
        if _LARGEST_ERROR in names and _LARGEST_SIGMA in names:
            x, y = _LARGEST_SIGMA, _LARGEST_ERROR
        colour = next((name for name in ("round", "temperature", "σ of energy", "energy") if name in names), "")
        chart: dict[str, Any] = {"x": {"property": x}, "y": {"property": y}, "joinPoints": self.trajectory}
        chart |= {"color": {"property": colour}, "palette": "viridis"} if colour else {}
        chart |= {"symbol": "flag"} if "flag" in names else {}
        structure: dict[str, Any] = {
            "keepOrientation": self.trajectory, "playbackDelay": 100 if self.trajectory else 700,
            "unitCell": any(bool(frame.pbc.any()) for frame in self.frames),
        }  # fmt: skip
        if (ends := self.colour_range()) is not None:
            structure["color"] = {"property": _SIGMA, "min": ends[0], "max": ends[1], "palette": "plasma"}
            structure["environments"] = {"activated": False}
        settings = {"target": "structure", "map": chart, "structure": [structure]}
        return settings if self._first is None else {**settings, "pinned": [self._first]}

    def legend(self) -> str:
        """Return in words what the colours mean."""
        ends = self.colour_range()
        if ends is None:
            return "These frames carry no σ of forces, so atoms have the colours of their elements."
        kind = "calibrated" if "forces_uncertainty" in self.frames[0].arrays else "raw, not calibrated"
        text = (
            f"Atoms are coloured by σ of their force ({kind}): from dark, 0, to yellow, {ends[1]:.3g} eV/Å and above. "
            "The scale is the same for all frames; the frame of largest σ is shown first. "
        )
        if self.threshold is not None:
            text += f"Frames are flagged above {self.threshold:.3g} eV/Å. "
        return text + (
            "Drag to turn, scroll to zoom; the slider, or a click on a point of the map, chooses the frame "
            "(red in the map); ▶ plays. ☰ changes what is drawn; “atom”, below the map, puts atoms instead of frames into it."
        )

    def html(self) -> str:
        """Return the viewer with its legend and its data."""
        data = json.dumps(self.dataset(), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
        return _HTML.format(name=html.escape(self.name), legend=html.escape(self.legend()), data=data)

    def script(self) -> str:
        """Return chemiscope's viewer, some three megabytes, in a form that may stand between script tags."""
        text = (files("chemiscope") / "sphinx" / "static" / "chemiscope.min.js").read_text(encoding="utf-8")
        return text.replace("</script", "<\\/script").replace("<!--", "\\x3c!--")


def _geometry(frame: Frame) -> Atoms:
    return Atoms(numbers=frame.z, positions=frame.pos.round(_DIGITS), cell=frame.cell.round(_DIGITS), pbc=frame.pbc)


def _norms(vectors: np.ndarray) -> np.ndarray:
    return np.linalg.norm(vectors, axis=1)


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def _rounded(values: np.ndarray) -> list[float]:
    return [_round(value) for value in values.tolist()]


_HTML = """<style>
.viewer {{ margin: 1rem 0; }}
.viewer .columns {{ display: flex; flex-wrap: wrap; gap: 1rem; }}
.viewer .columns > div {{ flex: 1 1 26rem; min-width: 0; }}
.viewer .column {{ display: flex; flex-direction: column; height: min(34rem, 90vh); min-height: 16rem; }}
.viewer .big {{ flex: 1; min-height: 0; position: relative; }}
.viewer .status:empty {{ display: none; }}
.viewer .problem {{ color: #a00; }}
</style>
<div class="viewer" id="{name}">
<p>{legend}</p>
<div class="columns">
<div class="column"><div class="big" id="{name}-structure"></div><div id="{name}-info"></div></div>
<div class="column"><div class="big" id="{name}-map"></div></div>
</div>
<div id="{name}-meta" hidden></div>
<p class="status" role="status">The structures are being loaded …</p>
<noscript><p class="problem">The structures are shown by a script; this browser runs none.</p></noscript>
<script type="application/json" id="{name}-data">{data}</script>
<script>
(() => {{
  const name = "{name}", root = document.getElementById(name);
  const status = root.querySelector(".status");
  const say = (message) => {{ status.textContent = message; status.classList.toggle("problem", message !== ""); }};
  const warnings = new Chemiscope.Warnings();
  warnings.addHandler((message) => say(message));
  const data = JSON.parse(document.getElementById(name + "-data").textContent);
  const places = {{}};
  for (const part of ["meta", "map", "structure", "info"]) places[part] = name + "-" + part;
  // While it sets itself up the viewer draws the structure some two hundred times over, which takes a minute where there is no
  // GPU. Only the last time counts, so nothing is drawn until it has not tried for a third of a second.
  const inStructure = (node) => {{
    for (; node; node = node.parentNode || node.host) if (node.id === places.structure) return true;
    return false;
  }};
  const holdDrawing = () => {{
    let held = true, last = performance.now();
    for (const kind of [WebGLRenderingContext.prototype, WebGL2RenderingContext.prototype])
      for (const call of ["drawElements", "drawArrays", "clear"]) {{
        const original = kind[call];
        kind[call] = function (...values) {{
          if (held && inStructure(this.canvas)) last = performance.now();
          else original.apply(this, values);
        }};
      }}
    return () => new Promise((resolve) => {{
      const timer = setInterval(() => {{
        if (performance.now() - last < 333) return;
        clearInterval(timer);
        held = false;
        dispatchEvent(new Event("resize"));
        resolve();
      }}, 50);
    }});
  }};
  const start = async () => {{
    const release = holdDrawing();
    try {{
      await Chemiscope.DefaultVisualizer.load(places, data, warnings);
      await release();
      say("");
      root.dataset.state = "ready";
    }} catch (error) {{
      release();
      console.error(error);
      say("The structures cannot be shown (the viewer needs WebGL): " + error);
    }}
  }};
  // not before it is looked at: a browser keeps a dozen pictures of this kind at a time, and the rest of the page comes first
  const watcher = new IntersectionObserver((entries) => {{
    if (entries.some((entry) => entry.isIntersecting)) {{ watcher.disconnect(); start(); }}
  }});
  addEventListener("load", () => watcher.observe(root));
}})();
</script>
</div>"""
