"""Inner products of per-example gradients from factors in Triton, in both orders of the sum.

Which order an example takes is decided on the device from its length, so that nothing waits for `cu_seqlens` to reach
the host: each kernel passes by the examples of the other.
"""

from __future__ import annotations

import torch

from gradshield_fast.ops.boundaries import derived
from gradshield_fast.ops.segments import held, segment_sum
from gradshield_fast.ops.triton_support import (
    Tiling,
    blocks_of,
    is_wide,
    jit,
    launch,
    not_for_auto,
    processors,
    tl,
    why_not,
)
from gradshield_fast.ops.triton_tiles import product
from gradshield_fast.ops.triton_tuning import tilings, tuned

__all__ = ["ghost_inner", "not_for_auto", "pair_terms", "why_not"]

PAIRS = Tiling({"BLOCK_T": 64, "BLOCK_U": 64, "BLOCK_I": 64}, warps=8, stages=3, shared=49 * 1024, registers=208)
PAIRS_MIXED = Tiling({"BLOCK_T": 64, "BLOCK_U": 32, "BLOCK_I": 32}, warps=4, stages=3, shared=27 * 1024, registers=248)
OUTER = Tiling({"BLOCK_O": 64, "BLOCK_C": 64, "BLOCK_I": 32}, warps=8, stages=3, shared=33 * 1024, registers=216)
PAIRS_WIDE = Tiling({"BLOCK_T": 64, "BLOCK_U": 64, "BLOCK_I": 16}, warps=8, stages=3, shared=17 * 1024, registers=192)
# blocks of tokens say where the sums over u begin and how many parts they have: all of these blocks cut sums
OF_PAIRS = tilings((PAIRS, PAIRS.but(stages=4, shared=65 * 1024)), (PAIRS.but(warps=4, registers=255),))
OF_PAIRS_MIXED = tilings(
    (PAIRS_MIXED, PAIRS_MIXED.but(stages=4, shared=35 * 1024)),
    (PAIRS_MIXED.but({"BLOCK_I": 64}, shared=53 * 1024, registers=255),),
)
OF_PAIRS_WIDE = tilings(
    (PAIRS_WIDE, PAIRS_WIDE.but(stages=2)), (PAIRS_WIDE.but({"BLOCK_I": 32}, stages=2, registers=255),)
)
OF_OUTER = tilings((OUTER, OUTER.but(stages=4, shared=49 * 1024, registers=224)), (OUTER.but(warps=4, registers=240),))
TILINGS = (OF_PAIRS, OF_PAIRS_MIXED, OF_PAIRS_WIDE, OF_OUTER)

FLOATS, IDS, IDS_LEFT, IDS_RIGHT = 0, 1, 2, 3
"""What two factors hold: rows of numbers, ids that stand for one-hot rows, or ids on one side."""


