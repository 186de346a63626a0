"""The output head's share of a sketch, from the hidden states alone: its output gradient exists a block at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gradshield_fast.sketches import Sketch

BLOCK = 1 << 22
"""Logits that exist at a time."""


def add_head(
    sketch: Sketch,
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weight: torch.Tensor,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> None:
    """Add the head's use of its weight to a sketch, without the logits.

        y[t, v] = h[t] . W[v],    z = scale * y,    z' = softcap * tanh(z / softcap)   (z' = z without a softcap)
        g[t, v] = w[t] * (softmax(z'[t])[v] - [v = label[t]]) * dz'/dy,    G = sum_t g[t] h[t]^T

    in two sweeps over blocks of the vocabulary, the first for the softmax's denominator. As in `linear_cross_entropy`,
    softmax - 1 of a label is taken as minus the sum of the others, so that a small gradient keeps its digits.

    Args:
        sketch: what G is multiplied with, and where the product goes.
        h: Float[Tensor, "tokens d"], hidden states entering the head.
        weight: Float[Tensor, "vocabulary d"].
        labels: Int64[Tensor, "tokens"], the token to predict.
        token_weight: Float[Tensor, "tokens"], factor of each position's gradient.
        scale: factor on the logits.
        softcap: bound on the logits, or None.
    """
    dtype = sketch.columns.dtype
    h, labels, token_weight = h.detach().to(dtype), labels[:, None], token_weight.detach().to(dtype)[:, None]
    others = torch.full_like(token_weight, -torch.inf)
    chosen = torch.zeros_like(token_weight)
    for start, z, _ in _logits(h, weight, scale, softcap):
        here = torch.arange(start, start + z.shape[1], device=z.device) == labels
        chosen += z.masked_fill(~here, 0).sum(1, keepdim=True)
        others = torch.logaddexp(others, z.masked_fill_(here, -torch.inf).logsumexp(1, keepdim=True))
    total = torch.logaddexp(others, chosen)
    z_right = h @ sketch.columns if sketch.right else None
    z_left = torch.zeros(len(h), sketch.columns.shape[1], dtype=dtype, device=h.device)
    for start, z, slope in _logits(h, weight, scale, softcap):
        end = start + z.shape[1]
        here = torch.arange(start, end, device=z.device) == labels
        g = torch.where(here, -torch.exp(others - total), torch.exp(z - total)).mul_(token_weight).mul_(slope)
        if z_right is not None:
            sketch.add_at(start, g.T @ z_right)
        else:
            z_left += g @ sketch.columns[start:end]
    if not sketch.right:
        sketch.add(h.T @ z_left)


def _logits(
    h: torch.Tensor, weight: torch.Tensor, scale: float, softcap: float | None
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | float]]:
    """First id, logits z' and dz'/dy of one block of the vocabulary after another."""
    block = max(64, BLOCK // max(1, len(h)))
    for start in range(0, len(weight), block):
        z = (h @ weight[start : start + block].detach().to(h.dtype).T).mul_(scale)
        if softcap is None:
            yield start, z, scale
        else:
            z = torch.tanh_(z / softcap)
            yield start, z * softcap, (1 - z.square()) * scale
