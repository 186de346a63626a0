"""What a peer is: a way to score rows against a direction, behind the same three calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from gradshield_fast import Direction
from gradshield_fast.packing import Batch

Scores = dict[int, float]
"""A row's position -> <grad loss, r>, r restricted to the weights that the peer covers."""


class Peer(Protocol):
    """A way to score. It is made once a process, out of a model it may change and a dense direction.

    Attributes:
        covers: "all" weights, or the "linear" layers of the blocks alone.
        batch_tokens: bounds on a batch's tokens worth trying; the fastest is kept. 1 gives batches of one row.
    """

    covers: str
    batch_tokens: Sequence[int]

    def prepare(self, batches: list[Batch]) -> Any:
        """Bring batches into the form that the peer reads, and its query to where it wants it; not timed.

        Args:
            batches: packed rows.

        Returns:
            Whatever `score` takes.
        """
        ...

    def score(self, prepared: Any) -> Scores:
        """Score every row; timed.

        Args:
            prepared: what `prepare` returned.

        Returns:
            The scores.
        """
        ...


def device_of(model: torch.nn.Module) -> torch.device:
    """Say where a model is.

    Args:
        model: any model with weights.

    Returns:
        The device of its first weight.
    """
    return next(model.parameters()).device


def entries_of(direction: Direction) -> dict[str, torch.Tensor]:
    """Give the tensors of a dense direction.

    Args:
        direction: a single direction.

    Returns:
        Weight's name -> Float32[Tensor, "<the weight's shape>"].
    """
    return {name: entry for name, entry in direction.parts[0].items() if isinstance(entry, torch.Tensor)}


def tensors(batch: Batch, model: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Give a batch as tensors where the model is.

    Args:
        batch: packed rows, padded on the right; with causal attention no mask is needed.
        model: the model that will read them.

    Returns:
        input_ids and labels, Int64[Tensor, "rows tokens"].
    """
    where = device_of(model)
    return torch.from_numpy(batch.input_ids).to(where), torch.from_numpy(batch.labels).to(where)


def by_position(batches: list[Batch], scores: list[torch.Tensor]) -> Scores:
    """Put scores of batches back to their rows.

    Args:
        batches: packed rows.
        scores: one vector a batch, rows in its order.

    Returns:
        Row's position -> score.
    """
    positions = [position for batch in batches for position in batch.positions.tolist()]
    return dict(zip(positions, torch.cat(scores).double().tolist(), strict=True))
