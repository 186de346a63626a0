"""The formulas of attention over packed rows in plain PyTorch, a row at a time."""

from __future__ import annotations

from itertools import pairwise

import torch

from gradshield_fast.ops.checks import accumulate_dtype


def why_not(*inputs: torch.Tensor) -> None:
    """Say why this backend cannot run: it always can.

    Args:
        inputs: the op's tensors.
    """
    del inputs


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute out = softmax(z) v; products and softmax in float32, in float64 for float64.

    Args:
        q: Float[Tensor, "tokens heads d"].
        k: Float[Tensor, "tokens kv_heads d"].
        v: Float[Tensor, "tokens kv_heads d"].
        cu_seqlens: Int[Tensor, "rows+1"].
        scale: factor on the scores.
        window: how many last positions a query sees, or None.
        softcap: bound on the scores, or None.

    Returns:
        Float[Tensor, "tokens heads d"] in the dtype of q, and Float[Tensor, "heads tokens"], log sum exp z.
    """
    dtype = accumulate_dtype(q)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=dtype, device=q.device)
    for start, end in pairwise(cu_seqlens.tolist()):
        queries, keys, values = _grouped(k.shape[1], dtype, *(x[start:end] for x in (q, k, v)))
        z, _ = _scores(queries, keys, scale, window, softcap)
        row_lse = z.logsumexp(-1)
        rows = (z - row_lse[..., None]).exp_() @ values
        out[start:end] = rows.flatten(0, 1).transpose(0, 1)
        lse[:, start:end] = row_lse.flatten(0, 1)
    return out, lse


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute P = exp(z - lse), dz = P (dout v^T - rowsum(dout out)) z', and the gradients from them.

        dv = P^T dout,    dq = scale dz k,    dk = scale dz^T q            z': the softcap's derivative

    Args:
        dout: Float[Tensor, "tokens heads d"], gradient of out.
        q: Float[Tensor, "tokens heads d"].
        k: Float[Tensor, "tokens kv_heads d"].
        v: Float[Tensor, "tokens kv_heads d"].
        out: Float[Tensor, "tokens heads d"], from `forward`.
        lse: Float[Tensor, "heads tokens"], from `forward`.
        cu_seqlens: Int[Tensor, "rows+1"].
        scale: factor on the scores.
        window: how many last positions a query sees, or None.
        softcap: bound on the scores, or None.

    Returns:
        The gradients of q, k and v, contiguous, in their dtypes.
    """
    dtype, kv_heads = accumulate_dtype(q), k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for start, end in pairwise(cu_seqlens.tolist()):
        row = (x[start:end] for x in (q, k, v, dout, out))
        queries, keys, values, gradients, outs = _grouped(kv_heads, dtype, *row)
        z, slope = _scores(queries, keys, scale, window, softcap)
        p = (z - lse[:, start:end].unflatten(0, (kv_heads, -1))[..., None]).exp_()
        dz = p * (gradients @ values.mT - (gradients * outs).sum(-1, keepdim=True)) * scale
        dz = dz if slope is None else dz * slope
        dq[start:end] = (dz @ keys).flatten(0, 1).transpose(0, 1)
        dk[start:end] = (dz.flatten(1, 2).mT @ queries.flatten(1, 2)).transpose(0, 1)
        dv[start:end] = (p.flatten(1, 2).mT @ gradients.flatten(1, 2)).transpose(0, 1)
    return dq, dk, dv


def _grouped(kv_heads: int, dtype: torch.dtype, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Lay a row's tensors out as [kv_heads, heads that share one or 1, tokens, d]."""
    return [x.to(dtype).transpose(0, 1).unflatten(0, (kv_heads, -1)) for x in tensors]


def _scores(
    queries: torch.Tensor, keys: torch.Tensor, scale: float, window: int | None, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scores of a row, minus infinity where a key is not seen, and the softcap's derivative."""
    z = queries @ keys.mT * scale
    slope = None
    if softcap is not None:
        bent = torch.tanh(z / softcap)
        z, slope = softcap * bent, 1 - bent * bent
    seen = torch.ones(z.shape[-2:], dtype=torch.bool, device=z.device).tril_()
    if window is not None:
        seen = seen.triu_(1 - window)
    return z.masked_fill_(~seen, -torch.inf), slope
