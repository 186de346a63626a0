"""Attention on the CPU in types that our own kernels do not take: torch's flash attention, one row at a time.

Rows that need a window, a softcap or a scale that is not positive, for which that has no form, go by reference.py.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from gradshield_fast.ops.varlen_attention import reference


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why torch's attention cannot run.

    Args:
        inputs: q, k and v, and in the backward pass dout and out.

    Returns:
        None, or the reason.
    """
    if not hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu"):
        return f"torch {torch.__version__} has no flash attention for the CPU"
    wrong = next((x.dtype for x in inputs if x.dtype not in (torch.float32, torch.float16)), None)
    return None if wrong is None else f"needs float32 or float16, got {wrong}"


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute out = softmax(z) v, row by row.

    Args:
        q: Float[Tensor, "tokens heads d"].
        k: Float[Tensor, "tokens kv_heads d"].
        v: Float[Tensor, "tokens kv_heads d"].
        cu_seqlens: Int[Tensor, "rows+1"].
        scale: factor on the scores.
        window: how many last positions a query sees, or None.
        softcap: bound on the scores, or None.

    Returns:
        Float[Tensor, "tokens heads d"], and Float32[Tensor, "heads tokens"], log sum exp z.
    """
    if _by_formula(q, scale, window, softcap):
        return reference.forward(q, k, v, cu_seqlens, scale, window, softcap)
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32)
    for start, end in _rows(cu_seqlens):
        queries, keys, values = (_row(x, start, end, q.shape[1]) for x in (q, k, v))
        row, row_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, 0.0, True, scale=scale
        )
        out[start:end] = row[0].transpose(0, 1)
        lse[:, start:end] = row_lse[0]
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
    """The gradients, from scores that are made again.

    Args:
        dout: Float[Tensor, "tokens heads d"], gradient of out.
        q: Float[Tensor, "tokens heads d"].
        k: Float[Tensor, "tokens kv_heads d"].
        v: Float[Tensor, "tokens kv_heads d"].
        out: Float[Tensor, "tokens heads d"], from `forward`.
        lse: Float32[Tensor, "heads tokens"], from `forward`.
        cu_seqlens: Int[Tensor, "rows+1"].
        scale: factor on the scores.
        window: how many last positions a query sees, or None.
        softcap: bound on the scores, or None.

    Returns:
        The gradients of q, k and v, contiguous, in their dtypes.
    """
    if _by_formula(q, scale, window, softcap):
        return reference.backward(dout, q, k, v, out, lse, cu_seqlens, scale, window, softcap)
    heads, kv_heads = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for start, end in _rows(cu_seqlens):
        row = [_row(x, start, end, heads) for x in (dout, q, k, v, out)]
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *row, lse[None, :, start:end].contiguous(), 0.0, True, scale=scale
        )
        dq[start:end] = found[0][0].transpose(0, 1)
        for into, gradient in ((dk, found[1]), (dv, found[2])):
            # a key head's gradient is the sum over the heads that share it
            into[start:end] = gradient[0].unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1)
    return dq, dk, dv


def _by_formula(q: torch.Tensor, scale: float, window: int | None, softcap: float | None) -> bool:
    # torch's answers NaN to a negative scale
    return scale <= 0 or softcap is not None or (window is not None and window < q.shape[0])


def _rows(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    return [(start, end) for start, end in pairwise(cu_seqlens.tolist()) if end > start]


def _row(x: torch.Tensor, start: int, end: int, heads: int) -> torch.Tensor:
    """One row as [1, heads, tokens, d], a key's head repeated for the heads that share it."""
    return x[start:end].transpose(0, 1).repeat_interleave(heads // x.shape[1], 0)[None]
