r"""Looking for what the model does not know: dynamics pushed towards large σ, and displacements that make σ largest.

*Dynamics* are pushed along the gradient of the variance of the energy, which costs nothing beyond the samples' forces: with the
sample variance :math:`s^2 = \sum_k (E_k - \bar E)^2 / (K-1)`,

.. math:: \nabla s^2 = -\frac{2}{K-1} \sum_k (E_k - \bar E)(F_k - \bar F),

and the same with the samples' stress for the strain. *Displacements* climb the variance of the forces, which is what frames are
judged by; its gradient takes second derivatives of every sample, by automatic differentiation twice.

The spread is the raw one, without the calibration's factor, which changes with the structure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import all_changes
from torch import Tensor

from forcedrop.calculator import DropoutCalculator
from forcedrop.derive import geometry
from forcedrop.dropout import frozen
from forcedrop.graph import NeighbourFinder, batch_graphs, build_graph
from forcedrop.model import TrainedModel
from forcedrop.potential.neighbours import sum_incoming
from forcedrop.structures import Frame
from forcedrop.uncertainty.calibration import frame_criteria
from forcedrop.uncertainty.sampling import Prediction


@dataclass(frozen=True)
class EnergyVariance:
    r"""The sample variance of the energy over the number of atoms, :math:`u^2 = s^2/N`, and how it changes.

    Attributes:
        value: u² [eV²].
        gradient: ∂u²/∂x [eV²/Å], shape (N, 3).
        strain: ∂u²/∂ε / V [eV²/Å³], shape (6,), Voigt order.
    """

    value: float
    gradient: np.ndarray
    strain: np.ndarray

    @classmethod
    def of(cls, prediction: Prediction) -> EnergyVariance:
        """Take it from the samples of one structure."""
        samples = prediction.samples
        energy, forces, stress = (
            x.detach().to("cpu").double().numpy() for x in (samples.energy, samples.forces, samples.stress)
        )
        energy = energy[: len(forces)]  # a bank has energies of all its functions
        deviation = energy[:, 0] - energy[:, 0].mean()
        weight = 2 * deviation / ((len(deviation) - 1) * forces.shape[1])  # these sum to 0: no means to be taken off
        return cls(
            float(deviation @ deviation) / ((len(deviation) - 1) * forces.shape[1]),
            -np.einsum("k,kni->ni", weight, forces),
            np.einsum("k,ki->i", weight, stress[:, 0]),
        )


@dataclass(frozen=True)
class Bias:
    r"""Uncertainty-driven dynamics: :math:`E_\text{bias} = A\,[\exp(-u^2/B^2) - 1]`, u the energy's spread per √atom.

    The energy falls by A where u is beyond B; where u is far below, the bias is a parabola :math:`-A u^2/B^2`. Source: Kulichenko
    et al., Nat. Comput. Sci. 3, 230 (2023), whose σ² has another constant factor, which B takes up; bias stress: Zaverkin et al.,
    npj Comput. Mater. 10, 83 (2024).

    Attributes:
        strength: A [eV].
        width: B [eV per √atom]; a few times u of known structures is a start.
        cap: largest bias force on an atom [eV/Å]; beyond, all bias forces are scaled down together, and the energy is no longer
            what they derive from: use a thermostat.
    """

    strength: float
    width: float
    cap: float = float("inf")

    def __post_init__(self) -> None:
        """Check the signs.

        Raises:
            ValueError: if the width or the cap is not positive, or the strength negative.
        """
        if self.strength < 0 or not self.width > 0 or not self.cap > 0:
            raise ValueError(
                f"a bias needs strength ≥ 0, width > 0 and cap > 0, got {self.strength}, {self.width}, {self.cap}"
            )

    def energy(self, variance: EnergyVariance) -> float:
        """Return the bias [eV], between −A and 0."""
        return self.strength * float(np.expm1(-variance.value / self.width**2))

    def forces(self, variance: EnergyVariance) -> np.ndarray:
        """Return its forces [eV/Å], shape (N, 3), capped."""
        forces = -self._slope(variance) * variance.gradient
        largest = float(np.linalg.norm(forces, axis=1).max())
        return forces * min(1.0, self.cap / largest) if largest > 0 else forces

    def stress(self, variance: EnergyVariance) -> np.ndarray:
        """Return its stress [eV/Å³], shape (6,), not capped."""
        return self._slope(variance) * variance.strain

    def _slope(self, variance: EnergyVariance) -> float:
        """Return ∂E_bias/∂u²."""
        return -self.strength / self.width**2 * float(np.exp(-variance.value / self.width**2))


class BiasedCalculator(DropoutCalculator):
    """The calculator with a :class:`Bias`: dynamics are drawn to structures that the model does not know.

    ``energy``, ``forces`` and ``stress`` contain the bias; ``bias_energy`` [eV] and ``bias_forces`` [eV/Å] say how much. Samples
    and error bars are those of the unbiased potential.

    Args:
        model: as in :class:`~forcedrop.calculator.DropoutCalculator`.
        bias: what is added.
        n_samples: K.
        seed: of the masks.
        settings: as there; ``uncertainty_every`` must be 1, since the bias needs all samples at every step.

    Raises:
        ValueError: as there, or if σ is not computed at every step.
    """

    def __init__(
        self,
        model: TrainedModel | str | Any,
        bias: Bias,
        n_samples: int | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(model, n_samples, seed, **settings)
        if self.uncertainty_every != 1:
            raise ValueError(f"a bias needs σ at every step, got uncertainty_every={self.uncertainty_every}")
        self.bias = bias

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Fill ``results`` for ``atoms``; as in the unbiased calculator."""
        super().calculate(atoms, properties, system_changes)
        if self.prediction is None:
            raise ValueError("a bias needs samples at every evaluation")
        variance = EnergyVariance.of(self.prediction)
        energy, forces = self.bias.energy(variance), self.bias.forces(variance)
        results = self.results
        results |= {"bias_energy": energy, "bias_forces": forces}
        results["energy"] += energy
        results["free_energy"] = results["energy"]
        results["forces"] = results["forces"] + forces
        if "stress" in results:
            results["stress"] = results["stress"] + self.bias.stress(variance)

    def describe(self) -> dict[str, Any]:
        """Return what decides its numbers beside the model, in plain values."""
        cap = self.bias.cap if np.isfinite(self.bias.cap) else None
        return {**super().describe(), "bias": {**asdict(self.bias), "cap": cap}}

    def copy(self) -> BiasedCalculator:
        """Return an independent calculator of the same function."""
        return _rebuild(self.model, self.bias, self._settings())

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.model, self.bias, self._settings())


