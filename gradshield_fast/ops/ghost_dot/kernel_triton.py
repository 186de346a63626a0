"""The ghost dot product with dense directions in Triton: a matrix product whose result never leaves the registers."""

from __future__ import annotations

import torch

from gradshield_fast.ops.triton_support import Tiling, blocks_of, is_wide, jit, launch, not_for_auto, tl, why_not
from gradshield_fast.ops.triton_tiles import described_product, product
from gradshield_fast.ops.triton_tuning import Tilings, described, tilings, tuned

__all__ = ["ghost_dot", "not_for_auto", "why_not"]

SAME = Tiling(
    {"BLOCK_T": 128, "BLOCK_O": 128, "BLOCK_I": 64, "GROUP": 8}, warps=8, stages=3, shared=97 * 1024, registers=255
)
MIXED = Tiling(
    {"BLOCK_T": 128, "BLOCK_O": 128, "BLOCK_I": 32, "GROUP": 8}, warps=8, stages=4, shared=89 * 1024, registers=255
)
SMALL = Tiling(
    {"BLOCK_T": 64, "BLOCK_O": 64, "BLOCK_I": 32, "GROUP": 8}, warps=4, stages=4, shared=45 * 1024, registers=144
)
WIDE = Tiling(
    {"BLOCK_T": 64, "BLOCK_O": 64, "BLOCK_I": 32, "GROUP": 8}, warps=8, stages=3, shared=33 * 1024, registers=136
)
# GROUP blocks of tokens walk over the rows of r together, so that what they read of it stays in the L2. BLOCK_O and
# BLOCK_I cut sums, and warps may share the one over o: only what is beside them, or the way of copying, leaves the bits
OF_SAME = tilings(
    (
        SAME,
        SAME.but(stages=4, shared=129 * 1024),
        SAME.but({"GROUP": 16}),
        SAME.but(descriptors=True),
        SAME.but(stages=4, shared=129 * 1024, descriptors=True),
    ),
    (SAME.but({"BLOCK_I": 128}, stages=2, shared=129 * 1024),),
    (SAME.but({"BLOCK_T": 64}, warps=4),),
)
OF_MIXED = tilings(
    (
        MIXED,
        MIXED.but(stages=3, shared=65 * 1024),
        MIXED.but({"GROUP": 16}),
        MIXED.but(stages=3, shared=65 * 1024, descriptors=True),
        MIXED.but(descriptors=True),
    ),
    (MIXED.but({"BLOCK_I": 64}, stages=3, shared=129 * 1024, descriptors=True),),
)
OF_SMALL = tilings(
    (SMALL, SMALL.but(stages=3), SMALL.but(stages=3, descriptors=True)),
    (SMALL.but({"BLOCK_I": 64}, stages=3, shared=65 * 1024, registers=255),),
)
OF_WIDE = tilings((WIDE, WIDE.but(stages=2)), (WIDE.but({"BLOCK_T": 128, "BLOCK_I": 16}, registers=200),))
TILINGS = (OF_SAME, OF_MIXED, OF_SMALL, OF_WIDE)


# Maths    u[b, t, k] = sum_{o in block b} g[t, o] (sum_i r[k, o, i] a[t, i])        one program = one b, k, block of t
# Traffic  a: K d_out/BLOCK_O reads, r: tokens/BLOCK_T reads, all but 1 and 1/GROUP of them from the L2; g: K reads;
#          r a stays in registers; u: 4 B x K d_out/BLOCK_O per token
@jit(fixed=("tokens",))
def ghost_dot_kernel(
    a,
    g,
    r,
    u,
    tokens,
    d_in,
    d_out,
    directions,
    stride_a_t,
    stride_a_i,
    stride_g_t,
    stride_g_o,
    stride_r_k,
    stride_r_o,
    stride_r_i,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the position terms of a block of tokens from a block of rows of one direction."""
    i_p = tl.program_id(0)
    i_k = (i_p % directions).to(tl.int64)
    i_p //= directions
    # the K directions of a tile run side by side, then the tokens of a group, then the rows of r
    n_o, n_t = tl.cdiv(d_out, BLOCK_O), tl.cdiv(tokens, BLOCK_T)
    first = i_p // (GROUP * n_o) * GROUP
    group = tl.minimum(n_t - first, GROUP)
    i_t = (first + i_p % (GROUP * n_o) % group).to(tl.int64)
    i_o = (i_p % (GROUP * n_o) // group).to(tl.int64)
    o_t, o_o = i_t * BLOCK_T + tl.arange(0, BLOCK_T), i_o * BLOCK_O + tl.arange(0, BLOCK_O)
    m_t, m_o = o_t < tokens, o_o < d_out
    # r on the left: its float32 is split in registers, where the matrix units take their left factor from
    if DESCRIPTORS:
        b_y = described_product(
            r + i_k * stride_r_k, a, (i_o * BLOCK_O).to(tl.int32), (i_t * BLOCK_T).to(tl.int32), d_out, tokens, d_in,
            stride_r_o, stride_a_t, BLOCK_O, BLOCK_T, BLOCK_I, INTERPRETED,
        )  # fmt: skip
    else:
        b_y = product(
            r + i_k * stride_r_k + o_o * stride_r_o, a + o_t * stride_a_t, m_o, m_t, 0, d_in, d_in,
            stride_r_i, stride_a_i, BLOCK_O, BLOCK_T, BLOCK_I, INTERPRETED,
        )  # fmt: skip
    g_p = g + o_o[:, None] * stride_g_o + o_t[None, :] * stride_g_t
    b_g = tl.load(g_p, mask=m_o[:, None] & m_t[None, :], other=0.0).to(tl.float32)
    tl.store(u + (i_o * tokens + o_t) * directions + i_k, tl.sum(b_y * b_g, axis=0), mask=m_t)


def tilings_for(x: torch.Tensor, y: torch.Tensor, rows: int, columns: int) -> Tilings:
    """Choose the tilings that a matrix product may take, by its types and its size.

    Args:
        x: left factor.
        y: right factor.
        rows: of the result.
        columns: of the result.

    Returns:
        One of `TILINGS`.
    """
    if is_wide(x, y):
        return OF_WIDE
    if min(rows, columns) <= 64:
        return OF_SMALL
    return OF_SAME if x.dtype == y.dtype else OF_MIXED


def ghost_dot(a: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Position terms u[t, k] = g[t] . (r[k] a[t]).

    Args:
        a: Float[Tensor, "tokens d_in"].
        g: Float[Tensor, "tokens d_out"].
        r: Float[Tensor, "directions d_out d_in"].

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    given = tilings_for(r, a, r.shape[1], a.shape[0])
    return tuned(ghost_dot_kernel.__name__, given, (a, g, r), lambda x: _run(a, g, r, x), descriptors=described(a, r))


def _run(a: torch.Tensor, g: torch.Tensor, r: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    (tokens, d_in), (directions, d_out, _) = a.shape, r.shape
    n_o = blocks_of(d_out, tiling.blocks["BLOCK_O"])
    u = torch.empty(n_o, tokens, directions, device=a.device, dtype=torch.float32)
    launch(
        ghost_dot_kernel, (blocks_of(tokens, tiling.blocks["BLOCK_T"]) * n_o * directions,), tiling,
        a, g, r, u, tokens, d_in, d_out, directions, *a.stride(), *g.stride(), *r.stride(),
        DESCRIPTORS=tiling.descriptors,
    )  # fmt: skip
    return u[0] if n_o == 1 else u.sum(0)
