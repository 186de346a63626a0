"""The embedding's ghost dot product in Triton: a gather of the table's rows and one pass over the gradient."""

from __future__ import annotations

import torch

from gradshield_fast.ops.triton_support import Tiling, blocks_of, jit, launch, not_for_auto, power_of_two, tl, why_not
from gradshield_fast.ops.triton_tuning import tilings, tuned

__all__ = ["embedding_dot", "not_for_auto", "why_not"]

ROWS = Tiling({"BLOCK_T": 4, "BLOCK_D": 256}, warps=4, stages=2, shared=8 * 1024, registers=104)
# the axis of the sum is shared by a block's threads: any other block or number of warps adds in another order
OF_ROWS = tilings(
    (ROWS, ROWS.but(stages=3)),
    (ROWS.but({"BLOCK_T": 8}, registers=176),),
    (ROWS.but({"BLOCK_T": 2, "BLOCK_D": 512}),),
    (ROWS.but({"BLOCK_T": 1, "BLOCK_D": 1024}),),
)
TILINGS = (OF_ROWS,)
MAX_DIRECTIONS = 4
"""Directions that one pass over g serves."""


# Maths    u[t, k] = sum_i g[t, i] r[k, ids[t], i]                  one program = BLOCK_T tokens, BLOCK_K directions
# Traffic  ids: 8 B per token; g: K/BLOCK_K reads; of r the rows that ids name, 1 read per token; u: 4 K B per token
@jit(fixed=("tokens",))
def embedding_dot_kernel(
    ids,
    g,
    r,
    u,
    tokens,
    width,
    vocabulary,
    directions,
    stride_ids,
    stride_g_t,
    stride_g_i,
    stride_r_k,
    stride_r_v,
    stride_r_i,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the position terms of a block of tokens for a block of directions."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_k = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_t, m_k, o_i = o_t < tokens, o_k < directions, tl.arange(0, BLOCK_D)
    b_id = tl.load(ids + o_t * stride_ids, mask=m_t, other=0).to(tl.int64)
    m_id = (b_id >= 0) & (b_id < vocabulary)
    r_p = r + b_id[:, None] * stride_r_v + o_k[None, :] * stride_r_k
    m_r = (m_t & m_id)[:, None] & m_k[None, :]
    b_u = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for i in range(0, width, BLOCK_D):
        m_i = i + o_i < width
        i_i = (i + o_i).to(tl.int64)
        g_p = g + o_t[:, None] * stride_g_t + i_i[None, :] * stride_g_i
        b_g = tl.load(g_p, mask=m_t[:, None] & m_i[None, :], other=0.0).to(tl.float32)
        r_i = r_p[:, :, None] + i_i[None, None, :] * stride_r_i
        b_r = tl.load(r_i, mask=m_r[:, :, None] & m_i[None, None, :], other=0.0).to(tl.float32)
        b_u += tl.sum(b_g[:, None, :] * b_r, axis=2)
    # on a GPU nobody has looked at the ids: one outside the table reads nothing and says so
    b_u = tl.where(m_id[:, None], b_u, float("nan"))
    tl.store(u + o_t[:, None] * directions + o_k[None, :], b_u, mask=m_t[:, None] & m_k[None, :])


def embedding_dot(ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Position terms u[t, k] = g[t] . r[k, ids[t]]; NaN where an id lies outside the table.

    Args:
        ids: Int64[Tensor, "tokens"].
        g: Float[Tensor, "tokens d"].
        r: Float[Tensor, "directions vocabulary d"].

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    return tuned(embedding_dot_kernel.__name__, OF_ROWS, (g, r), lambda x: _run(ids, g, r, x))


def _run(ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    (tokens, width), (directions, vocabulary, _) = g.shape, r.shape
    block_k = power_of_two(directions, 1, MAX_DIRECTIONS)
    u = torch.empty(tokens, directions, device=g.device, dtype=torch.float32)
    launch(
        embedding_dot_kernel, (blocks_of(tokens, tiling.blocks["BLOCK_T"]), blocks_of(directions, block_k)), tiling,
        ids, g, r, u, tokens, width, vocabulary, directions, *ids.stride(), *g.stride(), *r.stride(),
        BLOCK_K=block_k,
    )  # fmt: skip
    return u
