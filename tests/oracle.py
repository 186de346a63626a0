"""The truth: autograd, one row at a time, written without anything of the package's scoring code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gradshield_fast import Direction
from gradshield_fast.lowrank import LowRank


@dataclass(frozen=True)
class Truth:
    """dot, size: [directions]; size is sum |G * r|, the scale of the promised bounds."""

    dot: torch.Tensor
    size: torch.Tensor
    norm: float
    loss: float


def row_truth(
    model: torch.nn.Module, direction: Direction, row: Mapping[str, torch.Tensor], *, reduction: str = "mean"
) -> Truth:
    """Loss gradient of one unpadded row by autograd, and its product with every direction."""
    weights = dict(model.named_parameters(remove_duplicate=False))
    flags = {name: weight.requires_grad for name, weight in weights.items()}
    training = model.training
    model.eval()
    try:
        for name in direction.names:
            weights[name].requires_grad_(True)
        logits = model(input_ids=row["input_ids"], use_cache=False).logits
        labels = row["labels"][:, 1:].reshape(-1)
        nll = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]), labels, ignore_index=-100, reduction="sum"
        )
        loss = nll / (labels != -100).sum() if reduction == "mean" else nll
        for name in direction.names:
            weights[name].grad = None
        loss.backward()
        grads = [weights[name].grad for name in direction.names]
    finally:
        for name in direction.names:
            weights[name].grad = None
        model.train(training)
        for name, flag in flags.items():
            weights[name].requires_grad_(flag)
    dot = torch.zeros(direction.count, dtype=torch.float64)
    size = torch.zeros(direction.count, dtype=torch.float64)
    square = 0.0
    for name, g in zip(direction.names, grads, strict=True):
        if g is None:
            continue
        square += float(g.double().square().sum())
        for k, part in enumerate(direction.parts):
            if name in part:
                entry = part[name]
                product = g.double() * (entry.dense() if isinstance(entry, LowRank) else entry).double()
                dot[k] += product.sum()
                size[k] += product.abs().sum()
    return Truth(dot, size, square**0.5, float(loss.detach()))
