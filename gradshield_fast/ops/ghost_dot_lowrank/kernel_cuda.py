"""The two halves of the low-rank ghost dot product in CUDA C++: csrc/ghost_dot_lowrank."""

from __future__ import annotations

import torch

from gradshield_fast.ops import cuda

RANKS = 32
"""Ranks of a block."""


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: a and q, or z, g and p.

    Returns:
        None where it can, else the reason.
    """
    return cuda.why_not(*inputs)


def lowrank_project(a: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """z[t, j] = q[:, j] . a[t].

    Args:
        a: Float[Tensor, "tokens d_in"].
        q: Float[Tensor, "d_in ranks"].

    Returns:
        Float32[Tensor, "tokens ranks"].
    """
    return cuda.thin_product(a, q)


def lowrank_contract(z: torch.Tensor, g: torch.Tensor, p: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """u[t, k] = sum_{j of direction k} z[t, j] (p[:, j] . g[t]); the [tokens, ranks] product stays in registers.

    Args:
        z: Float[Tensor, "tokens ranks"].
        g: Float[Tensor, "tokens d_out"].
        p: Float[Tensor, "d_out ranks"].
        member: Float[Tensor, "ranks directions"], 1 where column j belongs to direction k, else 0.

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    tokens, ranks, directions = g.shape[0], p.shape[1], member.shape[1]
    cut = cuda.thin_slices(tokens, ranks, g.shape[1])
    u = torch.empty(tokens, directions, dtype=torch.float32, device=g.device)
    left = cuda.parts(cut * -(-ranks // RANKS), tokens, directions, like=g)
    cuda.launch("lowrank_contract", z.float(), g, cuda.factor(p), member.float(), left, u, cut)
    return u
