"""Several scores in one: against scikit-learn's own distance, with planted rows, and to the last bit."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import chi2, norm
from sklearn.covariance import MinCovDet

from gradshield_fast import fit_threshold
from gradshield_fast.distance import Distance
from gradshield_fast.errors import InputError
from gradshield_fast.histogram import Histogram
from gradshield_fast.threshold import fit_threshold_of

MIX = np.array([[1.0, 0.9, 0.2], [0.0, 0.4, -0.3], [0.0, 0.0, 0.8]]) * 1e-3


def bulk(rows: int, seed: int = 0) -> np.ndarray:
    """Correlated scores of the size of cosines."""
    return np.random.default_rng(seed).normal(size=(rows, 3)) @ MIX + [0.02, -0.01, 0.0]


def planted(rows: int, seed: int = 1) -> np.ndarray:
    """Rows whose scores are common one by one but not together."""
    return bulk(rows, seed) * 0.5 + np.array([0.01 - 1.2e-3, -0.005 + 1.2e-3, 1e-3])


def test_it_is_the_estimators_distance_on_the_scale_of_a_normal() -> None:
    x = bulk(200)
    got = Distance.fit(x).of(x)
    square = MinCovDet(random_state=0).fit(x).mahalanobis(x)
    np.testing.assert_allclose(((1 - 2 / 27) + got * np.sqrt(2 / 27)) ** 3 * 3, square, rtol=1e-4)
    # the cube root of a chi-square value is nearly normal, far into the tail
    np.testing.assert_allclose(norm.sf(got), chi2.sf(square, 3), rtol=0.15, atol=2e-3)


def test_scores_in_other_combinations_and_units_give_the_same() -> None:
    x = np.concatenate([bulk(180), planted(20)])
    other = x @ np.array([[3e4, -1.0, 0.0], [2.0, 5e3, 7.0], [0.0, 1.0, 1e5]]) + [5.0, 0.0, -1e3]
    np.testing.assert_allclose(Distance.fit(other).of(other), Distance.fit(x).of(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_planted_rows_stick_out_that_no_score_shows_alone(share: float) -> None:
    count = round(400 * share / (1 - share))
    x = np.concatenate([bulk(400), planted(count)])
    scores = Distance.fit(x).of(x)
    gone = fit_threshold(scores, rule="outliers").removes(scores)
    assert gone[400:].all()
    assert gone[:400].mean() < 0.03
    low, high = np.quantile(x[:400], [0.005, 0.995], axis=0)
    assert ((x[400:] > low) & (x[400:] < high)).mean() > 0.95


def test_many_planted_rows_do_not_shape_the_bulk() -> None:
    x = np.concatenate([bulk(400), bulk(170, 1) + np.array([0.01, 0.01, 0.0])])
    scores = Distance.fit(x).of(x)
    gone = fit_threshold(scores, rule="outliers").removes(scores)
    assert gone[400:].all()
    assert gone[:400].mean() < 0.05


def test_a_clean_corpus_keeps_nearly_all() -> None:
    lost = []
    for seed in range(10):
        scores = Distance.fit(bulk(300, seed)).of(bulk(300, seed))
        lost.append(fit_threshold(scores, rule="outliers").removes(scores).mean())
    assert np.mean(lost) < 0.01


def test_a_row_depends_on_itself_alone_and_the_bulk_survives_being_written_down() -> None:
    x = bulk(1001).astype(np.float32)
    distance = Distance.fit(x)
    want = distance.of(x)
    assert want.dtype == np.float32
    again = Distance.from_dict(json.loads(json.dumps(distance.to_dict())))
    for rows in (slice(None), slice(0, 1), slice(3, 20), slice(None, None, -7)):
        assert again.of(x[rows]).tobytes() == want[rows].tobytes()
    assert Distance.fit(x).to_dict() == distance.to_dict()


def test_a_row_without_a_score_has_no_distance() -> None:
    x = bulk(100)
    x[[3, 5], [0, 2]] = np.nan
    assert np.flatnonzero(np.isnan(Distance.fit(bulk(100)).of(x))).tolist() == [3, 5]


def test_more_scores_than_are_held_are_cut_alike() -> None:
    x = np.concatenate([bulk(900), planted(100)])
    scores = Distance.fit(x).of(x)
    exact = fit_threshold(scores, rule="outliers")
    assert exact.kind == "bulk"
    histogram = Histogram(float(scores.min()), float(scores.max()))
    histogram.add(scores)
    cut = fit_threshold_of(histogram, rule="outliers")
    assert (cut.removes(scores) == exact.removes(scores)).mean() > 0.998


@pytest.mark.parametrize(
    ("scores", "part"),
    [
        (lambda: bulk(29), "needs 30 rows or more: got 29"),
        (lambda: bulk(50)[:, :1], "two scores"),
        (lambda: np.where(np.arange(50)[:, None] == 7, np.inf, bulk(50)), "finite"),
        (lambda: np.where(np.arange(50)[:, None] < 30, [1.0, 0.0, 0.0], bulk(50)), "equal in score 0"),
        (lambda: bulk(50) @ [[1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 0.0]], "follow from the others"),
    ],
    ids=["rows", "one", "nan", "equal", "dependent"],
)
def test_what_has_no_bulk_is_refused(scores: Callable[[], np.ndarray], part: str) -> None:
    with pytest.raises(InputError, match=part):
        Distance.fit(scores())
