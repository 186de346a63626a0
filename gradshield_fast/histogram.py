"""A histogram of more scores than are to be held in memory, fine enough for a threshold.

Bins are a `STEP` of the range wide at the most, and end at every value whose float32 has its last 16 bits clear as
well: so they are 1/128 of a value wide at the most, and one far outlier does not put all other scores into one bin.
A bin keeps the count, the mean, the mean square deviation and the highest of its scores.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gradshield_fast.errors import InputError
from gradshield_fast.mixture import Groups

STEP = 2.0**-17
"""Widest bin, as a share of the range of the scores."""

_HELD = 1 << 18

Floats = NDArray[np.float64]


class Histogram:
    """Counts float32 scores of a known range; the same scores in the same order give the same bits."""

    def __init__(self, low: float, high: float) -> None:
        """Lay out the bins.

        Args:
            low: the least score that will come.
            high: the greatest.

        Raises:
            InputError: one is not finite, or they are in the wrong order.
        """
        if not (np.isfinite([low, high]).all() and low <= high):
            raise InputError(f"a histogram needs a finite range: got {low} to {high}")
        halves = np.arange(1 << 16, dtype=np.uint32) << 16
        rounded = halves.view(np.float32)
        rounded = rounded[np.isfinite(rounded)].astype(np.float64)
        steps = np.linspace(low, high, int(1 / STEP) + 1)
        edges = np.unique(np.concatenate([steps, rounded[(rounded > low) & (rounded < high)]]))
        self._edges = edges
        self._count = np.zeros(edges.size, dtype=np.int64)
        self._away = np.zeros(edges.size)  # sum of distances from the bin's lower edge
        self._square = np.zeros(edges.size)  # sum of their squares
        self._high = np.full(edges.size, -np.inf)
        self._held: list[Floats] = []
        self._waiting = 0

    def add(self, scores: NDArray[np.float32]) -> None:
        """Count scores.

        Args:
            scores: float32 [n], inside the range.
        """
        self._held.append(scores.astype(np.float64))
        self._waiting += scores.size
        if self._waiting >= _HELD:
            self._flush()

    def groups(self) -> tuple[Groups, Floats]:
        """Summarise what was counted.

        Returns:
            The bins that hold scores, and the highest score of each.
        """
        self._flush()
        at = np.flatnonzero(self._count)
        count = self._count[at].astype(np.float64)
        away = self._away[at] / count
        spread = np.maximum(self._square[at] / count - away**2, 0.0)
        return Groups(count, self._edges[at] + away, spread), self._high[at]

    def _flush(self) -> None:
        if not self._waiting:
            return
        values = np.sort(np.concatenate(self._held))
        self._held, self._waiting = [], 0
        bins = np.searchsorted(self._edges, values, side="right") - 1
        first = np.flatnonzero(np.diff(bins, prepend=-1))
        at, last = bins[first], np.append(first[1:], values.size)
        away = values - self._edges[bins]
        self._count[at] += last - first
        self._away[at] += np.add.reduceat(away, first)
        self._square[at] += np.add.reduceat(away**2, first)
        self._high[at] = np.maximum(self._high[at], values[last - 1])
