"""Encoded rows -> scores: what every worker does, whoever gave it the unit."""

from __future__ import annotations

import hashlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from gradshield_fast.chat import Encoded
from gradshield_fast.errors import is_out_of_memory
from gradshield_fast.packing import Batch, pack
from gradshield_fast.pipeline.encoding import EncodedUnit
from gradshield_fast.pipeline.options import ScoringOptions
from gradshield_fast.pipeline.parts import Part
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.units import Unit

if TYPE_CHECKING:
    from gradshield_fast.scorer import Scorer, Scores


class Engine:
    """Scores the rows of a unit: pack, score, put back in order.

    Batches never reach over the border of a unit, so what a row is scored with does not depend on where a run was
    stopped and went on, nor on who scores the units beside it.

    Attributes:
        halved: batches that did not fit into memory and were scored in halves.
    """

    def __init__(self, scorer: Scorer, options: ScoringOptions, reporter: Reporter, batch_tokens: int) -> None:
        """Take what all units share.

        Args:
            scorer: open and settled, for the scope of the engine.
            options: how the rows are scored.
            reporter: told about each batch.
            batch_tokens: tokens of a batch; what the options say, or what was chosen for "auto".
        """
        self._scorer, self._options, self._reporter = scorer, options, reporter
        self._norms = np.array(scorer.direction.norm)
        self._vocabulary = vocabulary(scorer.model)
        self._batch_tokens = batch_tokens
        self.halved = 0

    def score(self, unit: Unit, encoded: EncodedUnit) -> Part:
        """Score the rows of one unit.

        Args:
            unit: which.
            encoded: its rows.

        Returns:
            Their scores; a row without one has a status that says why.
        """
        part = Part.blank(unit.first, unit.rows, self._scorer.direction.count)
        part.id, part.status, part.reason = list(encoded.id), list(encoded.status), list(encoded.reason)
        part.tokens, part.response_tokens = encoded.tokens, encoded.response_tokens
        part.same_as = encoded.same_as
        items: list[tuple[int, Encoded]] = []
        leaders: dict[bytes, int] = {}
        followers: list[tuple[int, int]] = []
        for position, row in enumerate(encoded.rows(), unit.first):
            if not row.usable:
                self._reporter.advance(1)
            elif beyond(row, self._vocabulary):
                reason = f"token {max(row.input_ids)} is beyond the model's vocabulary of {self._vocabulary}"
                part.fail(position, "bad_tokens", reason)
                self._reporter.advance(1)
            elif self._options.dedupe and (leader := leaders.setdefault(_tokens_key(row), position)) != position:
                # other turns, but the same tokens: a template trimmed them, or they were cut
                followers.append((position - unit.first, leader - unit.first))
                self._reporter.advance(1)
            else:
                items.append((position, row))
        if items:
            padded = self._scorer.ways.get("packing") != "packed"
            for batch in pack(items, batch_tokens=self._batch_tokens, window=len(items), padded=padded):
                self._score_batch(batch, part)
        for i, leader in followers:
            part.follow(i, leader)
        return part

    def _score_batch(self, batch: Batch, part: Part) -> None:
        """Score a batch; where it does not fit into memory, its halves."""
        pending = [batch]
        while pending:
            batch = pending.pop()
            try:
                scores = self._scorer.score(given(batch))
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                scores = None
            # outside of the handler, whose traceback would keep the failed batch's tensors alive
            if scores is not None:
                self._record(scores, batch, part)
            elif len(batch.positions) > 1:
                self.halved += 1
                _release_memory()
                pending += reversed(_halves(batch))
            else:
                _release_memory()
                tokens = batch.input_ids.shape[1]
                part.fail(
                    int(batch.positions[0]),
                    "out_of_memory",
                    f"its {tokens} tokens do not fit into memory; lower --max-length",
                )
                self._reporter.advance(1)

    def _record(self, scores: Scores, batch: Batch, part: Part) -> None:
        at = batch.positions - int(part.row[0])
        dot = scores.dot.double().cpu().numpy()
        norm = None if scores.norm is None else scores.norm.double().cpu().numpy()
        if self._options.normalize == "cosine":
            assert norm is not None
            dot = cosine(dot, norm, self._norms)
        part.fihs[at] = dot
        part.loss[at] = scores.loss.double().cpu().numpy()
        if norm is not None:
            part.grad_norm[at] = norm
        # float32 can overflow where the scorer's own type did not
        valid = scores.valid.cpu().numpy() & np.isfinite(part.fihs[at]).all(1) & np.isfinite(part.loss[at])
        for i in np.flatnonzero(~valid):
            loss = float(part.loss[at[i]])
            part.loss[at[i]] = np.nan
            reason = f"its loss is {loss}" if not math.isfinite(loss) else "its loss is finite but its score is not"
            part.fail(int(batch.positions[i]), "non_finite", reason)
        self._reporter.advance(len(at), int(batch.cu_seqlens[-1]))


def cosine(dot: np.ndarray, norm: np.ndarray, direction_norm: np.ndarray) -> np.ndarray:
    """Divide dot products by the norms of both sides.

        cos[n, k] = <G[n], r_k> / (||G[n]|| ||r_k||);   0 for a row without a gradient, which moves nothing

    Args:
        dot: float64 [rows, directions].
        norm: float64 [rows].
        direction_norm: float64 [directions].

    Returns:
        float64 [rows, directions].
    """
    product = norm[:, None] * direction_norm
    return np.divide(dot, product, out=np.where(product == 0, 0.0, np.nan), where=product != 0)


def _tokens_key(row: Encoded) -> bytes:
    tokens = np.array([row.input_ids, row.labels], dtype=np.int32)
    return hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()


def given(batch: Batch) -> dict[str, np.ndarray]:
    """Hand a batch to a scorer.

    Args:
        batch: the batch.

    Returns:
        What `Scorer.score` takes.
    """
    return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}


def _halves(batch: Batch) -> list[Batch]:
    middle = len(batch.positions) // 2
    return [_rows(batch, slice(None, middle)), _rows(batch, slice(middle, None))]


def _rows(batch: Batch, rows: slice) -> Batch:
    lengths = np.diff(batch.cu_seqlens)[rows]
    width = int(lengths.max())
    cu_seqlens = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return Batch(
        input_ids=batch.input_ids[rows, :width],
        attention_mask=batch.attention_mask[rows, :width],
        labels=batch.labels[rows, :width],
        positions=batch.positions[rows],
        cu_seqlens=cu_seqlens,
        pad_fraction=1.0 - float(lengths.sum()) / (len(lengths) * width),
    )


def _release_memory() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def beyond(row: Encoded, known: int | None) -> bool:
    """Say whether a row has a token that the model does not know.

    Args:
        row: the row, with tokens.
        known: the model's vocabulary, or None.

    Returns:
        Whether it has.
    """
    return known is not None and max(row.input_ids) >= known


def vocabulary(model: Any) -> int | None:
    """Count the tokens that a model knows.

    Args:
        model: the model.

    Returns:
        The rows of its embedding, or None if it has none.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])
