"""Forward passes that score nothing: what the device can do with the rows and the model at all.

Each gives every row's loss. The fastest is the yardstick for scoring, which has a backward pass to do on top.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.workload import IGNORE, row_losses
from gradshield_fast.packing import Batch
from gradshield_fast.repeated import reclassed, repeated_layers, with_forward

Forward = Callable[[], list[torch.Tensor]]


def forwards(model: Any, batches: Sequence[Batch], *, compiled: bool) -> dict[str, Forward]:
    """Make the variants.

    Args:
        model: a causal language model.
        batches: packed rows.
        compiled: also one whose layers go through torch.compile; one layer is compiled for all of them.

    Returns:
        Variant -> a function that runs all batches and gives each one's losses, Float32[Tensor, "rows"].
    """
    where = next(model.parameters()).device
    pairs = [(torch.from_numpy(b.input_ids).to(where), torch.from_numpy(b.labels).to(where)) for b in batches]

    @torch.inference_mode()
    def stock() -> list[torch.Tensor]:
        return [row_losses(model(input_ids=ids, use_cache=False).logits, labels) for ids, labels in pairs]

    @torch.no_grad()  # compiled code is made once for both modes, and inference tensors may not mix with others
    def response_only() -> list[torch.Tensor]:
        head = model.get_output_embeddings()
        return [_response_losses(model.base_model, head, ids, labels) for ids, labels in pairs]

    layers = list(repeated_layers(model).values())
    kinds = {kind: with_forward(kind, torch.compile(kind.forward, dynamic=True)) for kind in {type(x) for x in layers}}

    def by_compiled_layers() -> list[torch.Tensor]:
        with reclassed({layer: kinds[type(layer)] for layer in layers}, {}):
            return response_only()

    out: dict[str, Forward] = {"stock": stock, "head on response tokens": response_only}
    return out | ({"compiled, head on response tokens": by_compiled_layers} if compiled else {})


def _response_losses(base: Any, head: Any, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    row, column = (labels[:, 1:] != IGNORE).nonzero(as_tuple=True)
    hidden = base(input_ids=ids, use_cache=False).last_hidden_state
    nll = torch.nn.functional.cross_entropy(
        head(hidden[row, column]).float(), labels[row, column + 1], reduction="none"
    )
    sums = torch.zeros(len(ids), device=ids.device).index_add_(0, row, nll)
    return sums / torch.bincount(row, minlength=len(ids))
