"""The formulas of the low-rank ghost dot product in plain PyTorch."""

from __future__ import annotations

import torch

from gradshield_fast.ops.checks import accumulate_dtype


def why_not(*inputs: torch.Tensor) -> None:
    """Say why this backend cannot run: it always can.

    Args:
        inputs: the op's tensors.
    """
    del inputs


def lowrank_project(a: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """z[t, j] = q[:, j] . a[t].

    Args:
        a: Float[Tensor, "tokens d_in"].
        q: Float[Tensor, "d_in ranks"].

    Returns:
        Float[Tensor, "tokens ranks"], float32 (float64 for float64 inputs).
    """
    dtype = accumulate_dtype(a, q)
    return a.to(dtype) @ q.to(dtype)


def lowrank_contract(z: torch.Tensor, g: torch.Tensor, p: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """u[t, k] = sum_{j of direction k} z[t, j] (p[:, j] . g[t]).

    Args:
        z: Float[Tensor, "tokens ranks"].
        g: Float[Tensor, "tokens d_out"].
        p: Float[Tensor, "d_out ranks"].
        member: Float[Tensor, "ranks directions"], 1 where column j belongs to direction k, else 0.

    Returns:
        Float[Tensor, "tokens directions"].
    """
    dtype = accumulate_dtype(z, g, p)
    terms = z.to(dtype) * (g.to(dtype) @ p.to(dtype))
    # a product with zeros and ones: exact, and it sums blocks of unequal width in one call
    return terms @ member.to(dtype)
