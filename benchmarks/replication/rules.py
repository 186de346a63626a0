"""Rules that draw the line: scores in, rows to remove out. thresholds.py compares them on resampled corpora.

paper           the product's: two Gaussians if they gain more than 1.5 ln n nats, else mean + 2 deviations
paper-A         the same with alpha = A nats
separated       the product's other rule: two Gaussians only if they are apart, else false-0.05
outliers        the product's rule for distances, whose bulk is standard normal: false-0.05 with that centre and width
keep            as paper, but nothing is removed where one Gaussian is chosen
between         two Gaussians by the same test, cut where the upper one becomes the likelier; else nothing
students        two Student t with 4 degrees of freedom by the same test, cut where the upper one becomes the likelier
otsu            the cut with the largest variance between the two sides
median-K        median + K median absolute deviations, in units of a normal deviation
left-K          mode + K times the deviation below the mode: only the side that harm does not reach counts
false-Q         Benjamini-Hochberg at a false share of Q, under a normal whose centre and width are median-K's
top             as many as were planted: for comparing scores, not a rule that anyone could use
nothing         no row
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
from scipy.stats import norm, t

from gradshield_fast import fit_threshold
from gradshield_fast.mixture import fit_mixture
from gradshield_fast.threshold import Cut

Rule = Callable[[np.ndarray, int, int], np.ndarray]
"""Scores float64 [rows], the number of planted rows (for `top` only) and a seed -> bool [rows], removed."""

FREEDOM = 4.0
MAD = 1.4826
"""Deviation of a normal distribution in units of its median absolute deviation."""


@functools.lru_cache(maxsize=4)
def _both(scores: bytes, seed: int) -> tuple[Cut, Cut]:
    """The cut if two Gaussians are chosen at any price, and that of one: several rules choose between the same two."""
    x = np.frombuffer(scores)
    return fit_threshold(x, alpha=-1e9, random_state=seed), fit_threshold(x, alpha=1e9, random_state=seed)


def adaptive(scores: np.ndarray, alpha: float, seed: int) -> Cut:
    """Fit the paper's threshold, sharing the fit between values of alpha.

    Args:
        scores: float64 [rows].
        alpha: nats that two Gaussians must gain.
        seed: of the fit.

    Returns:
        What `fit_threshold` gives.
    """
    two, one = _both(np.ascontiguousarray(scores, dtype=np.float64).tobytes(), seed)
    chosen = two.kind == "two_gaussians" and two.log_likelihoods[1] - two.log_likelihoods[0] > alpha
    return two if chosen else one


def _paper(alpha: float | None) -> Rule:
    def rule(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
        return adaptive(scores, 1.5 * math.log(len(scores)) if alpha is None else alpha, seed).removes(scores)

    return rule


def _keep(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    cut = adaptive(scores, 1.5 * math.log(len(scores)), seed)
    return cut.removes(scores) if cut.kind == "two_gaussians" else np.zeros(len(scores), dtype=bool)


def _product(name: str) -> Rule:
    return lambda scores, count, seed: fit_threshold(scores, random_state=seed, rule=name).removes(scores)


def _between(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    z = (scores - scores.mean()) / scores.std()
    mixture = fit_mixture(np.sort(z), seed=seed)
    one = float(norm.logpdf(z).sum())
    if mixture.log_likelihood - one <= 1.5 * math.log(len(z)):
        return np.zeros(len(z), dtype=bool)
    return (mixture.log_odds(z) > 0) & (z > mixture.means[0])


def _students(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    z = (scores - np.median(scores)) / scores.std()
    one, _, _ = fit_students(z, np.ones((len(z), 1)))
    best = (-math.inf, np.zeros((len(z), 2)), np.zeros((2, 2)))
    for share in (0.02, 0.1, 0.3, 0.5):
        upper = (z >= np.quantile(z, 1 - share)).astype(float)
        best = max(best, fit_students(z, np.stack([1 - upper, upper], 1)), key=lambda found: found[0])
    total, odds, places = best
    if total - one <= 1.5 * math.log(len(z)):
        return np.zeros(len(z), dtype=bool)
    low, high = np.argsort(places[:, 0])
    return (odds[:, high] > odds[:, low]) & (z > places[low, 0])


def fit_students(z: np.ndarray, shares: np.ndarray, steps: int = 60) -> tuple[float, np.ndarray, np.ndarray]:
    """Fit a mixture of Student t distributions by expectation-maximisation.

    Args:
        z: float64 [rows], of about unit deviation.
        shares: float64 [rows, components], to begin with.
        steps: how many.

    Returns:
        Log-likelihood in nats, log of weighted densities [rows, components], (centre, scale) of each component.
    """
    places = np.zeros((shares.shape[1], 2))
    for k in range(shares.shape[1]):
        places[k] = np.average(z, weights=shares[:, k]), max(float(z.std()) / 2, 0.05)
    parts, last = shares.mean(0), -math.inf
    logs = np.zeros_like(shares)
    for _ in range(steps):
        for k, (centre, scale) in enumerate(places):
            pull = shares[:, k] * (FREEDOM + 1) / (FREEDOM + ((z - centre) / scale) ** 2)
            centre = pull @ z / pull.sum()
            places[k] = centre, max(math.sqrt(pull @ (z - centre) ** 2 / shares[:, k].sum()), 0.05)
        for k, (centre, scale) in enumerate(places):
            logs[:, k] = math.log(parts[k]) + t.logpdf(z, FREEDOM, centre, scale)
        total = np.logaddexp.reduce(logs, axis=1)
        shares = np.exp(logs - total[:, None])
        parts = np.maximum(shares.mean(0), 1e-9)
        if total.sum() - last < 1e-2:
            break
        last = float(total.sum())
    return float(total.sum()), logs.copy(), places


def _otsu(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    x = np.sort(scores)
    n = np.arange(1, len(x))
    below = np.cumsum(x)[:-1]
    between = below**2 / n + (x.sum() - below) ** 2 / (len(x) - n)
    return scores > x[int(np.argmax(between))]


def centre_and_width(scores: np.ndarray) -> tuple[float, float]:
    """Locate the bulk.

    Args:
        scores: float64 [rows].

    Returns:
        Median, and the median absolute deviation in units of a normal deviation.
    """
    middle = float(np.median(scores))
    return middle, MAD * float(np.median(np.abs(scores - middle))) or 1.0


def _median(times: float) -> Rule:
    def rule(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
        middle, width = centre_and_width(scores)
        return scores > middle + times * width

    return rule


def half_sample_mode(scores: np.ndarray) -> float:
    """Locate the mode: the densest half, the densest half of that, and so on.

    Args:
        scores: float64 [rows].

    Returns:
        The mode.
    """
    x = np.sort(scores)
    while len(x) > 3:
        half = (len(x) + 1) // 2
        start = int(np.argmin(x[half - 1 :] - x[: len(x) - half + 1]))
        x = x[start : start + half]
    return float(np.median(x))


def _left(times: float) -> Rule:
    def rule(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
        mode = half_sample_mode(scores)
        below = scores[scores <= mode]
        return scores > mode + times * float(np.sqrt(np.mean((below - mode) ** 2)))

    return rule


def _false(share: float) -> Rule:
    def rule(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
        middle, width = centre_and_width(scores)
        p = norm.sf((scores - middle) / width)
        order = np.argsort(p)
        below = np.flatnonzero(p[order] <= share * np.arange(1, len(p) + 1) / len(p))
        return p <= p[order[below[-1]]] if len(below) else np.zeros(len(p), dtype=bool)

    return rule


def _top(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    """As many rows as were planted, the most suspicious first, ties by position."""
    removed = np.zeros(len(scores), dtype=bool)
    removed[np.argsort(-scores, kind="stable")[:count]] = True
    return removed


def _nothing(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    return np.zeros(len(scores), dtype=bool)


RULES: dict[str, Rule] = {
    "paper": _paper(None),
    **{f"paper-{alpha}": _paper(float(alpha)) for alpha in (0, 5, 20, 50, 100)},
    "separated": _product("separated"),
    "outliers": _product("outliers"),
    "keep": _keep,
    "between": _between,
    "students": _students,
    "otsu": _otsu,
    **{f"median-{times}": _median(times) for times in (3, 4, 5)},
    **{f"left-{times}": _left(times) for times in (2, 3, 4)},
    **{f"false-{share}": _false(share) for share in (0.05, 0.2)},
    "top": _top,
    "nothing": _nothing,
}
