"""One group of scores and what sticks out of it: a cut for corpora in which two groups cannot be told apart."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FALSE_SHARE = 0.05
"""Share of the removed rows that may belong to the bulk."""

_NORMAL = 1.4826022185056018  # standard deviation of a normal distribution in units of its median absolute deviation


def weighted_median(values: Floats, count: Floats) -> float:
    """Find the middle of values that come several times each.

    Args:
        values: float64 [n], any order.
        count: float64 [n], how often each comes.

    Returns:
        The median; between two values their mean.
    """
    order = np.argsort(values, kind="stable")
    below = np.cumsum(count[order])
    half = below[-1] / 2
    first = int(np.searchsorted(below, half))
    last = first + 1 if below[first] == half else first
    return float((values[order[first]] + values[order[last]]) / 2)


def bulk(values: Floats, count: Floats) -> tuple[float, float]:
    """Locate the group that most scores belong to, whatever the others are.

    Args:
        values: float64 [n].
        count: float64 [n], how often each comes.

    Returns:
        Median, and the median distance from it in units of a normal distribution's deviation; 0.0 where more than half
        of the scores are equal.
    """
    middle = weighted_median(values, count)
    return middle, _NORMAL * weighted_median(np.abs(values - middle), count)


def outside(values: Floats, count: Floats, middle: float, width: float, share: float = FALSE_SHARE) -> int:
    """Count off the highest scores that stick out of a normal bulk, after Benjamini and Hochberg.

        p(s) = P(N(middle, width^2) > s);  remove all scores >= the smallest s with p(s) <= share * #{scores >= s} / n

    If the bulk is normal, at most `share` of the removed rows belong to it in the mean, however many stick out; of a
    corpus in which none do, a row is removed with probability `share`.

    Args:
        values: float64 [n], ascending.
        count: float64 [n], how often each comes.
        middle: of the bulk.
        width: its standard deviation, above 0.
        share: of false removals.

    Returns:
        Position of the first value that is removed; n if none is.

    Source: Benjamini and Hochberg 1995, the step-up procedure.
    """
    above = np.cumsum(count[::-1])[::-1]
    first = int(np.searchsorted(values, middle, side="right"))
    z = (values[first:] - middle) / (width * math.sqrt(2.0))
    p = np.fromiter((0.5 * math.erfc(x) for x in z), dtype=np.float64, count=z.size)
    out = np.flatnonzero(p <= share * above[first:] / above[0])
    return first + int(out[0]) if out.size else values.size
