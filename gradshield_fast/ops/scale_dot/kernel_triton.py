"""The scale's and the bias's ghost dot product in Triton: one pass over both inputs."""

from __future__ import annotations

import torch

from gradshield_fast.ops.triton_support import Tiling, blocks_of, jit, launch, not_for_auto, power_of_two, tl, why_not
from gradshield_fast.ops.triton_tuning import tilings, tuned

__all__ = ["not_for_auto", "scale_dot", "why_not"]

ROWS = Tiling({"BLOCK_T": 4, "BLOCK_D": 256}, warps=4, stages=2, shared=8 * 1024, registers=72)
# the axis of the sum is shared by a block's threads: any other block or number of warps adds in another order
OF_ROWS = tilings(
    (ROWS, ROWS.but(stages=3)),
    (ROWS.but({"BLOCK_T": 2, "BLOCK_D": 512}),),
    (ROWS.but({"BLOCK_T": 1, "BLOCK_D": 1024}),),
)
TILINGS = (OF_ROWS,)
MAX_DIRECTIONS = 4
"""Directions that one pass over x_hat and g serves."""


# Maths    u[t, k] = sum_i g[t, i] x_hat[t, i] r[k, i]              one program = BLOCK_T tokens, BLOCK_K directions
# Traffic  g, x_hat: K/BLOCK_K reads; r: tokens/BLOCK_T reads, from the L2; u: 4 K B per token
@jit(fixed=("tokens",))
def scale_dot_kernel(
    x_hat,
    g,
    r,
    u,
    tokens,
    width,
    directions,
    stride_x_t,
    stride_x_i,
    stride_g_t,
    stride_g_i,
    stride_r_k,
    stride_r_i,
    BIAS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the position terms of a block of tokens for a block of directions."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_t, m_k, o_i = o_t < tokens, o_k < directions, tl.arange(0, BLOCK_D)
    b_u = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for i in range(0, width, BLOCK_D):
        m_i = i + o_i < width
        i_i = (i + o_i).to(tl.int64)
        m_ti = m_t[:, None] & m_i[None, :]
        b_g = tl.load(g + o_t[:, None] * stride_g_t + i_i[None, :] * stride_g_i, mask=m_ti, other=0.0).to(tl.float32)
        if not BIAS:
            x_p = x_hat + o_t[:, None] * stride_x_t + i_i[None, :] * stride_x_i
            b_g *= tl.load(x_p, mask=m_ti, other=0.0).to(tl.float32)
        r_p = r + o_k[:, None] * stride_r_k + i_i[None, :] * stride_r_i
        b_r = tl.load(r_p, mask=m_k[:, None] & m_i[None, :], other=0.0).to(tl.float32)
        b_u += tl.sum(b_g[:, None, :] * b_r[None, :, :], axis=2)
    tl.store(u + o_t[:, None] * directions + o_k[None, :], b_u, mask=m_t[:, None] & m_k[None, :])


def scale_dot(x_hat: torch.Tensor | None, g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Position terms u[t, k] = sum_i g[t, i] x_hat[t, i] r[k, i]; x_hat = 1 where it is None.

    Args:
        x_hat: Float[Tensor, "tokens d"] or None.
        g: Float[Tensor, "tokens d"].
        r: Float[Tensor, "directions d"].

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    return tuned(
        scale_dot_kernel.__name__ if x_hat is not None else "scale_dot_kernel, bias",
        OF_ROWS,
        (g, r),
        lambda x: _run(x_hat, g, r, x),
    )


def _run(x_hat: torch.Tensor | None, g: torch.Tensor, r: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    (tokens, width), directions = g.shape, r.shape[0]
    block_k = power_of_two(directions, 1, MAX_DIRECTIONS)
    u = torch.empty(tokens, directions, device=g.device, dtype=torch.float32)
    x = g if x_hat is None else x_hat
    launch(
        scale_dot_kernel, (blocks_of(tokens, tiling.blocks["BLOCK_T"]), blocks_of(directions, block_k)), tiling,
        x, g, r, u, tokens, width, directions, *x.stride(), *g.stride(), *r.stride(),
        BIAS=x_hat is None, BLOCK_K=block_k,
    )  # fmt: skip
    return u