def _rebuild(model: TrainedModel, bias: Bias, settings: dict[str, Any]) -> BiasedCalculator:
    return BiasedCalculator(model, bias, **settings)


def force_variance(calculator: DropoutCalculator, atoms: Atoms) -> tuple[float, np.ndarray]:
    """Return the mean variance of the force components over the samples [eV²/Å²], and its gradient [eV²/Å³], shape (N, 3)."""
    potential = calculator.potential
    finder, dtype = NeighbourFinder(potential.cutoff), potential.dtype
    batch = batch_graphs([build_graph(Frame.geometry(atoms), finder, dtype)]).to(calculator.device)
    graph, vec = geometry(potential, batch)
    samples = torch.arange(calculator.n_samples, device=calculator.device)

    def along(pairs: Tensor) -> Tensor:
        """From the derivative by the pair vectors to that by the positions, with a minus: see ``derive.py``."""
        return pairs.sum(1) - sum_incoming(pairs, graph.nbr, graph.reverse)

    def variance(vec: Tensor) -> Tensor:
        def energy(vec: Tensor, sample: Tensor) -> Tensor:
            with frozen(potential, calculator.seed, sample):
                return potential(vec, graph).sum()

        slope = torch.func.grad(energy)
        forces = torch.func.vmap(lambda sample: along(slope(vec, sample)))(samples)
        return forces.var(dim=0, correction=1).mean()

    with torch.enable_grad():
        gradient, value = torch.func.grad_and_value(variance)(vec)
    return float(value.detach()), -along(gradient.detach()).to("cpu", torch.float64).numpy()


@dataclass(frozen=True)
class Adversary:
    """A structure displaced to where the samples disagree.

    Attributes:
        frame: unlabelled, with σ in ``info``.
        before: σ of the start by criterion, see ``forcedrop.uncertainty.calibration.frame_criteria``.
        after: σ of the end.
        energy: its energy above the start [eV].
        displacement: of the atom that moved most [Å].
        steps: how many steps were accepted.
    """

    frame: Frame
    before: dict[str, float]
    after: dict[str, float]
    energy: float
    displacement: float
    steps: int


