"""Autograd's own answer, one row at a time: what a plan is held against, and what `verify=True` compares with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradshield_fast.direction import Direction, Entry
from gradshield_fast.losses import Call, PaddedBatch, row_losses
from gradshield_fast.lowrank import LowRank
from gradshield_fast.ops.checks import accumulate_dtype


@dataclass(frozen=True)
class Truth:
    """Autograd's per-weight answer for each row of a batch.

    Attributes:
        loss: Float64[Tensor, "rows"], nats.
        dot: weight -> Float64[Tensor, "rows directions"], <G, r>.
        size: weight -> Float64[Tensor, "rows directions"], sum |G * r|: the scale of float error.
        spread: weight -> Float64[Tensor, "rows directions"], sqrt(sum (G * r)^2): the scale of a wrong rule's error.
        norm_sq: weight -> Float64[Tensor, "rows"], ||G||^2.
    """

    loss: torch.Tensor
    dot: dict[str, torch.Tensor]
    size: dict[str, torch.Tensor]
    spread: dict[str, torch.Tensor]
    norm_sq: dict[str, torch.Tensor]


def autograd_truth(model: torch.nn.Module, direction: Direction, batch: PaddedBatch, call: Call) -> Truth:
    """Score every row of a small batch by a backward pass of its own, with real weight gradients.

    Each weight's gradient is read and freed as soon as it is complete, so that one of them is alive at a time.
    The model must be frozen, in evaluation mode and without active hooks; flags and gradients are given back.

    Args:
        model: the model.
        direction: the directions.
        batch: the rows; a few, short ones.
        call: how the model is called.

    Returns:
        The truth.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    weights = {name: named[name] for name in direction.names}
    rows, count = batch.rows, direction.count

    def zeros(*shape: int) -> dict[str, torch.Tensor]:
        return {name: torch.zeros(*shape, dtype=torch.float64) for name in weights}

    truth = Truth(torch.zeros(rows), zeros(rows, count), zeros(rows, count), zeros(rows, count), zeros(rows))
    # sums run in float64; the products need no more than the model's own precision, and every weight passes here
    dtype = accumulate_dtype(*weights.values())
    row = 0

    def read(name: str, weight: torch.Tensor) -> None:
        g = weight.grad
        weight.grad = None
        if g is None:
            return
        g = g.to(dtype)
        truth.norm_sq[name][row] += _norm(g, 2).square()
        for k, part in enumerate(direction.parts):
            if name in part:
                product = g * _dense(part[name], g.device, dtype)
                truth.dot[name][row, k] += product.sum(dtype=torch.float64).cpu()
                truth.size[name][row, k] += _norm(product, 1)
                truth.spread[name][row, k] += _norm(product, 2)

    before = {name: weight.grad for name, weight in weights.items()}
    handles = []
    try:
        for name, weight in weights.items():
            weight.grad = None
            weight.requires_grad_(True)
            handles.append(
                weight.register_post_accumulate_grad_hook(lambda w, name=name: read(name, w))  # pyright: ignore
            )
        with torch.enable_grad():
            losses = row_losses(model, batch, call)
            for row in range(rows):
                if losses[row].requires_grad:
                    losses[row].backward(retain_graph=row + 1 < rows)
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(False)
            weight.grad = before[name]
    return Truth(losses.detach().double().cpu(), truth.dot, truth.size, truth.spread, truth.norm_sq)


def _norm(x: torch.Tensor, order: int) -> torch.Tensor:
    return torch.linalg.vector_norm(x, order, dtype=torch.float64).cpu()


def _dense(entry: Entry, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    there = entry.to(device, dtype)  # first: factors are multiplied out where that is fast
    return there.dense() if isinstance(there, LowRank) else there
