"""Rows -> batches of a bounded number of tokens, with little padding."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from gradshield_fast.errors import InputError

if TYPE_CHECKING:
    from gradshield_fast.chat import Encoded

BATCH_TOKENS = 2048
"""Tokens of a batch where nothing better is known."""

_Item = tuple[int, "Encoded"]

# A batch ends early where one more row would make more of it padding than this, once it holds a quarter of its budget.
_MAX_PADDING = 0.05
_MIN_FILL = 0.25


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of similar length, padded on the right to the longest of them.

    Attributes:
        input_ids: int64 [rows, tokens].
        attention_mask: int64 [rows, tokens], 1 at tokens and 0 at padding.
        labels: int64 [rows, tokens], -100 where there is no loss; not shifted.
        positions: int64 [rows], the position of each row in the corpus.
        cu_seqlens: int32 [rows + 1], row n has cu_seqlens[n + 1] - cu_seqlens[n] tokens; for packing without padding.
        pad_fraction: share of `input_ids` that is padding.
    """

    input_ids: np.ndarray
    attention_mask: np.ndarray
    labels: np.ndarray
    positions: np.ndarray
    cu_seqlens: np.ndarray
    pad_fraction: float


def pack(
    items: Iterable[_Item],
    *,
    batch_tokens: int,
    window: int = 2048,
    pad_id: int = 0,
    max_rows: int | None = None,
    padded: bool = True,
) -> Iterator[Batch]:
    """Group rows into batches of at most `batch_tokens` tokens, padding included where the model is given any.

    Rows are sorted by length inside a window and batched from the longest, so a batch that does not fit into memory
    is met early. `Batch.positions` restores the order. The same items give the same batches. A batch of a quarter of
    the budget ends where one more row would make over 5 % of it padding; a large budget needs a large window for
    batches to be full.

    Args:
        items: pairs of a row's position in the corpus and its tokens.
        batch_tokens: bound on rows * tokens; a single row that is longer gets a batch of its own.
        window: rows that are held and sorted together.
        pad_id: token id of the padding.
        max_rows: bound on the rows of a batch, or None.
        padded: the model is given the padding; False: it takes rows packed in a line, so that padding costs nothing
            and only a row's own tokens count.

    Yields:
        Batches that hold every item once.

    Raises:
        InputError: an option is below 1, or a row has no tokens or one label per token is missing.
    """
    for name, value in (("batch_tokens", batch_tokens), ("window", window), ("max_rows", max_rows)):
        if value is not None and value < 1:
            raise InputError(f"pack: {name} must be at least 1: got {value}")
    held: list[_Item] = []
    for position, row in items:
        if not row.input_ids or len(row.input_ids) != len(row.labels):
            raise InputError(
                f"pack: row {position} has {len(row.input_ids)} tokens and {len(row.labels)} labels "
                f"(status {row.status}): expected as many of both, and at least one; leave such rows out"
            )
        held.append((position, row))
        if len(held) == window:
            yield from _sorted_batches(held, batch_tokens, pad_id, max_rows, padded)
            held = []
    yield from _sorted_batches(held, batch_tokens, pad_id, max_rows, padded)


def _sorted_batches(
    held: list[_Item], batch_tokens: int, pad_id: int, max_rows: int | None, padded: bool
) -> Iterator[Batch]:
    held.sort(key=lambda item: -len(item[1].input_ids))
    lengths = [len(row.input_ids) for _, row in held]
    first = 0
    while first < len(held):
        most = len(lengths) if max_rows is None else max_rows
        if padded:
            rows = max(1, batch_tokens // lengths[first])
            rows = _rows_that_fit(lengths[first : first + min(rows, most)], batch_tokens)
        else:
            total = np.cumsum(lengths[first : first + most])
            rows = max(1, int(np.searchsorted(total, batch_tokens, side="right")))
        last = first + rows
        yield _batch(held[first:last], pad_id)
        first = last


def _rows_that_fit(lengths: list[int], batch_tokens: int) -> int:
    """Count the rows, longest first, that go into one batch without making too much of it padding."""
    tokens = 0
    for rows, length in enumerate(lengths):
        full = rows * lengths[0] >= _MIN_FILL * batch_tokens
        if full and tokens + length < (1.0 - _MAX_PADDING) * (rows + 1) * lengths[0]:
            return rows
        tokens += length
    return len(lengths)


def _batch(items: list[_Item], pad_id: int) -> Batch:
    lengths = np.array([len(row.input_ids) for _, row in items], dtype=np.int64)
    shape = (len(items), int(lengths[0]))
    input_ids = np.full(shape, pad_id, dtype=np.int64)
    labels = np.full(shape, -100, dtype=np.int64)
    for n, (_, row) in enumerate(items):
        input_ids[n, : lengths[n]] = row.input_ids
        labels[n, : lengths[n]] = row.labels
    cu_seqlens = np.zeros(len(items) + 1, dtype=np.int32)
    np.cumsum(lengths, out=cu_seqlens[1:])
    return Batch(
        input_ids=input_ids,
        attention_mask=(np.arange(shape[1]) < lengths[:, None]).astype(np.int64),
        labels=labels,
        positions=np.array([position for position, _ in items], dtype=np.int64),
        cu_seqlens=cu_seqlens,
        pad_fraction=1.0 - float(lengths.sum()) / (shape[0] * shape[1]),
    )
