"""Forward-mode differentiation: no backward pass at all, one pass that carries d/de of everything at w + e r.

    <grad loss(x_n), r> = d/de loss(x_n; w + e r) at e = 0

Exact for one direction, K directions take K passes. The head and the loss run on response tokens alone, as a careful
user would write it. Attention is the eager one: fused attention has no forward-mode derivative.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.func import functional_call, jvp

from benchmarks.peers.peer import Scores, by_position, device_of, entries_of, tensors
from benchmarks.workload import IGNORE
from gradshield_fast import Direction
from gradshield_fast.packing import Batch


class ForwardMode:
    """One pass a batch with tangents, every weight, dense direction in the model's own type."""

    covers = "all"
    batch_tokens = (1024, 2048, 4096)

    def __init__(self, model: Any, direction: Direction) -> None:
        """Switch to eager attention and bring the direction to the weights' type, which forward mode asks for.

        Args:
            model: a causal language model.
            direction: a dense direction.
        """
        self.model = model.requires_grad_(False)
        model.set_attn_implementation("eager")
        names = set(direction.names)
        weights = {name: weight.detach() for name, weight in model.named_parameters() if name in names}
        entries = entries_of(direction)
        self.whole = _Losses(model)
        self.weights = {f"model.{name}": weight for name, weight in weights.items()}
        self.r = {f"model.{name}": entries[name].to(device_of(model), x.dtype) for name, x in weights.items()}

    def _losses(
        self,
        ids: torch.Tensor,
        where: tuple[torch.Tensor, torch.Tensor],
        targets: torch.Tensor,
        weights: dict[str, torch.Tensor],
    ) -> torch.Tensor:
        return functional_call(self.whole, weights, (ids, where, targets))

    def prepare(self, batches: list[Batch]) -> tuple[list[Batch], list[tuple[torch.Tensor, torch.Tensor]]]:
        """Make tensors.

        Args:
            batches: packed rows.

        Returns:
            The batches, and their tensors.
        """
        return batches, [tensors(batch, self.model) for batch in batches]

    def score(self, prepared: tuple[list[Batch], list[tuple[torch.Tensor, torch.Tensor]]]) -> Scores:
        """Score batch by batch.

        Args:
            prepared: from `prepare`.

        Returns:
            Row's position -> score.
        """
        batches, pairs = prepared
        scores = []
        for ids, labels in pairs:
            row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
            share = 1.0 / torch.bincount(row, minlength=len(ids)).float()
            losses = partial(self._losses, ids, (row, column), labels[row, column + 1])
            with torch.no_grad():
                rates = jvp(losses, (self.weights,), (self.r,))[1]
            sums = torch.zeros(len(ids), device=rates.device).index_add_(0, row, rates.float())
            scores.append(sums * share)
        return by_position(batches, scores)


class _Losses(torch.nn.Module):
    """The model with its head and loss on chosen positions alone."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, where: tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> Any:
        hidden = self.model.base_model(ids, use_cache=False).last_hidden_state
        logits = self.model.get_output_embeddings()(hidden[where]).float()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
