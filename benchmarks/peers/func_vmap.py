"""torch.func: vmap over rows of grad, so a batch's per-row gradients of every weight, and their product with r."""

from __future__ import annotations

from typing import Any

import torch
from torch.func import functional_call, grad, vmap

from benchmarks.peers.peer import Scores, by_position, device_of, entries_of, tensors
from benchmarks.workload import row_losses
from gradshield_fast import Direction
from gradshield_fast.packing import Batch


class Vmap:
    """Per-row gradients of a whole batch at once, every weight, dense direction."""

    covers = "all"
    batch_tokens = (1, 512)

    def __init__(self, model: Any, direction: Direction) -> None:
        """Keep the weights apart from the model.

        Args:
            model: a causal language model.
            direction: a dense direction.
        """
        self.model = model.requires_grad_(False)
        model.set_attn_implementation("eager")  # vmap takes fused attention apart, row by row
        self.r = {name: entry.to(device_of(model)).flatten() for name, entry in entries_of(direction).items()}
        self.weights = {name: weight.detach() for name, weight in model.named_parameters() if name in self.r}
        self.gradients = vmap(grad(self._loss), in_dims=(None, 0, 0))

    def _loss(self, weights: dict[str, torch.Tensor], ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = functional_call(self.model, weights, (ids[None],), {"use_cache": False}).logits
        return row_losses(logits, labels[None])[0]

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
            grads = self.gradients(self.weights, ids, labels)
            parts = [grads[name].flatten(1).to(r.dtype) @ r for name, r in self.r.items()]
            scores.append(torch.stack(parts).sum(0))
        return by_position(batches, scores)