@jit()
def _gram(
    x, y, o_t, o_u, m_t, m_u, width, stride_x_t, stride_x_i, stride_y_t, stride_y_i,
    KIND: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """b[t, u] = x[t] . y[u]; with ids on one side a gather, on both a comparison.

    KIND is FLOATS, IDS, IDS_LEFT or IDS_RIGHT. An id outside the columns reads nothing and gives NaN.
    """
    if KIND == 0:
        b = product(
            x + o_t * stride_x_t, y + o_u * stride_y_t, m_t, m_u, 0, width, width,
            stride_x_i, stride_y_i, BLOCK_T, BLOCK_U, BLOCK_I, INTERPRETED,
        )  # fmt: skip
    elif KIND == 1:
        b_x = tl.load(x + o_t * stride_x_t, mask=m_t, other=-1)
        b_y = tl.load(y + o_u * stride_y_t, mask=m_u, other=-2)
        b = (b_x[:, None] == b_y[None, :]).to(tl.float32)
    elif KIND == 2:
        b_x = tl.load(x + o_t * stride_x_t, mask=m_t, other=-1).to(tl.int64)
        m = ((b_x >= 0) & (b_x < width))[:, None] & m_u[None, :]
        y_p = y + o_u[None, :] * stride_y_t + b_x[:, None] * stride_y_i
        b = tl.where(m, tl.load(y_p, mask=m, other=0.0).to(tl.float32), float("nan"))
    else:
        b_y = tl.load(y + o_u * stride_y_t, mask=m_u, other=-1).to(tl.int64)
        m = ((b_y >= 0) & (b_y < width))[None, :] & m_t[:, None]
        x_p = x + o_t[:, None] * stride_x_t + b_y[None, :] * stride_x_i
        b = tl.where(m, tl.load(x_p, mask=m, other=0.0).to(tl.float32), float("nan"))
    return b


# Maths    v[s, t, m] = sum_{u = first[t, m]}^{last[t, m] - 1} (l1[t] . l2[u]) (r1[t] . r2[u]),  u in part s
#          SYMMETRIC: the second batch is the first, last = t + 1, and each u < t counts twice
# Traffic  l1, r1: 1 read per block of u, from the L2; l2, r2: 1 read per block of t that shares an example with them;
#          both products of a tile stay in registers; v: 4 B x parts per token and m
@jit(fixed=("tokens",))
def pairs_kernel(
    l1, r1, l2, r2, first, last, v,
    tokens, width_l, width_r,
    stride_l1_t, stride_l1_i, stride_r1_t, stride_r1_i, stride_l2_t, stride_l2_i, stride_r2_t, stride_r2_i,
    stride_first_t, stride_first_m, stride_last_t, stride_last_m,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_U: tl.constexpr, BLOCK_I: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write the sums of a block of tokens over every other part of their partners."""
    i_s, i_m = tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < tokens
    b_first = tl.load(first + o_t * stride_first_t + i_m * stride_first_m, mask=m_t, other=0)
    b_last = tl.load(last + o_t * stride_last_t + i_m * stride_last_m, mask=m_t, other=0)
    end = tl.max(b_last, axis=0)
    begin = tl.min(tl.where(b_first < b_last, b_first, end), axis=0)
    b_v = tl.zeros([BLOCK_T], tl.float32)
    for u in range(begin + i_s * BLOCK_U, end, tl.num_programs(1) * BLOCK_U):  # pyright: ignore[reportArgumentType]
        o_u = u + tl.arange(0, BLOCK_U).to(tl.int64)
        m_u = o_u < end
        b_l = _gram(
            l1, l2, o_t, o_u, m_t, m_u, width_l, stride_l1_t, stride_l1_i, stride_l2_t, stride_l2_i,
            LEFT, BLOCK_T, BLOCK_U, BLOCK_I, INTERPRETED,
        )  # fmt: skip
        b_r = _gram(
            r1, r2, o_t, o_u, m_t, m_u, width_r, stride_r1_t, stride_r1_i, stride_r2_t, stride_r2_i,
            RIGHT, BLOCK_T, BLOCK_U, BLOCK_I, INTERPRETED,
        )  # fmt: skip
        m_pair = (o_u[None, :] >= b_first[:, None]) & (o_u[None, :] < b_last[:, None])
        b_pair = tl.where(m_pair, b_l * b_r, 0.0)
        if SYMMETRIC:
            b_pair = tl.where(o_u[None, :] < o_t[:, None], 2.0 * b_pair, b_pair)
        b_v += tl.sum(b_pair, axis=1)
    n_m = tl.num_programs(2)
    tl.store(v + (i_s.to(tl.int64) * tokens + o_t) * n_m + i_m, b_v, mask=m_t)


# Maths    s[n, tile] = sum_{o, i in tile} G1[o, i] G2[o, i],   Gi[o, i] = sum_{t in n} li[t, o] ri[t, i]
# Traffic  li: width_r/BLOCK_C reads, ri: width_l/BLOCK_O reads, from the L2; both tiles of G stay in registers
@jit(fixed=("shortest",))
def outer_kernel(
    l1, r1, l2, r2, cu_seqlens, s,
    shortest, tiles, width_l, width_r,
    stride_l1_t, stride_l1_i, stride_r1_t, stride_r1_i, stride_l2_t, stride_l2_i, stride_r2_t, stride_r2_i,
    SYMMETRIC: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """Write what a tile of the gradients adds to an example of at least `shortest` tokens, 0 for the others."""
    i_n, i_p = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    n_c = tl.cdiv(width_r, BLOCK_C)
    o_o = (i_p // n_c).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_c = (i_p % n_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_o, m_c = o_o < width_l, o_c < width_r
    first, last = tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)
    last = tl.where(last - first >= shortest, last, first)
    b_1 = product(
        l1 + o_o * stride_l1_i, r1 + o_c * stride_r1_i, m_o, m_c, first, last, last,
        stride_l1_t, stride_r1_t, BLOCK_O, BLOCK_C, BLOCK_I, INTERPRETED,
    )  # fmt: skip
    if SYMMETRIC:
        b_2 = b_1
    else:
        b_2 = product(
            l2 + o_o * stride_l2_i, r2 + o_c * stride_r2_i, m_o, m_c, first, last, last,
            stride_l2_t, stride_r2_t, BLOCK_O, BLOCK_C, BLOCK_I, INTERPRETED,
        )  # fmt: skip
    tl.store(s + i_n * tiles + i_p, tl.sum(tl.sum(b_1 * b_2, axis=1), axis=0))


def pair_terms(
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    first: torch.Tensor,
    last: torch.Tensor,
    *,
    symmetric: bool = False,
) -> torch.Tensor:
    """v[t, m] = sum over u from first[t, m] to last[t, m] - 1 of (l1[t] . l2[u]) (r1[t] . r2[u]).

    Args:
        factors: left1, right1, left2, right2: Float[Tensor, "tokens width"] or Int64[Tensor, "tokens"].
        first: Int32[Tensor, "tokens m"].
        last: Int32[Tensor, "tokens m"]; not beyond the second batch.
        symmetric: the second factors are the first, and u < t counts twice.

    Returns:
        Float32[Tensor, "tokens m"].
    """
    l1, r1, l2, r2 = factors
    same = all(x.dtype == y.dtype for x, y in ((l1, l2), (r1, r2)) if x.ndim == y.ndim == 2)
    wide = is_wide(l1, l2) or is_wide(r1, r2)
    given = OF_PAIRS_WIDE if wide else OF_PAIRS if same else OF_PAIRS_MIXED
    kinds = _kind(l1, l2), _kind(r1, r2)
    name = f"{pairs_kernel.__name__}, factors {kinds[0]} {kinds[1]}{', symmetric' * symmetric}"
    return tuned(name, given, (*factors, first), lambda x: _pairs(factors, first, last, symmetric, x))


def _pairs(
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    first: torch.Tensor,
    last: torch.Tensor,
    symmetric: bool,
    tiling: Tiling,
) -> torch.Tensor:
    l1, r1, l2, r2 = factors
    tokens, rows = len(l1), first.shape[1]
    blocks = blocks_of(tokens, tiling.blocks["BLOCK_T"])
    parts = min(blocks_of(2 * processors(l1.device), max(blocks * rows, 1)), 16)
    v = torch.empty(parts, tokens, rows, device=l1.device, dtype=torch.float32)
    strides = [s for x in factors for s in (x.stride() if x.ndim == 2 else (x.stride(0), 0))]
    launch(
        pairs_kernel, (blocks, parts, rows), tiling,
        l1, r1, l2, r2, first, last, v, tokens, _width(l1, l2), _width(r1, r2), *strides,
        *first.stride(), *last.stride(),
        LEFT=_kind(l1, l2), RIGHT=_kind(r1, r2), SYMMETRIC=symmetric,
    )  # fmt: skip
    return v[0] if parts == 1 else v.sum(0)


def _kind(x: torch.Tensor, y: torch.Tensor) -> int:
    """Name what two factors hold."""
    return {(2, 2): FLOATS, (1, 1): IDS, (1, 2): IDS_LEFT, (2, 1): IDS_RIGHT}[x.ndim, y.ndim]


def _width(x: torch.Tensor, y: torch.Tensor) -> int:
    """Give the columns of the factor that has any."""
    return max(z.shape[1] if z.ndim == 2 else 0 for z in (x, y))


def ghost_inner(
    left1: torch.Tensor, right1: torch.Tensor, left2: torch.Tensor, right2: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """s[n] = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u]), in the cheaper of its two orders.

    Args:
        left1: Float[Tensor, "tokens rows"] or ids.
        right1: Float[Tensor, "tokens cols"] or ids.
        left2: like left1.
        right2: like right1.
        cu_seqlens: Int[Tensor, "examples+1"], row boundaries.

    Returns:
        Float32[Tensor, "examples"].
    """
    factors = (left1, right1, left2, right2)
    tokens, device = len(left1), left1.device
    cu = held(cu_seqlens, tokens, device)
    symmetric = left2 is left1 and right2 is right1
    shortest = tokens + 1  # no example is as long: all take the form tokens by tokens
    if all(x.ndim == 2 for x in factors):
        rows, cols = left1.shape[1], right1.shape[1]
        # half of the pairs count for two where both batches are one
        shortest = (2 if symmetric else 1) * rows * cols // max(rows + cols, 1) + 1

    def partners() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        at = torch.arange(tokens, device=device)
        example = torch.searchsorted(cu, at, right=True) - 1
        first, last = cu[example], cu[(example + 1).clamp_max(len(cu) - 1)]
        last = torch.where(last - first < shortest, at + 1 if symmetric else last, first)
        return first.int()[:, None], last.int()[:, None], cu.int()

    first, last, edges = derived(cu, ("partners", tokens, shortest, symmetric), partners)
    v = pair_terms(factors, first, last, symmetric=symmetric)
    out = segment_sum(v[:, 0], cu)
    if tokens < shortest or len(cu) == 1:
        return out
    name = f"{outer_kernel.__name__}{', symmetric' * symmetric}"
    return out + tuned(name, OF_OUTER, (*factors, cu), lambda x: _outer(factors, edges, shortest, symmetric, x))


def _outer(
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    cu: torch.Tensor,
    shortest: int,
    symmetric: bool,
    tiling: Tiling,
) -> torch.Tensor:
    """Give the examples of at least `shortest` tokens their sums, tile by tile of their gradients."""
    left1, right1, _, _ = factors
    rows, cols = left1.shape[1], right1.shape[1]
    tiles = blocks_of(rows, tiling.blocks["BLOCK_O"]) * blocks_of(cols, tiling.blocks["BLOCK_C"])
    s = torch.empty(len(cu) - 1, tiles, device=left1.device, dtype=torch.float32)
    launch(
        outer_kernel, (tiles * (len(cu) - 1),), tiling,
        *factors, cu, s, shortest, tiles, rows, cols, *(stride for x in factors for stride in x.stride()),
        SYMMETRIC=symmetric,
    )  # fmt: skip
    return s.sum(1)
