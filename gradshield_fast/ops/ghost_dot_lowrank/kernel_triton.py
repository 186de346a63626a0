"""The two halves of the low-rank ghost dot product in Triton: both read their long factor once."""

from __future__ import annotations

import torch

from gradshield_fast.ops.triton_support import (
    Tiling,
    blocks_of,
    is_wide,
    jit,
    launch,
    not_for_auto,
    power_of_two,
    processors,
    tl,
    why_not,
)
from gradshield_fast.ops.triton_tiles import product
from gradshield_fast.ops.triton_tuning import Tilings, tilings, tuned

__all__ = ["lowrank_contract", "lowrank_project", "not_for_auto", "why_not"]

NARROW = Tiling({"BLOCK_T": 128, "BLOCK_I": 32}, warps=8, stages=4, shared=69 * 1024, registers=184)
FEW_RANKS = Tiling({"BLOCK_T": 64, "BLOCK_I": 64}, warps=4, stages=4, shared=69 * 1024, registers=176)
WIDE = Tiling({"BLOCK_T": 64, "BLOCK_I": 32}, warps=4, stages=3, shared=33 * 1024, registers=255)
# the parts follow from the rule's blocks of tokens; other blocks change how warps share the columns that are summed
OF_NARROW = tilings((NARROW, NARROW.but(stages=3)), (NARROW.but({"BLOCK_T": 64}),))
OF_FEW_RANKS = tilings(
    (FEW_RANKS, FEW_RANKS.but(stages=3)),
    (FEW_RANKS.but({"BLOCK_T": 128}, stages=3, shared=77 * 1024, registers=255),),
    (FEW_RANKS.but({"BLOCK_I": 128}, stages=3, shared=105 * 1024, registers=255),),
)
OF_WIDE = tilings((WIDE,), (WIDE.but({"BLOCK_T": 32}),))
TILINGS = (OF_NARROW, OF_FEW_RANKS, OF_WIDE)
MAX_RANKS = 64
"""Columns of p or q that one program takes; more are more programs, which read the long factor again, from the L2."""


