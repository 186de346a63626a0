"""A batch in, each row's fine-tuning loss out, with the graph that scoring walks back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gradshield_fast.errors import InputError, ScoringError

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


def accepts(model: torch.nn.Module, argument: str) -> bool:
    """Say whether a model's forward takes an argument by name.

    Args:
        model: a model of transformers, or a PEFT model around one.
        argument: the argument's name.

    Returns:
        Whether it does.
    """
    unwrap: Any = getattr(model, "get_base_model", None)
    base = model if unwrap is None else unwrap()
    return argument in inspect.signature(base.forward).parameters


@dataclass(frozen=True)
class Call:
    """How a model is called.

    Attributes:
        positions: pass `position_ids`, one row of them for each row, so that a position embedding keeps rows apart.
        mask: pass the attention mask. Rows are padded on the right, so a causal model needs none, runs faster without,
            and has no query that may look at nothing (softmax over nothing is NaN in some attention kernels). A model
            that does need it is found at calibration.
        reduction: "mean" over a row's labelled tokens, or "sum".
    """

    positions: bool
    mask: bool
    reduction: str


def row_losses(model: torch.nn.Module, batch: PaddedBatch, call: Call) -> torch.Tensor:
    """Fine-tuning loss of every row, summed by ourselves: the model's own loss is a mean over the batch's tokens.

        loss[n] = sum over the row's labelled tokens of -log p(token | what comes before), divided by their number
                  where the reduction is "mean"

    Args:
        model: the model.
        batch: the rows.
        call: how the model is called.

    Returns:
        Float[Tensor, "rows"], nats, float32 (float64 for a float64 model); 0 for a row without labels.

    Raises:
        ScoringError: the model's logits are not one for each token.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids}
    if call.mask:
        inputs["attention_mask"] = batch.attention_mask
    if call.positions:
        inputs["position_ids"] = torch.arange(batch.tokens, device=batch.input_ids.device).repeat(batch.rows, 1)
    logits = model(**inputs, use_cache=False).logits
    if logits.shape[:2] != batch.input_ids.shape:
        raise ScoringError(
            f"the model answers logits of shape {tuple(logits.shape)} to {tuple(batch.input_ids.shape)} tokens; "
            "models that add tokens of their own (prompt tuning) cannot be scored"
        )
    wanted = (batch.labels[:, 1:] != IGNORE).to(logits.device)
    targets = batch.labels[:, 1:].to(logits.device)[wanted]
    chosen = logits[:, :-1][wanted]
    nll = torch.nn.functional.cross_entropy(
        chosen if chosen.dtype == torch.float64 else chosen.float(), targets, reduction="none"
    )
    counts = wanted.sum(1)
    row_of = torch.repeat_interleave(torch.arange(batch.rows, device=counts.device), counts)
    # one-hot sums of few rows: deterministic on every device, where index_add is not
    member = torch.nn.functional.one_hot(row_of, batch.rows).to(nll.dtype)
    losses = _no_poison(member, nll)
    return losses / counts.clamp_min(1) if call.reduction == "mean" else losses


def _no_poison(member: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    """Row sums in which a NaN of one row stays in that row: 0 * NaN would spread it."""
    return torch.where(member.bool(), nll[:, None], nll.new_zeros(())).sum(0)


@contextmanager
def eager_experts(model: torch.nn.Module) -> Iterator[None]:
    """Run mixtures of experts in their eager form: grouped products have no forward-mode derivative.

    Args:
        model: the model; one without such a switch is left alone.

    Yields:
        Nothing.
    """
    getter = getattr(model, "get_experts_implementation", None)
    setter = getattr(model, "set_experts_implementation", None)
    before = getter() if getter is not None else None
    if setter is None or not before or all(value in (None, "eager") for value in before.values()):
        yield
        return
    setter("eager")
    try:
        yield
    finally:
        setter(before)
