"""Answers' mean log-probabilities with the head and its loss in one op: the logits are never stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from gradshield_fast.batches import PaddedBatch
from gradshield_fast.calibrate import SAME_LOSS
from gradshield_fast.errors import ScoringError
from gradshield_fast.head_loss import Head, find_head, head_losses, hidden_states
from gradshield_fast.response_logprob import answer_means, inputs_of

Listen = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(eq=False)
class FusedAnswers:
    """A model whose head and loss are run by `linear_cross_entropy`.

    Attributes:
        model: the model.
        head: its head.
        listen: called in every backward pass with what the head's own gradient is made of: Float[Tensor, "labelled d"]
            the hidden states, Int64[Tensor, "labelled"] the tokens to predict and Float[Tensor, "labelled"] the factor
            of each one's loss; None: nobody asks.
    """

    model: torch.nn.Module
    head: Head
    listen: Listen | None = field(default=None)

    def means(self, batch: PaddedBatch) -> torch.Tensor:
        """Mean log-probability of each row's labelled tokens, with a graph that ends at the head's input.

        Args:
            batch: the rows, each with a label.

        Returns:
            Float32[Tensor, "rows"], nats a token.
        """
        predicts = batch.predicts
        place, counts = predicts.reshape(-1).nonzero()[:, 0], predicts.sum(1)
        labels = batch.labels[:, 1:][predicts[:, :-1]]
        with hidden_states(self.head) as hidden:
            self.model(**inputs_of(self.model, batch), use_cache=False)
        if hidden and torch.is_grad_enabled() and not hidden[0].requires_grad:
            hidden[0] = hidden[0].detach().requires_grad_()  # nothing below the head is asked for
        losses = head_losses(self.head, hidden, place, labels, counts, "mean", None)
        if losses.requires_grad and self.listen is not None:
            listen, h = self.listen, hidden[0].detach().flatten(0, -2)[place.to(hidden[0].device)]
            labels, counts = labels.to(h.device), counts.to(h.device)
            losses.register_hook(lambda share: listen(h, labels, (share / counts).repeat_interleave(counts)))
        return -losses


def fused_answers(model: torch.nn.Module, batch: PaddedBatch) -> FusedAnswers | None:
    """Find out whether the fused head gives what the model's own gives.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        batch: rows to compare on, each with a label.

    Returns:
        The way to run it, or None: the head is of another kind, the values differ, or the model is in float64, where
        many models round to float32 inside and only the same operations round the same.
    """
    head = find_head(model, "auto")
    if isinstance(head, str) or head.module.weight.dtype not in SAME_LOSS or head.module.weight.dtype == torch.float64:
        return None
    fused = FusedAnswers(model, head)
    with torch.no_grad():
        own = answer_means(model, batch)
        try:
            off = (fused.means(batch) - own).abs() / (1 + own.abs())
        except ScoringError:
            return None
    return fused if bool((off <= SAME_LOSS[head.module.weight.dtype]).all()) else None