def adversarial(
    atoms: Atoms,
    calculator: DropoutCalculator,
    *,
    max_displacement: float,
    temperature: float | None = None,
    max_energy: float | None = None,
    steps: int = 50,
    step_size: float = 0.05,
    seed: int = 0,
) -> Adversary:
    r"""Displace the atoms so that the samples disagree, at bounded energy and distance.

    Climbs :math:`\log s_F^2 - \Delta E/kT`, the logarithm of the variance of the forces times the Boltzmann factor, by projected
    gradient ascent with halved steps where it would fall, along the bound on the energy where that is near. Source:
    Schwalbe-Koda, Tan & Gómez-Bombarelli, Nat. Commun. 12, 5104 (2021).

    Args:
        atoms: the start, left as it is.
        calculator: whose samples.
        max_displacement: of each atom from the start [Å].
        temperature: of the Boltzmann factor [K]; without it energy costs nothing up to ``max_energy``.
        max_energy: above the start [eV], never exceeded.
        steps: evaluations at most.
        step_size: of the atom that moves most, at first [Å].
        seed: of the small displacement that it begins with, for a symmetric start has no gradient.

    Raises:
        ValueError: without any bound on the energy, or for bounds that are not positive.
    """
    bounds = {"max_displacement": max_displacement, "temperature": temperature, "max_energy": max_energy}
    if temperature is None and max_energy is None:
        raise ValueError("give a temperature or max_energy (or both), else nothing keeps the atoms together")
    wrong = {name: value for name, value in bounds.items() if value is not None and not value > 0}
    if wrong or steps < 1 or not step_size > 0:
        raise ValueError(f"bounds, steps and step_size must be positive, got {wrong or (steps, step_size)}")
    now = atoms.copy()
    climb = _Climb(now, calculator, temperature, max_energy)
    before = climb.criteria()
    origin = now.get_positions()
    noise = np.random.default_rng(seed).normal(scale=0.1 * step_size, size=origin.shape)
    place, score, gradient = origin, -np.inf, noise - noise.mean(axis=0)
    length, accepted = step_size, 0
    for _ in range(steps):
        largest = float(np.linalg.norm(gradient, axis=1).max())
        if not largest > 0 or length < 1e-4 * step_size:
            break
        reach = length if np.isfinite(score) else min(length, 0.1 * step_size)  # the first step is noise
        trial = _within(origin, place + reach / largest * gradient, max_displacement)
        value, slope = climb.at(trial)
        if value > score:
            place, score, gradient, accepted = trial, value, slope, accepted + 1
            length = min(1.2 * length, step_size)
        else:
            length /= 2
    now.set_positions(place, apply_constraint=False)
    after = climb.criteria()
    moved = float(np.linalg.norm(place - origin, axis=1).max())
    info = {"origin": "adversarial", "moved_A": moved, **{f"sigma_{name}": value for name, value in after.items()}}
    return Adversary(Frame.from_atoms(now, info=info), before, after, climb.above(), moved, accepted)


def _within(origin: np.ndarray, positions: np.ndarray, most: float) -> np.ndarray:
    """Project each atom into a ball about its origin."""
    moved = positions - origin
    length = np.linalg.norm(moved, axis=1, keepdims=True)
    return origin + moved * np.minimum(1.0, most / np.maximum(length, 1e-12))


class _Climb:
    """The objective of :func:`adversarial` and its gradient."""

    def __init__(
        self, atoms: Atoms, calculator: DropoutCalculator, temperature: float | None, max_energy: float | None
    ) -> None:
        self.atoms, self.calculator = atoms, calculator
        self.beta = 0.0 if temperature is None else 1 / (units.kB * temperature)
        self.most = np.inf if max_energy is None else max_energy
        self.start = float(calculator.get_property("energy", atoms))

    def above(self) -> float:
        """Return the energy above the start [eV]."""
        return float(self.calculator.get_property("energy", self.atoms)) - self.start

    def criteria(self) -> dict[str, float]:
        """Return σ by criterion."""
        kind = self.calculator.sigma_kind
        forces = self.calculator.get_property(f"forces_{kind}", self.atoms)
        return frame_criteria(forces, float(self.calculator.get_property(f"energy_{kind}", self.atoms)))

    def at(self, positions: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the objective, −∞ beyond the bound on the energy, and its gradient."""
        self.atoms.set_positions(positions, apply_constraint=False)
        above = self.above()
        if above > self.most:
            return -np.inf, np.zeros_like(positions)
        variance, gradient = force_variance(self.calculator, self.atoms)
        floor = max(variance, 1e-24)
        downhill = self.calculator.get_property("forces", self.atoms)
        gradient = gradient / floor + self.beta * downhill
        up = -float(np.sum(gradient * downhill))
        if above > 0.8 * self.most and up > 0:
            gradient = gradient + up / float(np.sum(np.square(downhill))) * downhill
        return float(np.log(floor)) - self.beta * above, gradient
