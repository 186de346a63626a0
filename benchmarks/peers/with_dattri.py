"""dattri (PyPI): its TracIn attributor, per-row gradients by vmap over all weights, our direction as the test gradient.

A target function whose gradient is the direction, <w, r>, makes the attributor's own product the score.
"""

from __future__ import annotations

from typing import Any

import torch
from dattri.algorithm.tracin import TracInAttributor  # pyright: ignore[reportMissingImports]
from dattri.task import AttributionTask  # pyright: ignore[reportMissingImports]
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.peers.peer import Scores, by_position, device_of, entries_of, tensors
from benchmarks.workload import row_losses
from gradshield_fast import Direction
from gradshield_fast.packing import Batch


class Exact:
    """The attributor without its random projection, which its options cannot turn off: an attribute is set."""

    covers = "all"
    batch_tokens = (1, 512)

    def __init__(self, model: Any, direction: Direction) -> None:
        """Describe the task as dattri asks for it.

        Args:
            model: a causal language model.
            direction: a dense direction over every weight.
        """
        self.model = model.requires_grad_(True)
        model.set_attn_implementation("eager")  # vmap takes fused attention apart, row by row
        where = device_of(model)
        dtype = next(model.parameters()).dtype  # what its gradient would have
        r = {name: entry.to(where, dtype) for name, entry in entries_of(direction).items()}

        def loss(weights: dict[str, torch.Tensor], row: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            ids, labels = row
            logits = functional_call(model, weights, (ids[None],), {"use_cache": False}).logits
            return row_losses(logits, labels[None])[0]

        def target(weights: dict[str, torch.Tensor], _: Any) -> torch.Tensor:
            return torch.stack([(weights[name] * entry).sum() for name, entry in r.items()]).sum()

        task = AttributionTask(
            loss_func=loss,
            target_func=target,
            model=model,
            checkpoints=model.state_dict(),
            checkpoints_load_func=lambda m, _: m.eval(),
        )
        self.attributor = TracInAttributor(
            task=task, weight_list=torch.ones(1), normalized_grad=False, device=str(where)
        )
        self.attributor.projector_kwargs = None
        self.query = DataLoader(TensorDataset(torch.zeros(1, 1)), batch_size=1)

    def prepare(self, batches: list[Batch]) -> tuple[list[Batch], list[Any]]:
        """Make a loader a batch, since dattri's loaders hold rows of one length.

        Args:
            batches: packed rows.

        Returns:
            The batches and their loaders.
        """
        pairs = (tensors(batch, self.model) for batch in batches)
        return batches, [DataLoader(TensorDataset(*pair), batch_size=len(pair[0])) for pair in pairs]

    def score(self, prepared: tuple[list[Batch], list[Any]]) -> Scores:
        """Score batch by batch.

        Args:
            prepared: from `prepare`.

        Returns:
            Row's position -> score.
        """
        batches, loaders = prepared
        return by_position(batches, [self.attributor.attribute(loader, self.query)[:, 0] for loader in loaders])
