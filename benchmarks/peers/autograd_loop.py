"""The plain way: one forward and one backward pass a row, with weight gradients, and their product with r."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.peer import Scores, device_of, entries_of
from gradshield_fast import Direction
from gradshield_fast.packing import Batch

_Row = tuple[int, torch.Tensor, torch.Tensor]


class AutogradLoop:
    """Batch of one, every weight, dense direction."""

    covers = "all"
    batch_tokens = (1,)

    def __init__(self, model: Any, direction: Direction) -> None:
        """Keep the weights that the direction covers, with gradients on.

        Args:
            model: a causal language model.
            direction: a dense direction.
        """
        self.model = model
        weights = dict(model.named_parameters())
        self.weights = [weights[name].requires_grad_(True) for name in direction.names]
        self.r = [entry.to(device_of(model)).flatten() for entry in entries_of(direction).values()]

    def prepare(self, batches: list[Batch]) -> list[_Row]:
        """Take the rows out of their batches, without padding.

        Args:
            batches: packed rows.

        Returns:
            Position, input_ids and labels of each row.
        """
        where = device_of(self.model)
        rows = []
        for batch in batches:
            for n, position in enumerate(batch.positions.tolist()):
                place = (slice(n, n + 1), slice(0, int(batch.attention_mask[n].sum())))
                ids, labels = (torch.from_numpy(x[place]).to(where) for x in (batch.input_ids, batch.labels))
                rows.append((position, ids, labels))
        return rows

    def score(self, prepared: list[_Row]) -> Scores:
        """Score row by row.

        Args:
            prepared: from `prepare`.

        Returns:
            Row's position -> score.
        """
        scores: Scores = {}
        for position, ids, labels in prepared:
            loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
            grads = torch.autograd.grad(loss, self.weights, allow_unused=True)
            parts = [torch.dot(g.flatten().to(r.dtype), r) for g, r in zip(grads, self.r, strict=True) if g is not None]
            scores[position] = float(torch.stack(parts).sum())
        return scores
