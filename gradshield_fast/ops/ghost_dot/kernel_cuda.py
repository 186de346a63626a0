"""The ghost dot product in CUDA C++: csrc/ghost_dot."""

from __future__ import annotations

import torch

from gradshield_fast.ops import cuda

TOKENS, OUTPUTS = 128, 64
"""Tokens and outputs of a block; it leaves one part of its tokens' position terms."""

PARTS_LIMIT = 1 << 26
"""Parts that are kept at once (256 MiB): above, tokens are taken in turns."""


def why_not(a: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        a: Float[Tensor, "tokens d_in"].
        g: Float[Tensor, "tokens d_out"].
        r: Float[Tensor, "directions d_out d_in"].

    Returns:
        None where it can, else the reason.
    """
    return cuda.why_not(a, g, r)


def ghost_dot(a: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Position terms u[t, k] = g[t] . (r[k] a[t]); the [tokens, d_out] product stays in registers.

    Args:
        a: Float[Tensor, "tokens d_in"].
        g: Float[Tensor, "tokens d_out"].
        r: Float[Tensor, "directions d_out d_in"].

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    tokens, directions = a.shape[0], r.shape[0]
    tiles = -(-g.shape[1] // OUTPUTS)
    u = torch.empty(tokens, directions, dtype=torch.float32, device=a.device)
    cut = cuda.slices(-(-tokens // TOKENS) * tiles * directions, a.shape[1])
    step = max(1024, PARTS_LIMIT // max(1, cut * tiles * directions))
    for start in range(0, tokens, step):
        at = slice(start, min(start + step, tokens))
        left = cuda.parts(cut * tiles, at.stop - at.start, directions, like=a)
        cuda.launch("ghost_dot", a[at], g[at], r, left, u[at], cut)
    return u
