"""Signature, checks and dispatch of the fused head and loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch, library
from gradshield_fast.ops.ghost_dot_lowrank.api import membership
from gradshield_fast.ops.linear_cross_entropy import kernel_native, kernel_triton, reference

OP = "linear_cross_entropy"
BACKENDS = dispatch.register(OP, {"native": kernel_native, "triton": kernel_triton, "reference": reference})

IGNORE = -100
LARGEST = torch.finfo(torch.float32).max


def _run(
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
    exact: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if labels.device.type == "cpu" and labels.numel():
        low, high = (int(x) for x in labels.aminmax())
        if high >= weight.shape[0] or (low < 0 and bool(((labels < 0) & (labels != IGNORE)).any())):
            raise InputError(f"{OP}: labels must be -100 or lie in 0..{weight.shape[0] - 1}, got {low}..{high}")
    args = (h, weight, labels.long(), token_weight, scale, softcap, r, p, q, member, exact)
    loss, dh, dot = dispatch.run(OP, backend, OP, (h, weight, r, p, q, token_weight), *args)
    dot = loss.new_empty((loss.shape[0], 0)) if dot is None else dot
    masked = (labels < 0)[:, None]  # they give nothing, whatever stands there: 0 * NaN would
    return loss, dh.masked_fill_(masked, 0), dot.masked_fill_(masked, 0)


def _shape(
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
    exact: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    del labels, scale, softcap, exact, backend
    dtype = checks.accumulate_dtype(*(x for x in (h, weight, token_weight, r, p, q) if x is not None))
    directions = r.shape[0] if r is not None else 0 if member is None else member.shape[1]
    tokens, d = h.shape
    return tuple(h.new_empty(size, dtype=dtype) for size in ((tokens,), (tokens, d), (tokens, directions)))  # type: ignore[return-value]


_head = library.define(
    OP,
    "(Tensor h, Tensor weight, Tensor labels, Tensor? token_weight, float scale, float? softcap, "
    "Tensor? r, Tensor? p, Tensor? q, Tensor? member, bool exact, str backend) -> (Tensor, Tensor, Tensor)",
    _run,
    _shape,
)


class HeadLoss(NamedTuple):
    """What the head gives for each position.

    Attributes:
        loss: Float32[Tensor, "tokens"], negative log-likelihood of the label, in nats; 0 where it is -100.
        dh: Float32[Tensor, "tokens d"], token_weight[t] * d loss[t] / d h[t].
        dot: Float32[Tensor, "tokens directions"], the head's position terms g[t] . (r h[t]); None without directions.
    """

    loss: torch.Tensor
    dh: torch.Tensor
    dot: torch.Tensor | None


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    r: torch.Tensor | None = None,
    p: torch.Tensor | None = None,
    q: torch.Tensor | None = None,
    ranks: Sequence[int] | None = None,
    exact: bool = True,
    backend: str = "auto",
) -> HeadLoss:
    """Loss, its gradient at the hidden state and the head's ghost dot, in blocks of the vocabulary.

        y[t, v] = h[t] . W[v],    z = scale * y,    z' = softcap * tanh(z / softcap)   (z' = z without a softcap)
        loss[t] = log sum_v exp z'[t, v] - z'[t, label[t]]
        g[t, v] = w[t] * (softmax(z'[t])[v] - [v = label[t]]) * dz'/dy,    dh[t] = sum_v g[t, v] W[v]
        dot[t, k] = sum_v g[t, v] (r_k[v] . h[t])                          r_k dense, or p_k q_k^T

    The logits [tokens, vocabulary] and their gradient exist a block at a time. For a label that the model is sure of,
    softmax - 1 would cancel: it is taken as minus the sum of the others, so that a small gradient keeps its digits.

    With `exact=False` and a 16-bit h and weight, a backend may round g[t, v] to bfloat16 on its way into dh and dot, as
    PyTorch's own backward pass does. Rounding to the nearest moves a term by 2^-8 = eps(bfloat16) / 2 of its size at
    most, and a backend may round a term twice; sums stay in float32. So beside what `exact=True` allows,

        |error of dh[t]| <= eps(bfloat16) sum_v |g[t, v]| |W[v]|
        |error of dot[t, k]| <= eps(bfloat16) sum_v |g[t, v]| (|r_k[v]| . |h[t]|),    eps(bfloat16) = 2^-7

    and beside both 1e-9 token_weight[t] for each word: where the model is all but sure of its label, a rounded gradient
    may lose its relative accuracy, which the exact one keeps. The loss stays exact.

    Args:
        h: Float[Tensor, "tokens d"], hidden states entering the head; positions without a loss are best left out.
        weight: Float[Tensor, "vocabulary d"], the head's weight; a head with a bias is not handled.
        labels: Int64[Tensor, "tokens"], the token to predict at each position (already shifted); -100: no loss.
        token_weight: Float32[Tensor, "tokens"], factor of each position's gradient, such as 1 / the row's response
            tokens; None: 1. It does not enter `loss`.
        scale: factor on the logits, before the softcap.
        softcap: soft bound on the logits; None: none.
        r: Float[Tensor, "directions vocabulary d"], dense directions on `weight`.
        p: Float[Tensor, "vocabulary ranks"], output sides of low-rank directions side by side; not with `r`.
        q: Float[Tensor, "d ranks"], their input sides.
        ranks: columns of each low-rank direction, summing to p.shape[1]; None: all columns are one direction.
        exact: False lets 16-bit inputs be multiplied as a 16-bit model's own layers are; float32 inputs stay exact.
        backend: "auto" or a backend's name.

    Returns:
        `HeadLoss`; float64 where an input is float64.

    Raises:
        InputError: a shape, dtype or device disagrees, a label is not in the vocabulary, or both kinds of direction
            are given.
        BackendUnavailable: the named backend cannot run these inputs.

    Source: arXiv:2411.09009 (the loss without stored logits); the head's ghost dot is arXiv:2406.11011's.
    """
    for name, x in (("h", h), ("weight", weight)):
        checks.need_matrix(OP, name, x)
    if h.shape[1] != weight.shape[1]:
        raise InputError(f"{OP}: weight must have d={h.shape[1]} columns (from h), got {tuple(weight.shape)}")
    checks.need_index(OP, "labels", labels)
    tokens = checks.need_same_tokens(OP, h=h, labels=labels)
    checks.need_one_device(OP, h=h, weight=weight)
    if tokens and weight.shape[0] == 0:
        raise InputError(f"{OP}: weight has no rows, so no label can be predicted")
    if token_weight is not None:
        checks.need_float(OP, "token_weight", token_weight)
        if token_weight.shape != (tokens,):
            raise InputError(
                f"{OP}: token_weight must be a float vector of {tokens} tokens (from h), "
                f"got {tuple(token_weight.shape)}"
            )
        checks.need_one_device(OP, h=h, token_weight=token_weight)
    if not abs(scale) <= LARGEST:
        raise InputError(f"{OP}: scale must be finite in float32, got {scale}")
    if softcap is not None and not 0 < softcap <= LARGEST:
        raise InputError(f"{OP}: softcap must be positive and finite in float32, or None, got {softcap}")
    member = _check_directions(h, weight, r, p, q, ranks)
    loss, dh, dot = _head(h, weight, labels, token_weight, scale, softcap, r, p, q, member, exact, backend)
    return HeadLoss(loss, dh, None if r is None and p is None else dot)


def _check_directions(
    h: torch.Tensor,
    weight: torch.Tensor,
    r: torch.Tensor | None,
    p: torch.Tensor | None,
    q: torch.Tensor | None,
    ranks: Sequence[int] | None,
) -> torch.Tensor | None:
    """Check the directions and say which column of p and q belongs to which.

    Returns:
        Float[Tensor, "ranks directions"], or None without low-rank directions.
    """
    if (p is None) != (q is None) or (r is not None and p is not None) or (ranks is not None and p is None):
        raise InputError(f"{OP}: give directions as r, or as p with q (and ranks), or none; got a mixture")
    if r is not None:
        checks.need_float(OP, "r", r)
        if r.ndim != 3 or r.shape[1:] != weight.shape:
            raise InputError(
                f"{OP}: r must be [directions, vocabulary, d] with {tuple(weight.shape)} (from weight), "
                f"got {tuple(r.shape)}"
            )
        checks.need_one_device(OP, h=h, r=r)
    if p is None or q is None:
        return None
    checks.need_matrix(OP, "p", p)
    checks.need_matrix(OP, "q", q)
    checks.need_one_device(OP, h=h, p=p, q=q)
    if p.shape[0] != weight.shape[0] or q.shape[0] != h.shape[1] or p.shape[1] != q.shape[1]:
        raise InputError(
            f"{OP}: p must be [vocabulary, ranks] and q [d, ranks] with vocabulary={weight.shape[0]} and "
            f"d={h.shape[1]}, got {tuple(p.shape)} and {tuple(q.shape)}"
        )
    ranks = [p.shape[1]] if ranks is None else ranks
    if sum(ranks) != p.shape[1] or min(ranks, default=0) < 0:
        raise InputError(f"{OP}: ranks must sum to the {p.shape[1]} columns of p, got {list(ranks)}")
    return membership(ranks, q)
