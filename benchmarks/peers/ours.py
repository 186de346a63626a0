"""This package: one forward and one backward pass to the activations a batch, no weight gradient."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.peers.peer import Scores, by_position
from benchmarks.workload import as_taken, linear_weights, padded, restricted
from gradshield_fast import Direction, Scorer
from gradshield_fast.packing import Batch


class Rank16:
    """Every weight, matrices of the direction compressed to rank 16, the package's fast path."""

    covers = "all"
    batch_tokens = (1024, 2048, 4096)
    rank: int | None = 16
    compiled = False

    def __init__(self, model: Any, direction: Direction) -> None:
        """Open the scorer, which is calibrated at its first batch.

        Args:
            model: a causal language model.
            direction: a dense direction.
        """
        if self.covers == "linear":
            direction = restricted(direction, linear_weights(model))
        chosen = direction if self.rank is None else direction.low_rank(rank=self.rank)
        options: dict[str, Any] = {"compile": True} if self.compiled else {}
        self.scorer = Scorer(model, chosen, **options).__enter__()

    @property
    def notes(self) -> dict[str, Any]:
        """What ran: the way the model was called, and the backend of each op."""
        return {"ways": self.scorer.ways, "backends": self.scorer.backends}

    def prepare(self, batches: list[Batch]) -> list[Batch]:
        """Settle the scorer, and pack rows without padding where the model takes them so.

        Args:
            batches: packed rows.

        Returns:
            The batches to score.
        """
        return as_taken(self.scorer, batches)

    def score(self, prepared: list[Batch]) -> Scores:
        """Score batch by batch.

        Args:
            prepared: packed rows.

        Returns:
            Row's position -> score.
        """
        scores: list[torch.Tensor] = [self.scorer.score(padded(batch)).dot[:, 0].cpu() for batch in prepared]
        return by_position(prepared, scores)


class Rank16Compiled(Rank16):
    """The same with the model's layers through torch.compile; compiling is part of the warm-up, once a corpus."""

    batch_tokens = (2048,)
    compiled = True


class Dense(Rank16):
    """Every weight, the direction as it is."""

    rank = None


class Rank16Linear(Rank16):
    """The linear layers of the blocks alone, rank 16."""

    covers = "linear"


class DenseLinear(Rank16):
    """The linear layers of the blocks alone, the direction as it is."""

    covers, rank = "linear", None
