"""The fused head and loss in Triton: two passes over tiles of the logits, which are made again in the second.

The head's position terms are a `ghost_dot` (dense directions) or a `lowrank_project` (low rank) of the gradient that
the second pass leaves in its workspace, so those rooms' kernels serve here too.
"""

from __future__ import annotations

from functools import partial

import torch

from gradshield_fast.ops.ghost_dot.kernel_triton import ghost_dot
from gradshield_fast.ops.ghost_dot_lowrank.kernel_triton import lowrank_project
from gradshield_fast.ops.triton_support import Tiling, blocks_of, is_wide, jit, launch, not_for_auto, tl, why_not
from gradshield_fast.ops.triton_tiles import described_product, product
from gradshield_fast.ops.triton_tuning import choose, described, tilings

__all__ = ["linear_cross_entropy", "not_for_auto", "why_not"]

LOGITS = Tiling(
    {"BLOCK_T": 128, "BLOCK_V": 64, "BLOCK_I": 64, "GROUP": 8}, warps=8, stages=3, shared=73 * 1024, registers=192
)
LOGITS_MIX = Tiling(
    {"BLOCK_T": 128, "BLOCK_V": 32, "BLOCK_I": 32, "GROUP": 8}, warps=8, stages=3, shared=39 * 1024, registers=128
)
LOGITS_WIDE = Tiling(
    {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_I": 32, "GROUP": 8}, warps=8, stages=3, shared=33 * 1024, registers=144
)
PULL = Tiling({"BLOCK_T": 128, "BLOCK_C": 128, "BLOCK_I": 32}, warps=8, stages=3, shared=65 * 1024, registers=224)
PULL_WIDE = Tiling({"BLOCK_T": 64, "BLOCK_C": 64, "BLOCK_I": 32}, warps=8, stages=3, shared=33 * 1024, registers=136)
# BLOCK_V cuts the sum over words, BLOCK_I that over the depth; a tile of dh is summed by one program, whatever its size
OF_LOGITS = tilings(
    (
        LOGITS,
        LOGITS.but(stages=4, shared=97 * 1024),
        LOGITS.but({"GROUP": 16}),
        LOGITS.but(descriptors=True),
        LOGITS.but(stages=4, shared=97 * 1024, descriptors=True),
    ),
    (LOGITS.but({"BLOCK_I": 128}, stages=2, shared=97 * 1024, registers=255),),
    (LOGITS.but({"BLOCK_T": 64}, warps=4, registers=216),),
)
OF_LOGITS_MIX = tilings(
    (LOGITS_MIX, LOGITS_MIX.but(stages=4, shared=51 * 1024), LOGITS_MIX.but(descriptors=True)),
)
OF_LOGITS_WIDE = tilings((LOGITS_WIDE, LOGITS_WIDE.but(stages=2, registers=192)), (LOGITS_WIDE.but({"BLOCK_I": 16}),))
OF_PULL = tilings(
    (PULL, PULL.but(stages=4, shared=89 * 1024), PULL.but({"BLOCK_T": 64, "BLOCK_C": 64}, warps=4, shared=33 * 1024))
)
OF_PULL_WIDE = tilings((PULL_WIDE, PULL_WIDE.but(stages=4, shared=49 * 1024)), (PULL_WIDE.but({"BLOCK_I": 16}),))
TILINGS = (OF_LOGITS, OF_LOGITS_MIX, OF_LOGITS_WIDE, OF_PULL, OF_PULL_WIDE)

WORKSPACE = 1 << 26
"""Bytes of the second pass's workspace, which holds g for all tokens and a part of the vocabulary."""

FLAT = 0.3
"""Below this, tanh is taken from its series: 1 - exp(-2x) would cancel."""


@jit()
def _tile(
    h,
    weight,
    first,
    tokens,
    words,
    depth,
    stride_h_t,
    stride_h_i,
    stride_w_v,
    stride_w_i,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """This program's words, tokens and y[t, v] = h[t] . W[v]; a group of token blocks walks over the words together.

    Words lie along the tile's second axis, which a thread or four hold a row of: what is summed over words stays there.
    """
    i_p, n_v, n_t = tl.program_id(0), tl.cdiv(words, BLOCK_V), tl.cdiv(tokens, BLOCK_T)
    row = i_p // (GROUP * n_v) * GROUP
    group = tl.minimum(n_t - row, GROUP)
    i_t = (row + i_p % (GROUP * n_v) % group).to(tl.int64)
    i_v = (i_p % (GROUP * n_v) // group).to(tl.int64)
    o_t, o_v = i_t * BLOCK_T + tl.arange(0, BLOCK_T), first + i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    m_t, m_v = o_t < tokens, o_v < first + words
    if DESCRIPTORS:
        b_y = described_product(
            h, weight, (i_t * BLOCK_T).to(tl.int32), (first + i_v * BLOCK_V).to(tl.int32), tokens, first + words, depth,
            stride_h_t, stride_w_v, BLOCK_T, BLOCK_V, BLOCK_I, INTERPRETED,
        )  # fmt: skip
    else:
        b_y = product(
            h + o_t * stride_h_t, weight + o_v * stride_w_v, m_t, m_v, 0, depth, depth,
            stride_h_i, stride_w_i, BLOCK_T, BLOCK_V, BLOCK_I, INTERPRETED,
        )  # fmt: skip
    return o_v, o_t, m_v, m_t, b_y


@jit()
def _bend(b_y, scale, softcap, CAPPED: tl.constexpr, FLAT: tl.constexpr):
    """Bend y to z' and give dz'/dy: with e = exp(-2|x|), tanh|x| = (1 - e) / (1 + e), its slope 4 e / (1 + e)^2."""
    b_z = b_y * scale
    b_slope = tl.zeros_like(b_y) + scale
    if CAPPED:
        b_x = b_z / softcap
        b_e = tl.exp(-2.0 * tl.abs(b_x))
        b_bent = (1.0 - b_e) / (1.0 + b_e)
        m_flat = tl.abs(b_x) < FLAT
        b_near = tl.where(m_flat, b_x, 0.0)
        b_s = b_near * b_near
        b_c = 62.0 / 2835.0 - b_s * (1382.0 / 155925.0)
        b_c = 2.0 / 15.0 - b_s * (17.0 / 315.0 - b_s * b_c)
        b_series = b_near - b_near * b_s * (1.0 / 3.0 - b_s * b_c)
        b_z = softcap * tl.where(m_flat, b_series, tl.where(b_x < 0, -b_bent, b_bent))
        b_slope = scale * 4.0 * b_e / ((1.0 + b_e) * (1.0 + b_e))
    return b_z, b_slope


# Maths    part[b, t] = log sum_{v in block b, v != label[t]} exp z'[t, v],   own[t] = z'[t, label[t]]
# Traffic  weight: tokens/(GROUP BLOCK_T) reads from memory; h: vocabulary/BLOCK_V reads, from the L2; part: 4 B per
#          token and block of words; logits stay in registers
@jit(fixed=("tokens",))
def others_kernel(
    h,
    weight,
    label,
    part,
    own,
    scale,
    softcap,
    tokens,
    vocabulary,
    depth,
    stride_h_t,
    stride_h_i,
    stride_w_v,
    stride_w_i,
    CAPPED: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write a tile's log of the sum over every word but the label, and the label's logit where the tile holds it."""
    o_v, o_t, m_v, m_t, b_y = _tile(
        h, weight, 0, tokens, vocabulary, depth, stride_h_t, stride_h_i, stride_w_v, stride_w_i,
        BLOCK_T, BLOCK_V, BLOCK_I, GROUP, DESCRIPTORS, INTERPRETED,
    )  # fmt: skip
    b_z, _ = _bend(b_y, scale, softcap, CAPPED, FLAT)
    b_label = tl.load(label + o_t, mask=m_t, other=-1)
    m_own = m_v[None, :] & (o_v[None, :] == b_label[:, None])
    m_other = m_v[None, :] & (o_v[None, :] != b_label[:, None])
    b_z_other = tl.where(m_other, b_z, float("-inf"))
    b_top = tl.max(b_z_other, axis=1)
    m_some = b_top != float("-inf")  # false where the label is the tile's only word
    b_base = tl.where(m_some, b_top, 0.0)
    b_sum = tl.sum(tl.exp(b_z_other - b_base[:, None]), axis=1)
    i_v = tl.min(o_v, axis=0) // BLOCK_V
    tl.store(
        part + i_v * tokens + o_t, tl.where(m_some, b_base + tl.log(tl.where(m_some, b_sum, 1.0)), b_top), mask=m_t
    )
    m_here = tl.max(m_own.to(tl.int32), axis=1) != 0
    tl.store(own + o_t, tl.sum(tl.where(m_own, b_z, 0.0), axis=1), mask=m_t & m_here)


# Maths    g[t, v] = w[t] dz'/dy (exp(z'[t, v] - total[t]), or -rest[t] for the label),   rest: all others' share
# Traffic  weight and h as above for this part of the vocabulary; g: 4 B written per token and word, 2 B rounded
@jit(fixed=("tokens",))
def gradient_kernel(
    h,
    weight,
    label,
    total,
    rest,
    share,
    g,
    scale,
    softcap,
    tokens,
    first,
    words,
    depth,
    stride_h_t,
    stride_h_i,
    stride_w_v,
    stride_w_i,
    stride_g_t,
    CAPPED: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_I: tl.constexpr,
    GROUP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write the gradient at a tile of logits."""
    o_v, o_t, m_v, m_t, b_y = _tile(
        h, weight, first, tokens, words, depth, stride_h_t, stride_h_i, stride_w_v, stride_w_i,
        BLOCK_T, BLOCK_V, BLOCK_I, GROUP, DESCRIPTORS, INTERPRETED,
    )  # fmt: skip
    b_z, b_slope = _bend(b_y, scale, softcap, CAPPED, FLAT)
    b_label = tl.load(label + o_t, mask=m_t, other=-1)
    b_total, b_rest = tl.load(total + o_t, mask=m_t, other=0.0), tl.load(rest + o_t, mask=m_t, other=0.0)
    b_share = tl.load(share + o_t, mask=m_t, other=0.0)
    m_own = o_v[None, :] == b_label[:, None]
    # only where it is a probability: elsewhere it may overflow
    b_log = tl.where(m_own | ~m_v[None, :], 0.0, b_z - b_total[:, None])
    b_g = tl.where(m_own, -b_rest[:, None], tl.exp(b_log))
    b_g *= b_slope * b_share[:, None]
    g_p = g + o_t[:, None] * stride_g_t + (o_v - first)[None, :]
    tl.store(g_p, b_g.to(g.dtype.element_ty), mask=m_t[:, None] & m_v[None, :])


# Maths    dh[t, i] += sum_{v in part} g[t, v] W[v, i]                   one program = BLOCK_T tokens, BLOCK_C columns
# Traffic  g: d/BLOCK_C reads, weight: tokens/BLOCK_T reads, from the L2 within a group; dh: 8 B a part
@jit(fixed=("tokens",))
def pull_kernel(
    g,
    weight,
    dh,
    tokens,
    words,
    depth,
    stride_g_t,
    stride_w_v,
    stride_w_i,
    ADD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """Write, or add to, a tile of the gradient at the hidden states; the parts come in order, one launch each."""
    i_p, n_i = tl.program_id(0), tl.cdiv(depth, BLOCK_C)
    o_t = (i_p // n_i).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_i = (i_p % n_i).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_t, m_i = o_t < tokens, o_i < depth
    b_dh = product(
        g + o_t * stride_g_t, weight + o_i * stride_w_i, m_t, m_i, 0, words, words,
        1, stride_w_v, BLOCK_T, BLOCK_C, BLOCK_I, INTERPRETED,
    )  # fmt: skip
    dh_p, m_dh = dh + o_t[:, None] * depth + o_i[None, :], m_t[:, None] & m_i[None, :]
    if ADD:
        b_dh += tl.load(dh_p, mask=m_dh, other=0.0)
    tl.store(dh_p, b_dh, mask=m_dh)


def linear_cross_entropy(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    token_weight: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    r: torch.Tensor | None,
    p: torch.Tensor | None,
    q: torch.Tensor | None,
    member: torch.Tensor | None,
    exact: bool = True,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Losses, dh and the head's position terms; the formulas are in api.py.

    Args:
        h: Float[Tensor, "tokens d"].
        weight: Float[Tensor, "vocabulary d"].
        labels: Int64[Tensor, "tokens"], -100 where there is no loss.
        token_weight: Float[Tensor, "tokens"] or None.
        scale: factor on the logits.
        softcap: bound on the logits, or None.
        r: Float[Tensor, "directions vocabulary d"] or None.
        p: Float[Tensor, "vocabulary ranks"] or None.
        q: Float[Tensor, "d ranks"] or None.
        member: Float[Tensor, "ranks directions"], 1 where column j belongs to direction k, else 0; or None.
        exact: whether g keeps its float32 digits in the workspace.

    Returns:
        Float32[Tensor, "tokens"], Float32[Tensor, "tokens d"], and Float32[Tensor, "tokens directions"] or None.
    """
    (tokens, depth), vocabulary = h.shape, weight.shape[0]
    live, label = labels >= 0, labels.clamp_min(0).contiguous()
    cap = 1.0 if softcap is None else softcap
    options = {"CAPPED": softcap is not None, "FLAT": FLAT}

    def first_pass(tiling: Tiling) -> tuple[torch.Tensor, torch.Tensor]:
        n_v = blocks_of(vocabulary, tiling.blocks["BLOCK_V"])
        part = torch.empty(n_v, tokens, device=h.device, dtype=torch.float32)
        # stays NaN for a label outside the vocabulary
        own = torch.full((tokens,), torch.nan, device=h.device, dtype=torch.float32)
        launch(
            others_kernel, (blocks_of(tokens, tiling.blocks["BLOCK_T"]) * n_v,), tiling,
            h, weight, label, part, own, scale, cap, tokens, vocabulary, depth, *h.stride(), *weight.stride(),
            DESCRIPTORS=tiling.descriptors, **options,
        )  # fmt: skip
        return part, own

    # one choice for both passes, so that the logits of the second are those of the first
    given = OF_LOGITS_WIDE if is_wide(h, weight) else OF_LOGITS if h.dtype == weight.dtype else OF_LOGITS_MIX
    name = f"{others_kernel.__name__}{', softcap' * (softcap is not None)}"
    logits = choose(name, given, (h, weight), first_pass, descriptors=described(h, weight))
    part, own = first_pass(logits)
    others = part.logsumexp(0)
    loss = torch.nn.functional.softplus(others - own, threshold=40.0).masked_fill(~live, 0)
    # without a label, no probability: exp(-inf)
    total = (own + loss).masked_fill(~live, torch.inf)
    rest = (others - total).exp()
    share = live.float() if token_weight is None else torch.where(live, token_weight.float(), 0.0).contiguous()

    width = part_of(tokens, vocabulary)
    # bfloat16 for float16 inputs too: float16 would flush probabilities below 6e-8
    rounded = not exact and h.dtype.itemsize == weight.dtype.itemsize == 2
    g = torch.empty(tokens, width, device=h.device, dtype=torch.bfloat16 if rounded else torch.float32)
    dh = torch.empty(tokens, depth, device=h.device, dtype=torch.float32)
    dot = None if r is None else torch.zeros(tokens, r.shape[0], device=h.device, dtype=torch.float32)
    pulled = None if p is None else torch.zeros(tokens, p.shape[1], device=h.device, dtype=torch.float32)
    pull: Tiling | None = None
    for first in range(0, vocabulary, width):
        words = min(width, vocabulary - first)
        n_t, n_v = blocks_of(tokens, logits.blocks["BLOCK_T"]), blocks_of(words, logits.blocks["BLOCK_V"])
        launch(
            gradient_kernel, (n_t * n_v,), logits,
            h, weight, label, total, rest, share, g, scale, cap, tokens, first, words, depth,
            *h.stride(), *weight.stride(), width,
            DESCRIPTORS=logits.descriptors, **options,
        )  # fmt: skip
        pull_part = partial(_pull, g, weight[first : first + words], dh, first > 0)
        if pull is None:  # chosen at the first part, which only writes: a later one adds, and may run but once
            pull = choose(
                pull_kernel.__name__, OF_PULL_WIDE if is_wide(weight) else OF_PULL, (g[:, :words], weight), pull_part
            )
        pull_part(pull)
        if r is not None and dot is not None:
            dot += ghost_dot(h, g[:, :words], r[:, first : first + words])
        if p is not None and pulled is not None:
            pulled += lowrank_project(g[:, :words], p[first : first + words])
    if pulled is not None and q is not None and member is not None:
        dot = (pulled * lowrank_project(h, q)) @ member.float()
    return loss, dh, dot


def _pull(g: torch.Tensor, weight: torch.Tensor, dh: torch.Tensor, add: bool, tiling: Tiling) -> None:
    """Write to dh, or add to it, what a part of the vocabulary gives."""
    (tokens, depth), words = dh.shape, weight.shape[0]
    programs = blocks_of(tokens, tiling.blocks["BLOCK_T"]) * blocks_of(depth, tiling.blocks["BLOCK_C"])
    launch(
        pull_kernel, (programs,), tiling,
        g, weight, dh, tokens, words, depth, g.stride(0), *weight.stride(),
        ADD=add,
    )  # fmt: skip


def part_of(tokens: int, vocabulary: int) -> int:
    """Choose how much of the vocabulary the workspace takes at once.

    Args:
        tokens: rows of the workspace.
        vocabulary: words in all.

    Returns:
        Words a part, a multiple of 1024 unless all fit.
    """
    return min(max(WORKSPACE // (4 * max(tokens, 1)) // 1024, 1) * 1024, max(vocabulary, 1))
