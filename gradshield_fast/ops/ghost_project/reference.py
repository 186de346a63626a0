"""The formula of the two-sided projection in plain PyTorch."""

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


def ghost_project(
    a: torch.Tensor, g: torch.Tensor, p_in: torch.Tensor, p_out: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """s[n] = (g_n p_out)^T (a_n p_in), both sides projected for all tokens first.

    Args:
        a: Float[Tensor, "tokens d_in"].
        g: Float[Tensor, "tokens d_out"].
        p_in: Float[Tensor, "d_in k_in"].
        p_out: Float[Tensor, "d_out k_out"].
        cu_seqlens: Int[Tensor, "examples+1"].

    Returns:
        Float[Tensor, "examples k_out k_in"].
    """
    dtype = accumulate_dtype(a, g, p_in, p_out)
    right, left = a.to(dtype) @ p_in.to(dtype), g.to(dtype) @ p_out.to(dtype)
    out = right.new_zeros(cu_seqlens.numel() - 1, left.shape[1], right.shape[1])
    for n, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        torch.mm(left[start:end].T, right[start:end], out=out[n])
    return out
