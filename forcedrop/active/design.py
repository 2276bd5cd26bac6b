r"""Which labels would teach the network most? Choosing a batch by what it would leave of the spread over the whole pool.

The K functions of a network are draws of what it may be (raw, not calibrated: a factor common to all changes few picks), so the
deviations :math:`A_i` of their forces on frame i, shape
(3N, K), in units of :math:`\sigma\sqrt{K-1}` with σ the error that labels leave (that on validation frames), are a sketch of
its covariance: :math:`A_i A_j^T` is that of the forces of two frames. In the space of the K functions a label of frame i adds
:math:`G_i = A_i^T A_i` to the precision P, which is the unit matrix at first, and the variance that is left over all n frames of
the pool is

.. math:: V(P) = \mathrm{tr}\,P^{-1} C, \qquad C = \frac1n \sum_i G_i .

Greedily that frame is taken which makes V smallest: it is uncertain, its forces tell about those of many others, and none that
was chosen already tells the same, so nothing near a chosen frame is worth much. Sources: integrated variance (Cohn, Ghahramani &
Jordan, J. Artif. Intell. Res. 4, 129 (1996)); batches from random projections of a last layer's kernel (Holzmüller, Zaverkin,
Kästner & Steinwart, J. Mach. Learn. Res. 24, 164 (2023)), of which the draws are one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tqdm import tqdm

from forcedrop.model import TrainedModel
from forcedrop.structures import Frame
from forcedrop.uncertainty.sampling import predict_graphs

SAMPLES = 64
"""K of the sketch; all functions of a smaller bank."""
MOST = 1000
"""Candidates; of more a random part is looked at, flagged ones first, since each costs all samples."""


def information(model: TrainedModel, frames: Sequence[Frame], noise: float) -> np.ndarray:
    """Return what a label of each frame would say about which of the K functions is right, shape (n, K, K).

    Args:
        model: with something to sample.
        frames: structures.
        noise: error that a label leaves, per force component [eV/Å].
    """
    graphs = model.graphs(frames)
    samples, seed = model.functions_for(min(model.n_functions or SAMPLES, SAMPLES))
    predictions = predict_graphs(model.potential, graphs, n_samples=samples, seed=seed)
    found = []
    for p in tqdm(predictions, total=len(frames), desc="samples of candidates", unit="frame", leave=False):
        forces = p.samples["forces"].reshape(samples, -1).astype(np.float64)
        deviation = (forces - forces.mean(0)) / (noise * np.sqrt(samples - 1))
        found.append(deviation @ deviation.T)
    return np.array(found).reshape(-1, samples, samples)


class Design:
    """A batch that grows.

    Args:
        information: from :func:`information`, of the whole pool.
    """

    def __init__(self, information: np.ndarray) -> None:
        self.information = information
        self.average = information.mean(0)
        self.precision = np.eye(information.shape[1])

    def add(self, index: int) -> None:
        """Count frame ``index`` as labelled."""
        self.precision = self.precision + self.information[index]

    def left(self) -> float:
        """Return the variance of force vectors that is left, a frame's average, in units of the noise's variance."""
        return float(np.trace(np.linalg.solve(self.precision, self.average)))

    def gains(self, indices: np.ndarray) -> np.ndarray:
        """Return by how much a label of each of these frames would lessen what is left."""
        after = np.linalg.solve(self.precision + self.information[indices], self.average[None])
        gains: np.ndarray = self.left() - np.trace(after, axis1=1, axis2=2)
        return gains
