"""Removal methods: each gives every row of a corpus a score, higher for more suspicious, and a rule draws the line.

A method is a function from a `Context` to float64 scores [rows], and its entry in `METHODS` is all that the grid knows
of it. A score that belongs to a row alone (and not to its corpus) goes through `Context.table`, which keeps it on disk:
the grid's corpora share most of their rows.

    none      nothing is suspicious
    random    numbers from the cell's seed
    oracle    1 for a planted row: only the oracle may look at `Row.kind`
    fihs      the product's defaults, with the package's own Direction and Scorer
    keywords  words of harm in a row's text, see plain_methods.py
    hidden    nearness of hidden states to harmful and from safe anchors, see plain_methods.py
    ...       formulas over columns that one pass scores together, see columns.py

Rules are in rules.py.
"""

from __future__ import annotations

import numpy as np
from columns import FORMULAS, columns
from context import Context, Method, score_rows
from plain_methods import hidden, keywords
from rules import RULES, Rule

from gradshield_fast import Direction
from gradshield_fast.chat import Encoded

__all__ = ["METHODS", "RULES", "Context", "Method", "Rule", "score_rows"]


def none(context: Context) -> np.ndarray:
    """Find nothing suspicious.

    Args:
        context: the cell.

    Returns:
        float64 [rows].
    """
    return np.zeros(len(context.rows))


def random(context: Context) -> np.ndarray:
    """Draw the scores.

    Args:
        context: the cell.

    Returns:
        float64 [rows].
    """
    return np.random.default_rng(context.seed).random(len(context.rows))


def oracle(context: Context) -> np.ndarray:
    """Know which rows were planted.

    Args:
        context: the cell.

    Returns:
        float64 [rows], 1 for a planted row.
    """
    return np.array([float(row.kind != "benign") for row in context.rows])


def fihs(context: Context) -> np.ndarray:
    """Score as the product does by default: refusal log-probability, rank 16, dot product.

    Args:
        context: the cell.

    Returns:
        float64 [rows], nats²/weight².
    """

    def compute(encoded: list[Encoded]) -> np.ndarray:
        # the grid scores weakly aligned starts too: what the score then does is part of the result
        direction = Direction.from_probes(
            context.model, context.tokenizer, context.probes, score="refusal_logprob", allow_unaligned=True
        )
        return score_rows(context.model, direction.low_rank(rank=16), encoded)

    return context.table("fihs", compute)[:, 0]


def _formula(name: str) -> Method:
    return lambda context: FORMULAS[name].score(columns(context, FORMULAS[name].tables))


METHODS: dict[str, Method] = {"none": none, "random": random, "oracle": oracle, "fihs": fihs}
METHODS |= {"keywords": keywords, "hidden": hidden}
METHODS |= {name: _formula(name) for name in FORMULAS}
