"""The score that decides: one direction's, or all directions' together, worked out from the recorded ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradshield_fast.distance import Distance
from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.options import CutOptions
from gradshield_fast.pipeline.parts import read_columns

FIT_ROWS = 20_000
"""Rows that the bulk of a larger corpus is fitted on, drawn by the seed."""


def check_combination(options: CutOptions, count: int, normalize: str) -> None:
    """Check that there is a score to decide by.

    Args:
        options: how to choose.
        count: scores of each row.
        normalize: what the scores are divided by, as in `ScoringOptions`.

    Raises:
        InputError: there is no such direction, nothing to combine, or not what can be combined.
    """
    if options.direction >= count:
        raise InputError(f"--direction-index {options.direction}: the rows have {count} score(s), counted from 0")
    if options.combine is None:
        return
    if count < 2:
        raise InputError(
            f"--combine {options.combine} needs several scores of each row, and these have one: build the directions "
            "with --score refusal_margin,compliance_logprob,identity_margin, or give several with --direction"
        )
    if normalize != "cosine":
        raise InputError(
            f"--combine {options.combine} needs --normalize cosine: dot products are far from the bulk where the "
            "gradient is large, whatever its direction"
        )


def fit_distance(parts: Sequence[Path], count: int, seed: int) -> Distance | None:
    """Find the bulk of a corpus, reading one part at a time.

    Rows that repeat another one are left out, so that many copies of a row are no bulk.

    Args:
        parts: the scores of all rows, in the rows' order.
        count: scores of each row.
        seed: draws the rows of a corpus with more than `FIT_ROWS`, and the fit's first halves.

    Returns:
        The distance from it, None if no row has scores; 8 bytes a score of `FIT_ROWS` rows are held at the most.
    """
    own = [int(_own(path, 1).shape[0]) for path in parts]
    total = sum(own)
    if total == 0:
        return None
    drawn = np.arange(total)
    if total > FIT_ROWS:
        drawn = np.sort(np.random.default_rng(seed).choice(total, FIT_ROWS, replace=False))
    held, first = [], 0
    for path, rows in zip(parts, own, strict=True):
        here = drawn[np.searchsorted(drawn, first) : np.searchsorted(drawn, first + rows)] - first
        first += rows
        if here.size:
            held.append(_own(path, count)[here].astype(np.float64))
    return Distance.fit(np.concatenate(held), seed)


def _own(path: Path, count: int) -> np.ndarray:
    fihs, same_as = read_columns(path, count)
    return fihs[(same_as < 0) & ~np.isnan(fihs).any(axis=1)]


def deciding(fihs: np.ndarray, cut: Mapping[str, Any], direction: int) -> np.ndarray:
    """Work out the score that decides.

    Args:
        fihs: float32 [rows, directions], NaN where there is none.
        cut: the content of threshold.json, or what of it is known so far.
        direction: which direction's score decides, where they are not combined.

    Returns:
        float32 [rows], NaN where there is none.
    """
    if "distance" in cut:
        return Distance.from_dict(cut["distance"]).of(fihs)
    return fihs[:, direction]
