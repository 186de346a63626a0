"""Log-probability of response tokens, with the output head run at those positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from gradshield_fast.batches import IGNORE, PaddedBatch
from gradshield_fast.errors import ScoringError
from gradshield_fast.losses import accepts


def place_of(model: torch.nn.Module) -> tuple[torch.device, int | None]:
    """Say where a model takes its input, and how many token ids it knows.

    Args:
        model: the model.

    Returns:
        The device of its input embedding, and the embedding's rows; None where it has no such weight.
    """
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # pyright: ignore
    weight = getattr(embedding, "weight", None)
    if not isinstance(weight, torch.Tensor):
        return next(model.parameters()).device, None
    return weight.device, weight.shape[0]


def token_logprobs(model: torch.nn.Module, batch: PaddedBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of every labelled token given what comes before it in its row.

        logprob[i] = log softmax(logits[row[i], t[i] - 1])[labels[row[i], t[i]]]

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        batch: the rows, padded on the right; positions count from 0.

    Returns:
        Float[Tensor, "labelled"] in nats, float32 (float64 for a float64 model), and Int64[Tensor, "labelled"], the
        row of each; ordered by row, then by position.
    """
    predicts = torch.zeros_like(batch.labels, dtype=torch.bool)
    predicts[:, :-1] = batch.labels[:, 1:] != IGNORE  # position t - 1 predicts token t
    logits = logits_at(model, batch, predicts)
    targets = batch.labels[:, 1:][predicts[:, :-1]].to(logits.device)
    rows = predicts.nonzero()[:, 0].to(logits.device)
    return -torch.nn.functional.cross_entropy(logits, targets, reduction="none"), rows


def answer_means(model: torch.nn.Module, batch: PaddedBatch) -> torch.Tensor:
    """Mean log-probability of each row's labelled tokens.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        batch: the rows, each with a label.

    Returns:
        Float[Tensor, "rows"] in nats a token, float32 (float64 for a float64 model).
    """
    logprob, row = token_logprobs(model, batch)
    member = torch.nn.functional.one_hot(row, batch.rows).to(logprob.dtype)
    # not index_add, which is not deterministic on every device; not a product, in which a NaN would spread
    return torch.where(member > 0, logprob[:, None], 0.0).sum(0) / member.sum(0)


def inputs_of(model: torch.nn.Module, batch: PaddedBatch) -> dict[str, Any]:
    """Say what a model is called with.

    Args:
        model: the model.
        batch: the rows, padded on the right; positions count from 0.

    Returns:
        Argument -> tensor.
    """
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    if accepts(model, "position_ids"):
        inputs["position_ids"] = torch.arange(batch.tokens, device=batch.input_ids.device).repeat(batch.rows, 1)
    return inputs


def logits_at(model: torch.nn.Module, batch: PaddedBatch, keep: torch.Tensor) -> torch.Tensor:
    """Logits of the next token at some positions only.

    The hidden states of the other positions are dropped before the output head, so that the head's product and its
    logits cost the kept positions only. What the model does after its head (softcapping, scales) still happens. A
    model whose head is not a module of its own gets the same values from full logits.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        batch: the rows, padded on the right; positions count from 0.
        keep: Bool[Tensor, "rows tokens"].

    Returns:
        Float[Tensor, "kept vocabulary"], float32 (float64 for a float64 model); ordered by row, then by position.

    Raises:
        ScoringError: the model's logits are not one for each token.
    """
    with _head_at(model, keep) as picked:
        logits = model(**inputs_of(model, batch), use_cache=False).logits
    if picked and logits.shape[:2] == (1, picked[0]):
        logits = logits[0]
    elif not picked and logits.shape[:2] == batch.input_ids.shape:
        logits = logits[keep.to(logits.device)]
    else:
        raise ScoringError(
            f"the model answers logits of shape {tuple(logits.shape)} to {tuple(batch.input_ids.shape)} tokens; "
            "models that add tokens of their own (prompt tuning) cannot be measured"
        )
    return logits if logits.dtype == torch.float64 else logits.float()


@contextmanager
def _head_at(model: torch.nn.Module, keep: torch.Tensor) -> Iterator[list[int]]:
    """Give the output head [1, kept, d] instead of [rows, tokens, d] hidden states; every other call is left alone.

    The list that it yields holds the number of kept positions once that was done.
    """
    picked: list[int] = []
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    if not isinstance(head, torch.nn.Module):
        yield picked
        return

    def pick(module: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        hidden = args[0] if args else None
        if not isinstance(hidden, torch.Tensor) or not hidden.is_floating_point() or hidden.shape[:2] != keep.shape:
            return None
        chosen = hidden[keep.to(hidden.device)]
        picked.append(len(chosen))
        return (chosen.unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(pick)
    try:
        yield picked
    finally:
        handle.remove()
