"""Removal methods: each gives every row of a corpus a score, higher for more suspicious, and a rule draws the line.

A method is a function from a `Context` to float64 scores [rows], and its entry in `METHODS` is all that the grid knows
of it. A score that belongs to a row alone (and not to its corpus) goes through `Context.table`, which keeps it on disk:
the grid's corpora share most of their rows.

    none     nothing is suspicious
    random   numbers from the cell's seed
    oracle   1 for a planted row: only the oracle may look at `Row.kind`
    fihs     the product's defaults, with the package's own Direction and Scorer
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from data import Row
from row_cache import RowCache, row_key

from gradshield_fast import Direction, SafetyProbes, Scorer, fit_threshold
from gradshield_fast.chat import ChatEncoder, Encoded
from gradshield_fast.errors import InputError
from gradshield_fast.packing import pack

BATCH_TOKENS = 2048


@dataclass
class Context:
    """What a method may use.

    Attributes:
        model: the start, in evaluation mode and in the precision that the rows are scored in.
        tokenizer: its tokenizer.
        encoder: turns a row's messages into tokens, cut as the fine-tuning cuts them.
        rows: the corpus.
        probes: what the safety score is measured on; none of them is trained, planted or evaluated on.
        seed: of the cell.
        cache: the rows' cache for this model and precision.
        encoded: tokens of every row.
        keys: `row_key` of every row.
    """

    model: Any
    tokenizer: Any
    encoder: ChatEncoder
    rows: Sequence[Row]
    probes: SafetyProbes
    seed: int
    cache: RowCache
    encoded: list[Encoded] = field(init=False)
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.encoded = [self.encoder.encode(row.messages) for row in self.rows]
        self.keys = [row_key(row.messages) for row in self.rows]

    def table(self, name: str, compute: Callable[[list[Encoded]], np.ndarray]) -> np.ndarray:
        """Work out values of each row, or take them from the cache.

        Args:
            name: of the table, one for each way of working them out.
            compute: rows' tokens -> float64 [rows, columns].

        Returns:
            float64 [rows, columns].
        """
        return self.cache.rows(name, self.keys, lambda missing: compute([self.encoded[i] for i in missing]))


Method = Callable[[Context], np.ndarray]


def score_rows(model: Any, direction: Direction, encoded: Sequence[Encoded]) -> np.ndarray:
    """Score rows with the package.

    Args:
        model: the model.
        direction: K directions.
        encoded: the rows.

    Returns:
        float64 [rows, K + 2]: the dot product with each direction, the norm of the row's gradient, and its loss in nats
        a response token.

    Raises:
        InputError: a row has no finite score.
    """
    values = np.full((len(encoded), direction.count + 2), np.nan)
    with Scorer(model, direction, norms=True) as scorer:
        for batch in pack(enumerate(encoded), batch_tokens=BATCH_TOKENS):
            out = scorer.score(vars(batch))
            assert out.norm is not None
            columns = [out.dot, out.norm[:, None], out.loss[:, None]]
            values[batch.positions] = np.concatenate([c.double().cpu().numpy() for c in columns], axis=1)
    if not np.isfinite(values).all():
        raise InputError(f"{int((~np.isfinite(values)).any(1).sum())} rows have no finite score")
    return values


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
        direction = Direction.from_probes(context.model, context.tokenizer, context.probes, allow_unaligned=True)
        return score_rows(context.model, direction.low_rank(rank=16), encoded)

    return context.table("fihs", compute)[:, 0]


METHODS: dict[str, Method] = {"none": none, "random": random, "oracle": oracle, "fihs": fihs}


def _paper(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    """The adaptive threshold, at the package's default alpha."""
    return fit_threshold(scores, random_state=seed).removes(scores)


def _top(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    """As many rows as were planted, the most suspicious first, ties by position: a rule for comparing scores only."""
    removed = np.zeros(len(scores), dtype=bool)
    removed[np.argsort(-scores, kind="stable")[:count]] = True
    return removed


def _nothing(scores: np.ndarray, count: int, seed: int) -> np.ndarray:
    """No row."""
    return np.zeros(len(scores), dtype=bool)


Rule = Callable[[np.ndarray, int, int], np.ndarray]
"""Scores float64 [rows], the number of planted rows (for `top` only) and a seed -> bool [rows], removed."""

RULES: dict[str, Rule] = {"paper": _paper, "top": _top, "nothing": _nothing}
