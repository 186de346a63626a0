"""Several scores of a row in one: how unlike the bulk of the corpus the row is, in all of them together."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradshield_fast.errors import InputError

ROWS_PER_SCORE = 10
"""With fewer rows than this for each score there is no bulk to speak of."""

_SAME = 1e-10  # least eigenvalue of the scores' correlations, below which some of them say the same

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Distance:
    """The bulk of a corpus in the space of its scores, and the distance from it.

        y = W^T (x - m),  d^2 = y^T y = (x - m)^T C^-1 (x - m)
        score = ((d^2 / K)^(1/3) - (1 - v)) / v^(1/2),  v = 2 / (9 K)                                 K scores of a row

    m and C are the mean and covariance of the bulk, by the minimum covariance determinant: of all halves of the rows it
    takes the one that lies closest together, and then all rows that go with it. So rows that are planted do not shape
    the bulk, as long as they are fewer than half. If the bulk is normal, d^2 has a chi-square distribution with K
    degrees of freedom, and the score, by the cube root of Wilson and Hilferty, nearly a standard normal one: that is
    what the rule "outliers" of `fit_threshold` presumes.

    A score with a sign finds rows that push the model one way. Training on a disguised row may move refusals either
    way, so that its scores lie inside those of clean rows one by one, but it moves them together as no row of the task
    does. The price is that a distance has no sign: any row that is unlike the rest is far away, harmful or not. Linear
    combinations of the scores in their place give the same distance.

    Attributes:
        centre: float64 [scores], m.
        whiten: float64 [scores, scores], lower triangular, W W^T = C^-1.
        rows: on how many rows it was fitted.

    Source: Rousseeuw and Van Driessen 1999 (the estimator, scikit-learn's `MinCovDet`); Wilson and Hilferty 1931 (the
    cube root).
    """

    centre: Floats
    whiten: Floats
    rows: int

    @classmethod
    def fit(cls, scores: NDArray[np.floating[Any]], random_state: int = 0) -> Distance:
        """Find the bulk.

        Args:
            scores: real numbers [rows, scores], two scores or more, finite.
            random_state: seed of the halves to begin with.

        Returns:
            The distance from it.

        Raises:
            InputError: there are too few rows or scores, one is not finite, most rows are equal in a score, or scores
                say the same.
        """
        from sklearn.covariance import MinCovDet

        x = np.asarray(scores, dtype=np.float64)
        rows, count = x.shape
        if count < 2:
            raise InputError(f"a distance needs two scores of each row or more: got {count}")
        if rows < ROWS_PER_SCORE * count:
            raise InputError(f"a distance over {count} scores needs {ROWS_PER_SCORE * count} rows or more: got {rows}")
        if not np.isfinite(x).all():
            raise InputError("a distance needs finite scores; leave out rows that could not be scored")
        middle = np.median(x, axis=0)
        unit = np.median(np.abs(x - middle), axis=0)
        if not unit.all():
            raise InputError(f"half of the rows or more are equal in score {int(np.argmin(unit))}: they have no bulk")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of scores that follow from each other, which the next check names
            fit = MinCovDet(random_state=random_state).fit((x - middle) / unit)
        spread = np.sqrt(np.diag(fit.covariance_))
        if not spread.all() or np.linalg.eigvalsh(fit.covariance_ / np.outer(spread, spread))[0] < _SAME:
            raise InputError("some of the scores follow from the others, in half of the rows at least: leave them out")
        whiten = np.linalg.cholesky(np.linalg.inv(fit.covariance_)) / unit[:, None]
        return cls(middle + unit * fit.location_, whiten, rows)

    def of(self, scores: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Measure rows.

        A row's result depends on nothing but its own scores, to the last bit: columns are added one by one.

        Args:
            scores: real numbers [rows, scores]; NaN where there is none.

        Returns:
            float32 [rows], about N(0, 1) in the bulk; NaN for a row that lacks a score.
        """
        away = np.asarray(scores, dtype=np.float64) - self.centre
        square = np.zeros(len(away))
        for k in range(self.centre.size):
            y = np.zeros(len(away))
            for j in range(k, self.centre.size):
                y += self.whiten[j, k] * away[:, j]
            square += y * y
        v = 2.0 / (9.0 * self.centre.size)
        return ((np.cbrt(square / self.centre.size) - (1.0 - v)) / np.sqrt(v)).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """The bulk as plain JSON values."""
        return {"centre": self.centre.tolist(), "whiten": self.whiten.tolist(), "rows": self.rows}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Distance:
        """Take up what `to_dict` gave.

        Args:
            value: the mapping.

        Returns:
            The same distance.
        """
        return cls(np.array(value["centre"]), np.array(value["whiten"]), value["rows"])
