"""What a removal method may use, and the one call with which rows are scored."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from data import Row
from row_cache import RowCache, row_key

from gradshield_fast import Direction, SafetyProbes, Scorer
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