# Maths    z[s, t, j] = sum_{i in part s} a[t, i] q[i, j]                one program = BLOCK_T tokens, BLOCK_R columns
# Traffic  a: ranks/BLOCK_R reads, 1 from memory; q: tokens/BLOCK_T reads, from the L2; z: 4 B x parts per entry
@jit(fixed=("tokens",))
def project_kernel(
    a,
    q,
    z,
    tokens,
    depth,
    ranks,
    part,
    stride_a_t,
    stride_a_i,
    stride_q_i,
    stride_q_j,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the projections of a block of tokens on a block of columns over one part of the depth."""
    i_t, i_r, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_t, o_j = i_t * BLOCK_T + tl.arange(0, BLOCK_T), i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_t, m_j = o_t < tokens, o_j < ranks
    first = i_s * part
    b_z = product(
        a + o_t * stride_a_t, q + o_j * stride_q_j, m_t, m_j, first, tl.minimum(first + part, depth), depth,
        stride_a_i, stride_q_i, BLOCK_T, BLOCK_R, BLOCK_I, INTERPRETED,
    )  # fmt: skip
    z_p = z + (i_s.to(tl.int64) * tokens + o_t)[:, None] * ranks + o_j[None, :]
    tl.store(z_p, b_z, mask=m_t[:, None] & m_j[None, :])


# Maths    u[s, t, k] = sum_{j in block} member[j, k] z[t, j] (sum_{o in part s} g[t, o] p[o, j])
# Traffic  as above with g and p; z: one read a part; p^T g stays in registers; u: 4 B x directions x parts per token
@jit(fixed=("tokens",))
def contract_kernel(
    z,
    g,
    p,
    member,
    u,
    tokens,
    depth,
    ranks,
    directions,
    part,
    stride_z_t,
    stride_z_j,
    stride_g_t,
    stride_g_o,
    stride_p_o,
    stride_p_j,
    stride_m_j,
    stride_m_k,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the position terms of a block of tokens from a block of columns and one part of the depth."""
    i_t, i_r, i_s = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    o_t, o_j = i_t * BLOCK_T + tl.arange(0, BLOCK_T), i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    m_t, m_j = o_t < tokens, o_j < ranks
    first = i_s * part
    b_u = product(
        g + o_t * stride_g_t, p + o_j * stride_p_j, m_t, m_j, first, tl.minimum(first + part, depth), depth,
        stride_g_o, stride_p_o, BLOCK_T, BLOCK_R, BLOCK_I, INTERPRETED,
    )  # fmt: skip
    z_p = z + o_t[:, None] * stride_z_t + o_j[None, :] * stride_z_j
    b_u *= tl.load(z_p, mask=m_t[:, None] & m_j[None, :], other=0.0).to(tl.float32)
    row = (i_s.to(tl.int64) * tl.num_programs(1) + i_r) * tokens
    for k in range(directions):
        b_m = tl.load(member + o_j * stride_m_j + k * stride_m_k, mask=m_j, other=0.0).to(tl.float32)
        tl.store(u + (row + o_t) * directions + k, tl.sum(b_u * b_m[None, :], axis=1), mask=m_t)


def tilings_for(x: torch.Tensor, y: torch.Tensor, block_r: int) -> Tilings:
    """Choose the tilings that a product with few columns may take, by its types and columns alone.

    Args:
        x: the long factor.
        y: the factor with few columns.
        block_r: columns that a program takes.

    Returns:
        One of `TILINGS`.
    """
    if is_wide(x, y):
        return OF_WIDE
    return OF_FEW_RANKS if block_r <= 32 else OF_NARROW


def parts_of(
    tokens: int, blocks_r: int, depth: int, given: Tilings, block: int, device: torch.device
) -> tuple[int, int]:
    """Cut the depth so that few tokens still fill the device; each part is summed apart and the parts in order.

    Args:
        tokens: rows of the product.
        blocks_r: blocks of its columns.
        depth: length of the sum.
        given: the kernel's tilings; the rule's blocks of tokens count, so that the parts do not change with others.
        block: a step along the depth.
        device: where it will run.

    Returns:
        The number of parts and the length of each, a multiple of BLOCK_I.
    """
    programs = blocks_of(tokens, given.first.blocks["BLOCK_T"]) * blocks_r
    wanted = min(blocks_of(2 * processors(device), max(programs, 1)), blocks_of(depth, 4 * block), 16)
    part = blocks_of(blocks_of(depth, block), max(wanted, 1)) * block
    return max(blocks_of(depth, max(part, 1)), 1), max(part, block)


def lowrank_project(a: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """z[t, j] = q[:, j] . a[t].

    Args:
        a: Float[Tensor, "tokens d_in"].
        q: Float[Tensor, "d_in ranks"].

    Returns:
        Float32[Tensor, "tokens ranks"].
    """
    block_r = power_of_two(q.shape[1], 16, MAX_RANKS)
    given = tilings_for(a, q, block_r)
    return tuned(project_kernel.__name__, given, (a, q), lambda x: _project(a, q, block_r, given, x))


def _project(a: torch.Tensor, q: torch.Tensor, block_r: int, given: Tilings, tiling: Tiling) -> torch.Tensor:
    (tokens, depth), ranks = a.shape, q.shape[1]
    blocks = blocks_of(tokens, tiling.blocks["BLOCK_T"]), blocks_of(ranks, block_r)
    parts, part = parts_of(tokens, blocks[1], depth, given, tiling.blocks["BLOCK_I"], a.device)
    z = torch.empty(parts, tokens, ranks, device=a.device, dtype=torch.float32)
    launch(
        project_kernel, (*blocks, parts), tiling,
        a, q, z, tokens, depth, ranks, part, *a.stride(), *q.stride(),
        BLOCK_R=block_r,
    )  # fmt: skip
    return z[0] if parts == 1 else z.sum(0)


def lowrank_contract(z: torch.Tensor, g: torch.Tensor, p: torch.Tensor, member: torch.Tensor) -> torch.Tensor:
    """u[t, k] = sum_{j of direction k} z[t, j] (p[:, j] . g[t]).

    Args:
        z: Float[Tensor, "tokens ranks"].
        g: Float[Tensor, "tokens d_out"].
        p: Float[Tensor, "d_out ranks"].
        member: Float[Tensor, "ranks directions"], 1 where column j belongs to direction k, else 0.

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    block_r = power_of_two(p.shape[1], 16, MAX_RANKS)
    given = tilings_for(g, p, block_r)
    return tuned(
        contract_kernel.__name__, given, (g, p, member), lambda x: _contract(z, g, p, member, block_r, given, x)
    )


def _contract(
    z: torch.Tensor,
    g: torch.Tensor,
    p: torch.Tensor,
    member: torch.Tensor,
    block_r: int,
    given: Tilings,
    tiling: Tiling,
) -> torch.Tensor:
    (tokens, depth), (ranks, directions) = g.shape, member.shape
    blocks = blocks_of(tokens, tiling.blocks["BLOCK_T"]), blocks_of(ranks, block_r)
    parts, part = parts_of(tokens, blocks[1], depth, given, tiling.blocks["BLOCK_I"], g.device)
    u = torch.empty(parts * blocks[1], tokens, directions, device=g.device, dtype=torch.float32)
    launch(
        contract_kernel, (*blocks, parts), tiling,
        z, g, p, member, u, tokens, depth, ranks, directions, part,
        *z.stride(), *g.stride(), *p.stride(), *member.stride(),
        BLOCK_R=block_r,
    )  # fmt: skip
    return u[0] if len(u) == 1 else u.sum(0)
