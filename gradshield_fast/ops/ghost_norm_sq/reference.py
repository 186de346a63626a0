"""The formulas of the ghost norm in plain PyTorch, one example at a time."""

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


def _gram(x: torch.Tensor, y: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """All products x[t] . y[u], where a vector of ids stands for one-hot rows.

    Args:
        x: Float[Tensor, "t d"] or Int[Tensor, "t"].
        y: Float[Tensor, "u d"] or Int[Tensor, "u"].
        dtype: dtype of the result.

    Returns:
        Float[Tensor, "t u"].
    """
    if x.ndim == 1 and y.ndim == 1:
        return (x[:, None] == y[None, :]).to(dtype)
    if x.ndim == 1:
        return y.to(dtype)[:, x].T
    if y.ndim == 1:
        return x.to(dtype)[:, y]
    return x.to(dtype) @ y.to(dtype).T


def ghost_inner(
    left1: torch.Tensor, right1: torch.Tensor, left2: torch.Tensor, right2: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """s[n] = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u]), in the cheaper of its two orders.

    Args:
        left1: Float[Tensor, "tokens rows"] or ids.
        right1: Float[Tensor, "tokens cols"] or ids.
        left2: like left1.
        right2: like right1.
        cu_seqlens: Int[Tensor, "examples+1"], row boundaries.

    Returns:
        Float[Tensor, "examples"].
    """
    factors = (left1, right1, left2, right2)
    dtype = accumulate_dtype(*(x for x in factors if x.is_floating_point()))
    out = torch.zeros(cu_seqlens.numel() - 1, dtype=dtype, device=left1.device)
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        l1, r1, l2, r2 = (x[start:end] for x in factors)
        tokens = end - start
        if all(x.ndim == 2 for x in factors) and tokens * (l1.shape[1] + r1.shape[1]) > l1.shape[1] * r1.shape[1]:
            first = l1.to(dtype).T @ r1.to(dtype)  # G[n] of this one example, gone at the end of the loop
            second = first if l2 is l1 and r2 is r1 else l2.to(dtype).T @ r2.to(dtype)
            out[n] = (first * second).sum()
        else:
            out[n] = (_gram(l1, l2, dtype) * _gram(r1, r2, dtype)).sum()
    return out
