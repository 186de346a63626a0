"""The formula of the ghost Gram matrix in plain PyTorch."""

from __future__ import annotations

from itertools import pairwise

import torch

from gradshield_fast.ops.checks import accumulate_dtype
from gradshield_fast.ops.segments import segment_sum

BLOCK = 1024
"""Tokens of the second batch that are multiplied at once: the token products never exceed tokens1 x BLOCK."""


def why_not(*inputs: torch.Tensor) -> None:
    """Say why this backend cannot run: it always can.

    Args:
        inputs: the op's tensors.
    """
    del inputs


def ghost_gram(
    a1: torch.Tensor, g1: torch.Tensor, cu1: torch.Tensor, a2: torch.Tensor, g2: torch.Tensor, cu2: torch.Tensor
) -> torch.Tensor:
    """s[n, m] = sum_{t in n} sum_{u in m} (a1[t] . a2[u]) (g1[t] . g2[u]), an example of the second batch at a time.

    Args:
        a1: Float[Tensor, "tokens1 d_in"].
        g1: Float[Tensor, "tokens1 d_out"].
        cu1: Int[Tensor, "examples1+1"].
        a2: Float[Tensor, "tokens2 d_in"].
        g2: Float[Tensor, "tokens2 d_out"].
        cu2: Int[Tensor, "examples2+1"].

    Returns:
        Float[Tensor, "examples1 examples2"].
    """
    dtype = accumulate_dtype(a1, g1, a2, g2)
    a1, g1 = a1.to(dtype), g1.to(dtype)
    out = torch.zeros(cu1.numel() - 1, cu2.numel() - 1, dtype=dtype, device=a1.device)
    for m, (first, last) in enumerate(pairwise(cu2.tolist())):
        for start in range(first, last, BLOCK):
            part = slice(start, min(start + BLOCK, last))
            u = (a1 @ a2[part].to(dtype).T) * (g1 @ g2[part].to(dtype).T)
            out[:, m] += segment_sum(u.sum(1), cu1)
    return out
