"""The fused head and loss in plain PyTorch: two passes over blocks of the vocabulary."""

from __future__ import annotations

import torch

from gradshield_fast.ops.checks import accumulate_dtype

BLOCK = 8192
"""Rows of the head that are multiplied at once."""


def why_not(*inputs: torch.Tensor | None) -> None:
    """Say why this backend cannot run: it always can.

    Args:
        inputs: the op's tensors.
    """
    del inputs


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weight: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    r: torch.Tensor | None,
    p: torch.Tensor | None,
    q: torch.Tensor | None,
    member: torch.Tensor | None,
    exact: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses, dh and the head's position terms; the formulas are in api.py.

    Args:
        h: Float[Tensor, "tokens d"].
        weight: Float[Tensor, "vocabulary d"].
        labels: Int64[Tensor, "tokens"], -100 where there is no loss.
        token_weight: Float[Tensor, "tokens"] or None.
        scale: factor on the logits.
        softcap: bound on the logits, or None.
        r: Float[Tensor, "directions vocabulary d"] or None.
        p: Float[Tensor, "vocabulary ranks"] or None.
        q: Float[Tensor, "d ranks"] or None.
        member: Float[Tensor, "ranks directions"], 1 where column j belongs to direction k, else 0; or None.
        exact: no matter here: the truth that the others are held against is the same either way.

    Returns:
        Float[Tensor, "tokens"], Float[Tensor, "tokens d"], and Float[Tensor, "tokens directions"] or None.
    """
    del exact
    given = [x for x in (h, weight, token_weight, r, p, q) if x is not None]
    dtype = accumulate_dtype(*given)
    h = h.to(dtype)
    live = labels >= 0
    label = labels.clamp_min(0)

    def logits(start: int) -> tuple[torch.Tensor, torch.Tensor]:
        y = h @ weight[start : start + BLOCK].to(dtype).T * scale
        return (y, torch.full_like(y, scale)) if softcap is None else _capped(y, scale, softcap)

    # pass 1: log of the sum over every word but the label, so that a sure model's small loss keeps its digits
    own_y = (h * weight[label].to(dtype)).sum(1) * scale
    own_y = own_y if softcap is None else _capped(own_y, scale, softcap)[0]
    others = h.new_full(label.shape, -torch.inf)
    for start in range(0, weight.shape[0], BLOCK):
        y = _without(logits(start)[0], label, start)
        others = torch.logaddexp(others, y.logsumexp(1))
    loss = torch.nn.functional.softplus(others - own_y, threshold=40.0).masked_fill(~live, 0)
    total = own_y + loss

    # pass 2: the gradient a block at a time
    share = torch.where(live, 1.0 if token_weight is None else token_weight.to(dtype), 0.0).to(dtype)
    dh = torch.zeros_like(h)
    dot = None if r is None else h.new_zeros(h.shape[0], r.shape[0])
    pulled = None if p is None else h.new_zeros(h.shape[0], p.shape[1])
    for start in range(0, weight.shape[0], BLOCK):
        y, slope = logits(start)
        g = (_without(y, label, start) - total[:, None]).exp()
        g += torch.where(_is_label(y, label, start), -(others - total).exp()[:, None], 0.0)
        g *= slope * share[:, None]
        part = slice(start, start + BLOCK)
        dh += g @ weight[part].to(dtype)
        if r is not None and dot is not None:
            for k in range(r.shape[0]):
                dot[:, k] += torch.einsum("tv,tv->t", g, h @ r[k, part].to(dtype).T)
        if p is not None and pulled is not None:
            pulled += g @ p[part].to(dtype)
    if pulled is not None and q is not None and member is not None:
        dot = (pulled * (h @ q.to(dtype))) @ member.to(dtype)
    return loss, dh, dot


def _capped(z: torch.Tensor, scale: float, softcap: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Give softcap * tanh(z / softcap), and its derivative with respect to the product before the scale."""
    bent = torch.tanh(z / softcap)
    return softcap * bent, scale * (1 - bent * bent)


def _is_label(y: torch.Tensor, label: torch.Tensor, start: int) -> torch.Tensor:
    """Where the block's columns are the positions' labels."""
    return torch.arange(start, start + y.shape[1], device=y.device) == label[:, None]


def _without(y: torch.Tensor, label: torch.Tensor, start: int) -> torch.Tensor:
    """The block with minus infinity in the place of each position's label."""
    return y.masked_fill(_is_label(y, label, start), -torch.inf)
