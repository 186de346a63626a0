"""The two-sided projection in CUDA C++: csrc/ghost_dot_lowrank for the sides, csrc/ghost_project for the examples."""

from __future__ import annotations

import torch

from gradshield_fast.ops import cuda
from gradshield_fast.ops.segments import held


def why_not(a: torch.Tensor, g: torch.Tensor, p_in: torch.Tensor, p_out: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        a: Float[Tensor, "tokens d_in"].
        g: Float[Tensor, "tokens d_out"].
        p_in: Float[Tensor, "d_in k_in"].
        p_out: Float[Tensor, "d_out k_out"].

    Returns:
        None where it can, else the reason.
    """
    return cuda.why_not(a, g, p_in, p_out)


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
        Float32[Tensor, "examples k_out k_in"].
    """
    right, left = cuda.thin_product(a, p_in), cuda.thin_product(g, p_out)
    cu = held(cu_seqlens, a.shape[0], a.device)
    out = torch.empty(cu.numel() - 1, left.shape[1], right.shape[1], dtype=torch.float32, device=a.device)
    cuda.launch("outer_sum", left, right, cu, out)
    return out
