"""Rows -> scores, in this process: the engine that every other one is measured against."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from gradshield_fast.chat import ChatEncoder, Encoded
from gradshield_fast.corpus import Row, read_corpus
from gradshield_fast.errors import InputError, is_out_of_memory
from gradshield_fast.packing import Batch, pack
from gradshield_fast.pipeline.options import CorpusOptions, ScoringOptions
from gradshield_fast.pipeline.parts import Part
from gradshield_fast.pipeline.progress import Reporter

if TYPE_CHECKING:
    from gradshield_fast.memory import Choice
    from gradshield_fast.scorer import Scorer, Scores


class Engine:
    """Scores the rows of a part: encode, pack, score, put back in order.

    Batches never reach over the border of a part, so what a row is scored with does not depend on where a run was
    stopped and went on.

    Attributes:
        halved: batches that did not fit into memory and were scored in halves.
    """

    def __init__(
        self,
        scorer: Scorer,
        encoder: ChatEncoder,
        options: ScoringOptions,
        reporter: Reporter,
        batch_tokens: int | None = None,
        chosen: Callable[[Choice], None] | None = None,
    ) -> None:
        """Take what all parts share.

        Args:
            scorer: open, for the scope of the engine.
            encoder: turns a conversation into tokens.
            options: how the rows are scored.
            reporter: told about each batch.
            batch_tokens: what an earlier start of the run chose, where the options leave it open.
            chosen: told what this one chose, before anything is scored.
        """
        self._scorer, self._encoder, self._options, self._reporter = scorer, encoder, options, reporter
        self._norms = np.array(scorer.direction.norm)
        self._vocabulary = _vocabulary(scorer.model)
        self._batch_tokens = batch_tokens if options.batch_tokens == "auto" else options.batch_tokens
        self._chosen = chosen
        self.halved = 0

    def score(self, rows: Iterable[Row], first: int, count: int) -> Part:
        """Score the rows of one part.

        Args:
            rows: the rows, in order.
            first: position of the first.
            count: how many there are.

        Returns:
            Their scores; a row without one has a status that says why.

        Raises:
            InputError: the corpus ends before the part does.
        """
        part = Part.blank(first, count, self._scorer.direction.count)
        items: list[tuple[int, Encoded]] = []
        seen = 0
        for row in islice(rows, count):
            encoded = encode_row(row, self._encoder)
            part.id[seen] = row.id
            part.status[seen], part.reason[seen] = encoded.status, encoded.reason
            part.tokens[seen], part.response_tokens[seen] = len(encoded.input_ids), encoded.response_tokens
            seen += 1
            if not encoded.usable:
                self._reporter.advance(1)
            elif self._vocabulary is not None and max(encoded.input_ids) >= self._vocabulary:
                reason = f"token {max(encoded.input_ids)} is beyond the model's vocabulary of {self._vocabulary}"
                part.fail(row.index, "bad_tokens", reason)
                self._reporter.advance(1)
            else:
                items.append((row.index, encoded))
        if seen < count:
            raise InputError(f"the corpus has changed: row {first + seen} was there when it was counted, and is gone")
        if items:
            self._score_items(items, part)
        return part

    def _score_items(self, items: list[tuple[int, Encoded]], part: Part) -> None:
        self._scorer.settle(_given(next(pack(items[:1], batch_tokens=1))))
        if self._batch_tokens is None:
            from gradshield_fast.memory import choose_batch_tokens

            choice = choose_batch_tokens(self._scorer, max(len(row.input_ids) for _, row in items))
            self._batch_tokens = choice.tokens
            self._reporter.note(f"batches of {choice.tokens} tokens: {choice.why}")
            if self._chosen is not None:
                self._chosen(choice)
        padded = self._scorer.ways.get("packing") != "packed"
        for batch in pack(items, batch_tokens=self._batch_tokens, window=len(items), padded=padded):
            self._score_batch(batch, part)

    def _score_batch(self, batch: Batch, part: Part) -> None:
        """Score a batch; where it does not fit into memory, its halves."""
        pending = [batch]
        while pending:
            batch = pending.pop()
            try:
                scores = self._scorer.score(_given(batch))
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


def encode_row(row: Row, encoder: ChatEncoder) -> Encoded:
    """Encode a row of a corpus, whatever its status.

    Args:
        row: the row.
        encoder: turns a conversation into tokens.

    Returns:
        Its tokens; for a row that could not be read, none, and the row's own status and reason.
    """
    if row.messages is None:
        return Encoded([], [], 0, row.status, row.reason)
    return encoder.encode(row.messages)


def corpus_rows(corpus: CorpusOptions, start: int = 0) -> Iterator[Row]:
    """Read the rows of a run's corpus.

    Args:
        corpus: which rows.
        start: the first position.

    Returns:
        An iterator over the rows.
    """
    return read_corpus(
        corpus.path, format=corpus.format, columns=corpus.columns, max_row_bytes=corpus.max_row_bytes, start=start
    )


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


def _given(batch: Batch) -> dict[str, np.ndarray]:
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


def _vocabulary(model: Any) -> int | None:
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return None if weight is None else int(weight.shape[0])
