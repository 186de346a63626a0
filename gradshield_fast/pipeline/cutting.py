"""Scores -> threshold -> kept, dropped and unscored rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gradshield_fast.filtering import Decision, split_corpus
from gradshield_fast.histogram import Histogram
from gradshield_fast.pipeline.combining import deciding, fit_distance
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.options import CorpusOptions, CutOptions
from gradshield_fast.pipeline.parts import Part, read_columns, read_part
from gradshield_fast.pipeline.progress import Reporter

EXACT_SCORES = 1_000_000
"""Up to as many scores are fitted one by one; of more, a histogram."""


def find_cut(parts: Sequence[Path], options: CutOptions) -> dict[str, Any]:
    """Choose the score above which rows are dropped, reading one part at a time.

    Args:
        parts: the scores of all rows, in the rows' order.
        options: how to choose.

    Returns:
        The content of threshold.json: `value` (None if no row has a score), `kind` ("two_gaussians", "one_gaussian",
        "bulk", "given" or "none"), what the fit found, the options, and `distance` if all directions decide together.
    """
    count = read_part(parts[0]).fihs.shape[1]
    cut: dict[str, Any] = {"column": options.column, "seed": options.seed}
    bulk = fit_distance(parts, count, options.seed) if options.combine is not None else None
    if bulk is not None:
        cut["distance"] = bulk.to_dict()

    def scores(path: Path) -> np.ndarray:
        values = deciding(read_columns(path, count)[0], cut, options.direction)
        return values[~np.isnan(values)]

    held: list[np.ndarray] = []
    n, low, high = 0, math.inf, -math.inf
    for values in map(scores, parts):
        if values.size:
            n, low, high = n + values.size, min(low, float(values.min())), max(high, float(values.max()))
            held = [*held, values] if n <= EXACT_SCORES else []
    if n == 0:
        return {**cut, "kind": "none", "value": None, "n": 0, "warnings": ["no row has a score"]}
    if options.value is not None:
        return {**cut, "kind": "given", "value": float(options.value), "n": n, "warnings": []}
    from gradshield_fast.threshold import fit_threshold, fit_threshold_of

    if n <= EXACT_SCORES:
        values = np.concatenate(held).astype(np.float64)
        found = fit_threshold(values, alpha=options.alpha, random_state=options.seed, rule=options.fitted_rule)
        return {**cut, **found.to_dict()}
    histogram = Histogram(low, high)
    for path in parts:
        histogram.add(scores(path))
    found = fit_threshold_of(histogram, alpha=options.alpha, random_state=options.seed, rule=options.fitted_rule)
    return {**cut, **found.to_dict()}


def is_dropped(part: Part, cut: Mapping[str, Any] | None, direction: int) -> np.ndarray:
    """Say which rows of a part lie above the threshold.

    Args:
        part: the scores.
        cut: from `find_cut`, or None.
        direction: which direction's score decides, where they are not combined.

    Returns:
        Bool [rows].
    """
    if cut is None or cut["value"] is None:
        return np.zeros(len(part.row), dtype=bool)
    return part.scored & (deciding(part.fihs, cut, direction).astype(np.float64) > cut["value"])


def split(
    folder: RunFolder,
    corpus: CorpusOptions,
    fingerprint: dict[str, Any],
    parts: Sequence[Path],
    cut: dict[str, Any],
    *,
    rows: int,
    direction: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Write the kept rows, dropped.jsonl and unscored.jsonl, holding one part at a time.

    Args:
        folder: where to.
        corpus: the rows' bytes.
        fingerprint: the corpus's, from when it was scored.
        parts: the scores of all its rows, in their order.
        cut: from `find_cut`.
        rows: how many rows there are.
        direction: which direction's score decides, where they are not combined.
        reporter: told how many rows are written.

    Returns:
        How many rows went where, as `split_corpus` counts them.
    """
    reporter.stage("writing", rows)
    decisions = _decisions(parts, cut, direction)
    return split_corpus(
        corpus.path,
        lambda _: next(decisions),  # asked for every row once, in order
        folder.path,
        format=corpus.format,
        columns=corpus.columns,
        max_row_bytes=corpus.max_row_bytes,
        rows=rows,
        fingerprint=fingerprint,
        progress=reporter.advance,
    )


def _decisions(parts: Sequence[Path], cut: dict[str, Any], direction: int) -> Iterator[Decision]:
    for path in parts:
        part = read_part(path)
        scored, dropped = part.scored.tolist(), is_dropped(part, cut, direction).tolist()
        for i, has_score in enumerate(scored):
            if has_score:
                yield "dropped" if dropped[i] else "kept"
            else:
                yield ("unscored", part.status[i], part.reason[i])
