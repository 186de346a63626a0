"""A batch in, each row's fine-tuning loss out, with the graph that scoring walks back."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from gradshield_fast import attention
from gradshield_fast.batches import PaddedBatch, packed_batch
from gradshield_fast.errors import ScoringError
from gradshield_fast.head_loss import Head, HeadTerms, head_losses, hidden_states


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
        head: the head that the fused loss stands for; None: the model's own logits.
        attention: name of the attention that stands in for the model's own: ours (attention.py), "sdpa" or "eager";
            None: its own.
        packed: rows in one line without padding, kept apart by our attention.
        products: large float32 linear layers by our products (products.py).
    """

    positions: bool
    mask: bool
    reduction: str
    head: Head | None = None
    attention: str | None = None
    packed: bool = False
    products: bool = False

    @property
    def plain(self) -> Call:
        """The same call by the model's own means: its head, attention and products, padded rows."""
        return replace(self, head=None, attention=None, packed=False, products=False)


def row_losses(model: torch.nn.Module, batch: PaddedBatch, call: Call, terms: HeadTerms | None = None) -> torch.Tensor:
    """Fine-tuning loss of every row, summed by ourselves: the model's own loss is a mean over the batch's tokens.

        loss[n] = sum over the row's labelled tokens of -log p(token | what comes before), divided by their number
                  where the reduction is "mean"

    Args:
        model: the model.
        batch: the rows.
        call: how the model is called.
        terms: directions on the head's weight, for a fused head; its `dot` and `norm` are set.

    Returns:
        Float[Tensor, "rows"], nats, float32 (float64 for a float64 model); 0 for a row without labels.

    Raises:
        ScoringError: the model's logits are not one for each token.
    """
    inputs, place = _inputs(model, batch, call)
    shape = inputs["input_ids"].shape
    targets = batch.labels[:, 1:][batch.predicts[:, :-1]]
    counts = batch.predicts.sum(1)
    if call.head is not None:
        with hidden_states(call.head) as hidden:
            model(**inputs, use_cache=False)
        return head_losses(call.head, hidden, place, targets, counts, call.reduction, terms)
    logits = model(**inputs, use_cache=False).logits
    if logits.shape[:2] != shape:
        raise ScoringError(
            f"the model answers logits of shape {tuple(logits.shape)} to {tuple(shape)} tokens; "
            "models that add tokens of their own (prompt tuning) cannot be scored"
        )
    counts = counts.to(logits.device)
    chosen = logits.flatten(0, 1)[place.to(logits.device)]
    nll = torch.nn.functional.cross_entropy(
        chosen if chosen.dtype == torch.float64 else chosen.float(), targets.to(logits.device), reduction="none"
    )
    row_of = torch.repeat_interleave(torch.arange(batch.rows, device=counts.device), counts)
    # one-hot sums of few rows: deterministic on every device, where index_add is not
    member = torch.nn.functional.one_hot(row_of, batch.rows).to(nll.dtype)
    losses = _no_poison(member, nll)
    return losses / counts.clamp_min(1) if call.reduction == "mean" else losses


def _inputs(model: torch.nn.Module, batch: PaddedBatch, call: Call) -> tuple[dict[str, Any], torch.Tensor]:
    """What the model is called with, and the flat positions in it whose next token has a label."""
    if call.packed:
        line = packed_batch(batch)
        inputs: dict[str, Any] = {"input_ids": line.input_ids, "position_ids": line.positions}
        inputs |= attention.lengths(line.cu_seqlens, line.longest)
        return inputs, batch.predicts.reshape(-1)[line.place].nonzero()[:, 0]
    inputs = {"input_ids": batch.input_ids}
    if call.mask:
        inputs["attention_mask"] = batch.attention_mask
    if call.positions:
        inputs["position_ids"] = torch.arange(batch.tokens, device=batch.input_ids.device).repeat(batch.rows, 1)
    return inputs, batch.predicts.reshape(-1).nonzero()[:, 0]


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
