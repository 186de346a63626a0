"""The two-sided projection in Triton: both sides as in `ghost_dot_lowrank`, then a small product for each example."""

from __future__ import annotations

import torch

from gradshield_fast.ops.ghost_dot_lowrank.kernel_triton import lowrank_project
from gradshield_fast.ops.segments import held
from gradshield_fast.ops.triton_support import Tiling, blocks_of, jit, launch, not_for_auto, processors, tl, why_not
from gradshield_fast.ops.triton_tiles import product
from gradshield_fast.ops.triton_tuning import tilings, tuned

__all__ = ["ghost_project", "not_for_auto", "why_not"]

SEGMENT = Tiling({"BLOCK_O": 32, "BLOCK_C": 32, "BLOCK_I": 32}, warps=4, stages=3, shared=17 * 1024, registers=136)
# one program makes an entry's sum over a part of the tokens, and the parts follow from the rule's tiles
OF_SEGMENT = tilings(
    (SEGMENT, SEGMENT.but(stages=2), SEGMENT.but(warps=2, registers=160)),
    (SEGMENT.but({"BLOCK_I": 64}, shared=33 * 1024, registers=168),),
)
TILINGS = (OF_SEGMENT,)


# Maths    s[p, n, o, c] = sum_{t in part p of n} left[t, o] right[t, c]        one program = a tile, a part, an example
# Traffic  left: k_in/BLOCK_C reads, right: k_out/BLOCK_O reads, 4 B an entry; s: 4 B x parts an entry
@jit(fixed=("examples",))
def segment_kernel(
    left,
    right,
    cu_seqlens,
    s,
    examples,
    tiles,
    k_out,
    k_in,
    stride_left_t,
    stride_left_o,
    stride_right_t,
    stride_right_c,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write a tile of an example's projection, summed over one part of its tokens."""
    i_n, i_p, i_s = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles, tl.program_id(1)
    n_c = tl.cdiv(k_in, BLOCK_C)
    o_o = (i_p // n_c).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    o_c = (i_p % n_c).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_o, m_c = o_o < k_out, o_c < k_in
    begin, end = tl.load(cu_seqlens + i_n), tl.load(cu_seqlens + i_n + 1)
    part = tl.cdiv(tl.cdiv(end - begin, tl.num_programs(1)), BLOCK_I) * BLOCK_I
    first = tl.minimum(begin + i_s * part, end)
    last = tl.minimum(first + part, end)
    b_s = product(
        left + o_o * stride_left_o, right + o_c * stride_right_c, m_o, m_c, first, last, last,
        stride_left_t, stride_right_t, BLOCK_O, BLOCK_C, BLOCK_I, INTERPRETED,
    )  # fmt: skip
    s_p = s + ((i_s.to(tl.int64) * examples + i_n) * k_out + o_o)[:, None] * k_in + o_c[None, :]
    tl.store(s_p, b_s, mask=m_o[:, None] & m_c[None, :])


def ghost_project(
    a: torch.Tensor, g: torch.Tensor, p_in: torch.Tensor, p_out: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """s[n] = (g_n p_out)^T (a_n p_in), both sides projected for all tokens first.

    Args:
        a: Float[Tensor, "tokens d_in"].
        g: Float[Tensor, "tokens d_out"].
        p_in: Float[Tensor, "d_in k_in"].
        p_out: Float[Tensor, "d_out k_out"].
        cu_seqlens: Int[Tensor, "examples+1"].

    Returns:
        Float32[Tensor, "examples k_out k_in"].
    """
    right, left = lowrank_project(a, p_in), lowrank_project(g, p_out)
    cu = held(cu_seqlens, a.shape[0], a.device).int()
    return tuned(segment_kernel.__name__, OF_SEGMENT, (left, right, cu), lambda x: _segments(left, right, cu, x))


def _segments(left: torch.Tensor, right: torch.Tensor, cu: torch.Tensor, tiling: Tiling) -> torch.Tensor:
    examples, k_out, k_in = cu.numel() - 1, left.shape[1], right.shape[1]
    tiles = blocks_of(k_out, tiling.blocks["BLOCK_O"]) * blocks_of(k_in, tiling.blocks["BLOCK_C"])
    # a few long examples are cut, so that their tokens are not summed by a few programs while the rest of the GPU waits
    parts = min(blocks_of(2 * processors(left.device), max(tiles * examples, 1)), blocks_of(max(len(left), 1), 256), 16)
    s = torch.empty(parts, examples, k_out, k_in, device=left.device, dtype=torch.float32)
    launch(
        segment_kernel, (tiles * examples, parts), tiling,
        left, right, cu, s, examples, tiles, k_out, k_in,
        *left.stride(), *right.stride(),
    )  # fmt: skip
    return s[0] if parts == 1 else s.sum(0)
