"""The threshold of more scores than are held: the histogram's cut beside that of all scores."""

from __future__ import annotations

import numpy as np
import pytest

from gradshield_fast.errors import InputError
from gradshield_fast.histogram import STEP, Histogram
from gradshield_fast.threshold import fit_threshold, fit_threshold_of


def counted(scores: np.ndarray, chunk: int = 1000) -> Histogram:
    out = Histogram(float(scores.min()), float(scores.max()))
    for first in range(0, scores.size, chunk):
        out.add(scores[first : first + chunk])
    return out


def normal(seed: int, *parts: tuple[int, float, float]) -> np.ndarray:
    rng = np.random.default_rng(seed)
    scores = np.concatenate([rng.normal(mean, std, count) for count, mean, std in parts]).astype(np.float32)
    rng.shuffle(scores)
    return scores


CORPORA = {
    "two groups": normal(0, (180_000, -1, 1), (20_000, 6, 1)),
    "one group": normal(1, (150_000, -0.2, 0.7)),
    "overlapping": normal(2, (100_000, 0, 1), (50_000, 2, 1.5)),
    "one far outlier": np.append(normal(3, (90_000, 0, 1), (9_000, 8, 1)), np.float32(3e5)),
    "heavy tails": np.random.default_rng(4).standard_t(2, 100_000).astype(np.float32),
    "far from zero": (5 + 1e-3 * normal(5, (90_000, 0, 1), (9_000, 9, 1))).astype(np.float32),
    "cosines": np.tanh(normal(6, (95_000, -0.05, 0.05), (5_000, 0.6, 0.1))),
    "tiny": (1e-30 * normal(7, (90_000, 0, 1), (9_000, 8, 1))).astype(np.float32),
    "few values": np.random.default_rng(8).integers(0, 5, 60_000).astype(np.float32),
    "one value": np.full(5_000, 0.25, dtype=np.float32),
}


@pytest.mark.parametrize("name", CORPORA)
def test_the_cut_agrees_with_that_of_all_scores(name: str) -> None:
    scores = CORPORA[name]
    exact, binned = fit_threshold(scores), fit_threshold_of(counted(scores))
    extent = float(scores.max()) - float(scores.min())
    assert (binned.kind, binned.n) == (exact.kind, exact.n)
    assert abs(binned.value - exact.value) <= 1e-3 * extent
    moved = int(((scores > binned.value) != (scores > exact.value)).sum())
    assert moved <= 1e-3 * scores.size
    assert len(binned.warnings) == len(exact.warnings)
    assert binned.log_likelihoods == pytest.approx(exact.log_likelihoods, rel=1e-4, abs=1.0, nan_ok=True)


def test_bins_hold_every_score_once_and_are_narrow() -> None:
    scores = CORPORA["one far outlier"]
    groups, high = counted(scores).groups()
    assert groups.count.sum() == scores.size
    assert high[-1] == scores.max()
    assert (np.diff(groups.mean) > 0).all()
    assert (np.diff(high) > 0).all()
    width = np.sqrt(groups.spread.max())
    assert width <= STEP * float(np.ptp(scores))
    assert float((groups.count * groups.mean).sum()) == pytest.approx(float(scores.sum(dtype=np.float64)), rel=1e-9)


def test_chunks_do_not_matter_and_the_same_scores_give_the_same_bits() -> None:
    scores = CORPORA["two groups"]
    one, other = (fit_threshold_of(counted(scores, chunk)) for chunk in (7_000, 7_000))
    assert repr(one) == repr(other)
    assert fit_threshold_of(counted(scores, 911)).value == pytest.approx(one.value, rel=1e-6)


@pytest.mark.parametrize(("low", "high"), [(1.0, 0.0), (0.0, np.inf), (np.nan, 1.0)])
def test_a_range_that_is_none_is_refused(low: float, high: float) -> None:
    with pytest.raises(InputError, match="finite range"):
        Histogram(low, high)


def test_no_scores_are_refused() -> None:
    with pytest.raises(InputError, match="no scores"):
        fit_threshold_of(Histogram(0.0, 1.0))
