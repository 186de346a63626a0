"""The ghost Gram matrix in Triton: the pairs of tokens of `ghost_norm_sq`, against each example of the second batch."""

from __future__ import annotations

import torch

from gradshield_fast.ops.ghost_norm_sq.kernel_triton import pair_terms
from gradshield_fast.ops.segments import held, segment_sum
from gradshield_fast.ops.triton_support import not_for_auto, why_not

__all__ = ["ghost_gram", "not_for_auto", "why_not"]

WORKSPACE = 1 << 26
"""Bytes of token terms [tokens1, examples2] that are held at once."""


def ghost_gram(
    a1: torch.Tensor, g1: torch.Tensor, cu1: torch.Tensor, a2: torch.Tensor, g2: torch.Tensor, cu2: torch.Tensor
) -> torch.Tensor:
    """s[n, m] = sum_{t in n} sum_{u in m} (a1[t] . a2[u]) (g1[t] . g2[u]), some examples of the second batch at a time.

    Args:
        a1: Float[Tensor, "tokens1 d_in"].
        g1: Float[Tensor, "tokens1 d_out"].
        cu1: Int[Tensor, "examples1+1"].
        a2: Float[Tensor, "tokens2 d_in"].
        g2: Float[Tensor, "tokens2 d_out"].
        cu2: Int[Tensor, "examples2+1"].

    Returns:
        Float32[Tensor, "examples1 examples2"].
    """
    tokens, examples = len(a1), cu2.numel() - 1
    bounds = held(cu2, len(a2), a1.device).int()[None, :].expand(tokens, -1)
    out = torch.zeros(cu1.numel() - 1, examples, device=a1.device, dtype=torch.float32)
    # a grid's third axis ends at 65535
    step = min(max(WORKSPACE // (4 * max(tokens, 1)), 1), 65535)
    for m in range(0, examples, step):
        end = min(m + step, examples)
        v = pair_terms((a1, g1, a2, g2), bounds[:, m:end], bounds[:, m + 1 : end + 1])
        out[:, m:end] = segment_sum(v, cu1)
    return out
