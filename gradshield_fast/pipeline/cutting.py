"""Scores -> threshold -> kept, dropped and unscored rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from gradshield_fast.errors import InputError
from gradshield_fast.filtering import Decision, split_corpus
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.options import CorpusOptions, CutOptions
from gradshield_fast.pipeline.parts import Part
from gradshield_fast.pipeline.progress import Reporter


def check_direction(options: CutOptions, count: int) -> None:
    """Check that there is a score to decide by.

    Args:
        options: how to choose.
        count: scores of each row.

    Raises:
        InputError: there is no such direction.
    """
    if options.direction >= count:
        raise InputError(f"--direction-index {options.direction}: the rows have {count} score(s), counted from 0")


def find_cut(scores: Part, options: CutOptions) -> dict[str, Any]:
    """Choose the score above which rows are dropped.

    Args:
        scores: the scores of all rows.
        options: how to choose.

    Returns:
        The content of threshold.json: `value` (None if no row has a score), `kind` ("two_gaussians", "one_gaussian",
        "given" or "none"), what the fit found, and the options.
    """
    check_direction(options, scores.fihs.shape[1])
    cut: dict[str, Any] = {"column": options.column, "seed": options.seed}
    values = scores.fihs[scores.scored, options.direction].astype(np.float64)
    if len(values) == 0:
        return {**cut, "kind": "none", "value": None, "n": 0, "warnings": ["no row has a score"]}
    if options.value is not None:
        return {**cut, "kind": "given", "value": float(options.value), "n": len(values), "warnings": []}
    from gradshield_fast.threshold import fit_threshold

    return {**cut, **fit_threshold(values, alpha=options.alpha, random_state=options.seed).to_dict()}


def split(
    folder: RunFolder,
    corpus: CorpusOptions,
    fingerprint: dict[str, Any],
    scores: Part,
    cut: dict[str, Any],
    *,
    direction: int,
    reporter: Reporter,
) -> dict[str, Any]:
    """Write kept.jsonl, dropped.jsonl and unscored.jsonl.

    Args:
        folder: where to.
        corpus: the rows' bytes.
        fingerprint: the corpus's, from when it was scored.
        scores: the scores of all its rows.
        cut: from `find_cut`.
        direction: which direction's score decides.
        reporter: told about each row.

    Returns:
        How many rows went where, as `split_corpus` counts them.
    """
    scored = scores.scored
    values = scores.fihs[:, direction].astype(np.float64)
    dropped = scored & (values > cut["value"]) if cut["value"] is not None else np.zeros_like(scored)

    def decide(row: int) -> Decision:
        if scored[row]:
            return "dropped" if dropped[row] else "kept"
        return ("unscored", scores.status[row], scores.reason[row])

    reporter.stage("writing", len(scored))
    return split_corpus(
        corpus.path,
        decide,
        folder.path,
        format=corpus.format,
        columns=corpus.columns,
        max_row_bytes=corpus.max_row_bytes,
        rows=len(scored),
        fingerprint=fingerprint,
        progress=lambda _: reporter.advance(1),
    )
