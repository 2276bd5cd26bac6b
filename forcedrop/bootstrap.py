"""Intervals of scores over correlated entries: whole blocks, such as frames, are drawn, not entries.

Source: Efron & Tibshirani, An Introduction to the Bootstrap (1993), with blocks as the units that are drawn.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Interval = tuple[float, float]


def first_column(means: np.ndarray) -> np.ndarray:
    """Return the first of the means, shape (draws, m) → (draws,): the score that is a mean itself."""
    return means[:, 0]


class BlockBootstrap:
    """Draws of blocks with replacement, the same for every score of one set.

    Args:
        blocks: which block each entry belongs to, shape (n,).
        level: of the intervals.
        draws: how often as many blocks as there are are drawn.
        seed: of the draws.
    """

    def __init__(self, blocks: np.ndarray, *, level: float = 0.95, draws: int = 1000, seed: int = 0) -> None:
        names, self.index = np.unique(blocks, return_inverse=True)
        self.n_blocks = len(names)
        generator = np.random.default_rng(seed)
        chosen = generator.multinomial(self.n_blocks, np.full(self.n_blocks, 1 / self.n_blocks), size=draws)
        self.times = chosen.astype(float)
        self.tail = 50 * (1 - level)

    def interval(
        self,
        values: np.ndarray,
        score: Callable[[np.ndarray], np.ndarray] = first_column,
        used: np.ndarray | None = None,
    ) -> Interval:
        """Return the percentile interval of a score that is a function of means over the entries.

        Args:
            values: what is averaged, shape (n,) or (n, m).
            score: from means (draws, m) to scores (draws,); by default the first mean.
            used: mask of the entries that count, shape (n,).
        """
        values = np.asarray(values, float).reshape(len(self.index), -1)
        weights = np.ones(len(values)) if used is None else np.asarray(used, float)
        totals = np.stack([np.bincount(self.index, column * weights, self.n_blocks) for column in values.T], axis=1)
        return self.of_totals(totals, np.bincount(self.index, weights, self.n_blocks), score)

    def of_bins(
        self, values: np.ndarray, bins: np.ndarray, n_bins: int, score: Callable[[np.ndarray], np.ndarray]
    ) -> Interval:
        """Return the interval of a score of sums over bins, divided by the number of entries.

        Args:
            values: shape (n,) or (n, m).
            bins: the bin of each entry, shape (n,).
            n_bins: number of bins.
            score: from (draws, m·n_bins), bins of one column together, to (draws,).
        """
        values = np.asarray(values, float).reshape(len(self.index), -1)
        place, size = self.index * n_bins + bins, self.n_blocks * n_bins
        totals = [np.bincount(place, column, size).reshape(self.n_blocks, n_bins) for column in values.T]
        return self.of_totals(np.concatenate(totals, axis=1), np.bincount(self.index, minlength=self.n_blocks), score)

    def of_totals(self, totals: np.ndarray, counts: np.ndarray, score: Callable[[np.ndarray], np.ndarray]) -> Interval:
        """Return the interval from each block's totals (n_blocks, m) and number of entries (n_blocks,)."""
        number = self.times @ counts
        with np.errstate(divide="ignore", invalid="ignore"):  # a draw that misses a class has no score: nan
            scores = score((self.times @ totals)[number > 0] / number[number > 0, None])
        scores = scores[np.isfinite(scores)]
        if not scores.size:
            return float("nan"), float("nan")
        low, high = np.percentile(scores, [self.tail, 100 - self.tail])
        return float(low), float(high)
