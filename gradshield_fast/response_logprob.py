"""Log-probability of response tokens, with the output head run at those positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradshield_fast.errors import ScoringError
from gradshield_fast.losses import IGNORE, PaddedBatch, takes_positions


def token_logprobs(model: torch.nn.Module, batch: PaddedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every labelled token given what comes before it in its row.

        logprob[i] = log softmax(logits[row[i], t[i] - 1])[labels[row[i], t[i]]]

    The hidden states of the other positions are dropped before the output head, so that the head's product, its
    logits and their float32 log-softmax cost response tokens only. What the model does after its head (softcapping,
    scales) still happens. A model whose head is not a module of its own gets the same values from full logits.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        batch: the rows, padded on the right; positions count from 0.

    Returns:
        Float[Tensor, "labelled"] in nats, float32 (float64 for a float64 model), and Int64[Tensor, "labelled"], the
        row of each; ordered by row, then by position.

    Raises:
        ScoringError: the model's logits are not one for each token.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if takes_positions(model):
        inputs["position_ids"] = torch.arange(batch.tokens, device=batch.input_ids.device).repeat(batch.rows, 1)
    predicts = torch.zeros_like(batch.labels, dtype=torch.bool)
    predicts[:, :-1] = batch.labels[:, 1:] != IGNORE  # position t - 1 predicts token t
    rows = predicts.nonzero()[:, 0]
    with _head_at(model, predicts):
        logits = model(**inputs, use_cache=False).logits
    if logits.shape[:2] == (1, len(rows)):
        logits = logits[0]
    elif logits.shape[:2] == batch.input_ids.shape:
        logits = logits[predicts.to(logits.device)]
    else:
        raise ScoringError(
            f"the model answers logits of shape {tuple(logits.shape)} to {tuple(batch.input_ids.shape)} tokens; "
            "models that add tokens of their own (prompt tuning) cannot be measured"
        )
    targets = batch.labels[:, 1:][predicts[:, :-1]].to(logits.device)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none"), rows.to(logits.device)


@contextmanager
def _head_at(model: torch.nn.Module, keep: torch.Tensor) -> Iterator[None]:
    """Give the output head [1, kept, d] instead of [rows, tokens, d] hidden states; every other call is left alone."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, torch.nn.Module):
        yield
        return

    def pick(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point() or hidden.shape[:2] != keep.shape:
            return None
        return (hidden[keep.to(hidden.device)].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        handle.remove()
