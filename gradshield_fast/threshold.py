"""Scores to a cut-off: GradShield's adaptive threshold."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gradshield_fast.bulk import bulk, outside
from gradshield_fast.errors import InputError
from gradshield_fast.histogram import Histogram
from gradshield_fast.mixture import Groups, Mixture, fit_mixture

MIN_SCORES = 10  # with fewer scores a mixture fits noise
OVERLAP = 0.05  # expected share of one component's scores that get the other one's label, from which on we warn
TAILS = 0.2  # share of the wide component's scores on its smaller side, above which its two sides are called tails
RULES = ("paper", "separated", "outliers")
# Distance of two means, over the root mean square of their deviations, above which the rule "separated" takes two
# Gaussians for two groups (Ashman's D). Scores of one task's clean rows are skewed and have heavy tails, which two
# Gaussians fit better by far more than 1.5 ln(n); benchmarks/replication/thresholds.py compares.
SEPARATION = 4.0
_MAX = float(np.finfo(np.float64).max)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Cut:
    """A cut-off and how it came about. Rows with a score above `value` are removed; equal to it is kept.

    Attributes:
        value: the cut-off, finite, in the unit of the scores.
        kind: which branch of the rule chose it.
        log_likelihoods: (L1, L2), in nats, of one Gaussian and of the mixture; nan where not fitted.
        components: the Gaussians behind `value` as {"weight", "mean", "std"}, by ascending mean.
        warnings: sentences for a person, empty when nothing is unusual.
        n: number of scores.
        alpha: the L2 - L1 that the mixture had to exceed, in nats.
        rule: the rule's name.
    """

    value: float
    kind: Literal["two_gaussians", "one_gaussian", "bulk"]
    log_likelihoods: tuple[float, float]
    components: tuple[dict[str, float], ...]
    warnings: tuple[str, ...]
    n: int
    alpha: float
    rule: str = "paper"

    def removes(self, scores: ArrayLike) -> NDArray[np.bool_]:
        """Which scores the cut removes.

        Args:
            scores: real numbers, any shape.

        Returns:
            Bool array shaped like `scores`, True where score > value.

        Raises:
            InputError: a score is NaN or infinite. NaN > value would be False, and a broken row would pass as safe.
        """
        values = np.asarray(scores)
        _checked(values.reshape(-1), "Cut.removes")
        return values.astype(np.float64) > self.value

    def to_dict(self) -> dict[str, Any]:
        """The cut as plain JSON values; a log-likelihood that was not fitted is None."""
        return {
            "value": self.value,
            "kind": self.kind,
            "log_likelihoods": [x if math.isfinite(x) else None for x in self.log_likelihoods],
            "components": [dict(c) for c in self.components],
            "warnings": list(self.warnings),
            "n": self.n,
            "alpha": self.alpha,
            "rule": self.rule,
        }


def fit_threshold(scores: ArrayLike, alpha: float | None = None, random_state: int = 0, *, rule: str = "paper") -> Cut:
    """Choose the score above which rows are removed.

        L1 = max over one Gaussian,  L2 = max over w0 N(m0, s0^2) + w1 N(m1, s1^2)      of sum_i ln p(score_i), nats
        L2 - L1 > alpha:  label(i) = argmax_k posterior_k(score_i);  t = min(max{score: label 0}, max{score: label 1})
        otherwise:        t = mu + 2 sigma                                               (sigma with 1/n)
        remove rows with score > t

    This is the paper's rule; three things about it are worth knowing, and each is reported in `Cut.warnings` when met:

    - It never asks which component is the larger. If the upper one is, most rows are removed.
    - Components of different width share out the line in three pieces, not two: the wider one wins in both far tails.
      Where that is the upper component, its rows in the far *lower* tail stay below t and are kept. Where it is the
      lower one and a score lies in its upper tail, t jumps to the top of the *upper* component, and that is kept.
    - One Gaussian always loses its upper 2.3 %, harmful or not; five scores or fewer never lose any.

    The rule "separated" takes the mixture only if its groups are apart as well and the upper one is not the larger, and
    else does not presume that 2.3 % of the rows are harmful:

        L2 - L1 > alpha, w1 <= 1/2 and sqrt(2) (m1 - m0) / sqrt(s0^2 + s1^2) > 4:  t as above
        otherwise:  t = the highest score that does not stick out of the bulk, a normal distribution with the scores'
                    median and median absolute deviation, at a false share of 5 % (`gradshield_fast.bulk.outside`)

    The rule "outliers" is for scores whose bulk is known to be standard normal, as `gradshield_fast.distance` makes
    them: it removes what sticks out of that, at the same false share, and fits nothing.

    The likelihood of a mixture is unbounded, so both standard deviations are kept above 0.05 of the scores' own (see
    `mixture.MIN_STD`). The result does not depend on the order of the scores, and for c > 0 scores c x + d give the cut
    c t + d up to rounding.

    Args:
        scores: real numbers, [n], FIHS of the rows that could be scored.
        alpha: by how many nats the mixture must be better. The paper's value is not known to us; the default
            1.5 ln(n) prices the mixture's three extra parameters as the Bayesian information criterion does.
        random_state: seed of the fit's random starts.
        rule: "paper", "separated" or "outliers".

    Returns:
        The cut.

    Raises:
        InputError: no scores, not a list of real numbers, NaN or infinite (positions named), alpha is not finite, or
            there is no such rule.

    Source: arXiv 2605.14194, the adaptive-threshold algorithm.
    """
    raw = np.asarray(scores)
    x = np.sort(_checked(raw, "fit_threshold"))
    resolution = float(np.finfo(raw.dtype if raw.dtype.kind == "f" else np.float64).eps)
    return _fit(Groups.of(x), x, resolution, alpha, random_state, rule)


def fit_threshold_of(
    histogram: Histogram, alpha: float | None = None, random_state: int = 0, *, rule: str = "paper"
) -> Cut:
    """Choose the cut for more scores than are to be held in memory; the rule is `fit_threshold`'s.

    The mixture is fitted to the bins' counts, means and deviations, and a score's label is that of the highest score
    of its bin, so the cut is one of the scores or lies within a bin's width, `histogram.STEP` of the range at the most,
    of where all scores would put it.

    Args:
        histogram: of the scores, float32 or wider.
        alpha: as for `fit_threshold`.
        random_state: as for `fit_threshold`.
        rule: as for `fit_threshold`.

    Returns:
        The cut.

    Raises:
        InputError: alpha is not finite, there is no such rule, or there are no scores.
    """
    groups, high = histogram.groups()
    _checked(high, "fit_threshold_of")
    return _fit(groups, high, float(np.finfo(np.float32).eps), alpha, random_state, rule)


def _fit(groups: Groups, x: Floats, resolution: float, alpha: float | None, random_state: int, rule: str) -> Cut:
    """Apply the rule to scores in sorted groups whose highest scores are `x`; `resolution` is that of the scores."""
    if alpha is not None and not math.isfinite(alpha):
        raise InputError(
            f"fit_threshold: alpha must be a finite number of nats, got {alpha}. The default is 1.5 ln(n)."
        )
    if rule not in RULES:
        raise InputError(f"fit_threshold: rule must be one of {', '.join(RULES)}; got {rule!r}")
    count = groups.count
    n = int(count.sum())
    price = float(1.5 * math.log(n) if alpha is None else alpha)

    # Scaling by a power of two is exact and keeps squares of huge and of tiny scores in range.
    exponent = math.frexp(max(abs(float(x[-1])), abs(float(groups.mean[0]))))[1]
    u, spread = np.ldexp(groups.mean, -exponent), np.ldexp(groups.spread, -2 * exponent)
    mean = float((count * u).sum()) / n
    std = math.sqrt(float((count * ((u - mean) ** 2 + spread)).sum()) / n)
    if np.ldexp(x[-1], -exponent) - u[0] <= 4 * resolution:  # |u| < 1, so this is the rounding of the scores themselves
        only = {"weight": 1.0, "mean": float(x[x.size // 2]), "std": 0.0}
        warning = f"all {n} scores are equal to {x[-1]:.6g}: nothing is removed"
        return Cut(float(x[-1]), "one_gaussian", (math.nan, math.nan), (only,), (warning,), n, price, rule)

    def back(value: float) -> float:
        with np.errstate(over="ignore"):
            return float(np.clip(np.ldexp(value, exponent), -_MAX, _MAX))

    unit = n * (math.log(std) + exponent * math.log(2.0))  # ln p(score) = ln p(z) - unit / n
    one = -0.5 * n * (1.0 + math.log(2.0 * math.pi)) - unit
    if rule == "outliers":
        value = float(x[max(outside(x, count, 0.0, 1.0) - 1, 0)])
        standard = {"weight": 1.0, "mean": 0.0, "std": 1.0}
        return Cut(value, "bulk", (one, math.nan), (standard,), (), n, price, rule)
    z = (np.ldexp(x, -exponent) - mean) / std
    notes: list[str] = []
    two = math.nan
    if n < MIN_SCORES:
        notes.append(f"only {n} scores: too few for two components, so the cut is taken from one")
    else:
        mixture = fit_mixture(Groups(count, (u - mean) / std, spread / std**2), seed=random_state)
        two = mixture.log_likelihood - unit
        odds = mixture.log_odds(z)
        upper = odds > 0
        apart = math.sqrt(2.0) * float(np.diff(mixture.means)[0]) / math.hypot(*mixture.stds)
        found = two - one > price and upper.any() and not upper.all()
        if found and (rule == "paper" or (apart > SEPARATION and mixture.weights[1] <= 0.5)):
            value = float(min(x[upper].max(), x[~upper].max()))
            parts = tuple(
                {"weight": float(w), "mean": back(mean + std * m), "std": back(std * s)}
                for w, m, s in zip(mixture.weights, mixture.means, mixture.stds, strict=True)
            )
            notes += _mixture_warnings(mixture, odds, x, count, value)
            notes += _below_zero(x, count, value)
            return Cut(value, "two_gaussians", (one, two), parts, tuple(notes), n, price, rule)
        if rule == "paper" and two - one > price:
            notes.append("two Gaussians fit better, but one of them wins no score: the cut is taken from one Gaussian")
    if rule == "separated":
        middle, width = bulk(z, count)
        first = outside(z, count, middle, width or 1.0)
        value = float(x[max(first - 1, 0)])
        notes += _below_zero(x, count, value)
        only = {"weight": 1.0, "mean": back(mean + std * middle), "std": back(std * width)}
        return Cut(value, "bulk", (one, two), (only,), tuple(notes), n, price, rule)
    value = back(mean + 2.0 * std)
    removed = int(count[x > value].sum())
    if removed and n >= MIN_SCORES:
        notes.append(
            f"no second group of scores: mean + 2 standard deviations removes {removed} of {n} rows, and would remove "
            "about 2.3 % of a harmless corpus too"
        )
    notes += _below_zero(x, count, value)
    only = {"weight": 1.0, "mean": back(mean), "std": back(std)}
    return Cut(value, "one_gaussian", (one, two), (only,), tuple(notes), n, price, rule)


def _checked(raw: NDArray[Any], who: str) -> Floats:
    """`raw` as a float64 vector without NaN and infinities, else an InputError that begins with `who`."""
    if raw.ndim != 1 or (raw.size and raw.dtype.kind not in "fiu"):
        raise InputError(f"{who}: scores must be a list of real numbers, got {raw.dtype} of shape {raw.shape}.")
    if raw.size == 0:
        raise InputError(f"{who}: there are no scores. Could no row of the corpus be scored?")
    values = raw.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        named = ", ".join(f"{i} ({values[i]})" for i in bad[:5].tolist())
        raise InputError(
            f"{who}: scores must be finite: got {bad.size} that are not, at position {named}"
            f"{', ...' if bad.size > 5 else ''}. Leave out rows that could not be scored."
        )
    return values


def _mixture_warnings(mixture: Mixture, odds: Floats, x: Floats, count: Floats, value: float) -> list[str]:
    """What a person should know before trusting the cut of a mixture; all arrays are sorted by score."""
    upper, notes = odds > 0, []
    removed, n = int(count[x > value].sum()), int(count.sum())
    for side, members in (("lower", int(count[~upper].sum())), ("upper", int(count[upper].sum()))):
        if members < 3:
            notes.append(f"the {side} component holds {members} of {n} scores: outliers, not a group, decide the cut")

    def leading(found: NDArray[np.bool_]) -> int:
        return int(count[: int(np.argmax(found))].sum())

    def trailing(found: NDArray[np.bool_]) -> int:
        return int(count[count.size - int(np.argmax(found[::-1])) :].sum())

    low_end = leading(~upper)  # the lowest scores that have the upper label
    high_end = trailing(upper)  # the highest scores that have the lower label
    wide_is_upper = bool(mixture.stds[1] > mixture.stds[0])
    below = low_end if wide_is_upper else leading(upper)
    above = trailing(~upper) if wide_is_upper else high_end
    if min(below, above) > TAILS * (below + above):
        notes.append(
            f"the wide component has {below} scores below the narrow one and {above} above it, which looks like one "
            f"group with heavy tails and not like two groups: the cut takes the upper tail, {removed} of {n} rows"
        )
        return notes
    if mixture.weights[0] < mixture.weights[1]:
        notes.append(
            f"the lower component is the smaller one (weight {mixture.weights[0]:.2f}): {removed} of {n} rows go"
        )
    lost = 1.0 / (1.0 + np.exp(np.minimum(np.abs(odds), 700.0)))  # posterior of the component that lost
    lost *= count
    error = max(float(lost[side].sum() / count[side].sum()) for side in (upper, ~upper))
    if error > OVERLAP:
        notes.append(f"the two components overlap: about {error:.0%} of the rows on one side belong to the other")
    if low_end:
        notes.append(f"the {low_end} lowest scores fit the wide upper component better; they are kept all the same")
    if high_end:
        kept = int(count[upper & (x <= value)].sum())
        notes.append(
            f"the {high_end} highest scores fit the wide lower component better, which puts the cut on top of the "
            f"upper one: {kept} rows labelled with that are kept. Look at the scores, or set the threshold by hand"
        )
    return notes


def _below_zero(x: Floats, count: Floats, value: float) -> list[str]:
    """A warning when rows are removed that a first-order step calls harmless."""
    harmless = int(count[(x > value) & (x < 0)].sum())
    if not harmless:
        return []
    return [
        f"the cut is below zero: {harmless} of the removed rows have a negative score, so a step on them raises safety"
    ]
