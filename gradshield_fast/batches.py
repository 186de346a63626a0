"""A batch of rows as it comes in, checked, and the two forms in which a model takes it: padded, or packed in a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gradshield_fast.errors import InputError

IGNORE = -100
"""Label of a token that has no loss."""


@dataclass(frozen=True)
class PaddedBatch:
    """A batch as the model gets it: padded on the right, whatever side it came padded on.

    With causal attention a token never sees what is to its right, so right padding cannot reach a real token, and
    positions count from 0 in every row.

    Attributes:
        input_ids: Int64[Tensor, "rows tokens"].
        attention_mask: Int64[Tensor, "rows tokens"], 1 at real tokens.
        labels: Int64[Tensor, "rows tokens"], -100 where there is no loss; position 0 never has one.
        source: Int64[Tensor, "rows tokens"], the column that each token had in the batch as given.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    source: torch.Tensor

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """Number of tokens of a row, padding included."""
        return self.input_ids.shape[1]

    @property
    def predicts(self) -> torch.Tensor:
        """Bool[Tensor, "rows tokens"]: the next token has a label, so that this position's hidden state predicts it."""
        predicts = torch.zeros_like(self.labels, dtype=torch.bool)
        predicts[:, :-1] = self.labels[:, 1:] != IGNORE
        return predicts

    def row(self, n: int, length: int) -> PaddedBatch:
        """Take one row out, without its padding.

        Args:
            n: the row.
            length: its tokens.

        Returns:
            A batch of one.
        """
        place = (slice(n, n + 1), slice(0, length))
        return PaddedBatch(self.input_ids[place], self.attention_mask[place], self.labels[place], self.source[place])


@dataclass(frozen=True)
class PackedBatch:
    """The same rows one after another without padding, for a model whose attention keeps rows apart by `cu_seqlens`.

    Attributes:
        input_ids: Int64[Tensor, "1 tokens"], row after row.
        positions: Int64[Tensor, "1 tokens"], from 0 in every row.
        cu_seqlens: Int32[Tensor, "rows+1"], row n owns tokens cu_seqlens[n]:cu_seqlens[n+1].
        place: Int64[Tensor, "tokens"], where each token is in the padded form, flattened.
        longest: tokens of the longest row.
    """

    input_ids: torch.Tensor
    positions: torch.Tensor
    cu_seqlens: torch.Tensor
    place: torch.Tensor
    longest: int


def packed_batch(batch: PaddedBatch) -> PackedBatch:
    """Take the padding out of a batch.

    Args:
        batch: the rows, padded on the right.

    Returns:
        The packed form; its tokens are in the padded form's order.
    """
    real = batch.attention_mask.bool()
    lengths = real.sum(1)
    cu_seqlens = torch.zeros(batch.rows + 1, dtype=torch.int32, device=lengths.device)
    cu_seqlens[1:] = lengths.cumsum(0)
    positions = torch.arange(batch.tokens, device=lengths.device).expand_as(real)[real]
    place = real.reshape(-1).nonzero()[:, 0]
    return PackedBatch(
        batch.input_ids[real][None], positions[None], cu_seqlens, place, int(lengths.max()) if batch.rows else 0
    )


def padded_batch(batch: Mapping[str, Any], device: torch.device, vocabulary: int | None) -> PaddedBatch:
    """Check a batch and bring it to the right-padded form.

    Args:
        batch: "input_ids", "labels" and, where rows are padded, "attention_mask": Int[Tensor or array, "rows tokens"].
        device: where the model takes its input.
        vocabulary: number of token ids the model knows, or None where that is not known.

    Returns:
        The batch.

    Raises:
        InputError: a key is missing, shapes differ, a mask has holes, or an id is out of range; the message names the
            row.
    """
    for key in ("input_ids", "labels"):
        if key not in batch:
            raise InputError(f"batch: key '{key}' is missing; got {sorted(batch)}")
    ids = _whole(batch["input_ids"], "input_ids")
    labels = _whole(batch["labels"], "labels")
    mask = _whole(batch["attention_mask"], "attention_mask") if batch.get("attention_mask") is not None else None
    mask = torch.ones_like(ids) if mask is None else mask
    for name, x in (("labels", labels), ("attention_mask", mask)):
        if x.shape != ids.shape:
            raise InputError(f"batch: {name} is {tuple(x.shape)}, but input_ids is {tuple(ids.shape)}")
    if ids.shape[0] == 0 or ids.shape[1] == 0:
        raise InputError(f"batch: input_ids is empty, shape {tuple(ids.shape)}; leave empty batches out")
    real = mask != 0
    lengths = real.sum(1)
    first = real.long().argmax(1)
    columns = torch.arange(ids.shape[1])
    solid = (columns >= first[:, None]) & (columns < (first + lengths)[:, None])
    if not torch.equal(real, solid):
        row = int((real != solid).any(1).nonzero()[0])
        raise InputError(f"batch: the attention mask of row {row} has a hole; a row's tokens must be contiguous")
    if bool((lengths == 0).any()):
        raise InputError(f"batch: row {int((lengths == 0).nonzero()[0])} has no tokens; leave empty rows out")
    if bool(((labels != IGNORE) & ~real).any()):
        row = int(((labels != IGNORE) & ~real).any(1).nonzero()[0])
        raise InputError(f"batch: row {row} has a label at a padding position; labels must be -100 there")
    tokens = int(lengths.max())
    source = (first[:, None] + columns[:tokens]).clamp_max(ids.shape[1] - 1)
    keep = columns[:tokens] < lengths[:, None]
    # padding repeats the row's first token: an id that is certainly valid, at a place that nothing real looks at
    moved = torch.where(keep, ids.gather(1, source), ids.gather(1, first[:, None]))
    labels = labels.gather(1, source).masked_fill(~keep, IGNORE)
    labels[:, 0] = IGNORE  # nothing comes before the first token, so nothing predicts it
    if vocabulary is not None:
        for name, x, low in (("input_ids", moved, 0), ("labels", labels.masked_fill(labels == IGNORE, 0), 0)):
            bad = (x < low) | (x >= vocabulary)
            if bool(bad.any()):
                row = int(bad.any(1).nonzero()[0])
                raise InputError(
                    f"batch: {name} of row {row} holds {int(x[bad][0])}, but the model knows 0..{vocabulary - 1}; "
                    "is the tokenizer this model's own?"
                )
    return PaddedBatch(moved.to(device), keep.long().to(device), labels.to(device), source)


def _whole(x: Any, name: str) -> torch.Tensor:
    t = torch.as_tensor(x).detach().cpu()
    if t.ndim != 2 or t.is_floating_point() or t.is_complex():
        raise InputError(f"batch: {name} must be integers of shape [rows, tokens], got {t.dtype} {tuple(t.shape)}")
    return t.long()
