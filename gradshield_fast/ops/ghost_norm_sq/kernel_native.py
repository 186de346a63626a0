"""The ghost norm in C++, on the CPU: products of tokens with tokens, a pair of a norm once, no matrix of them kept."""

from __future__ import annotations

from itertools import pairwise

import torch

from gradshield_fast.ops import native
from gradshield_fast.ops.ghost_norm_sq import reference

ROOM = __package__ or ""

WIDEST_FLOAT32 = 2048
"""Columns of a float32 factor up to which `auto` takes these kernels: faster at 1536, slower at 8192."""

WIDEST = 16384
"""Columns of a float32 or float16 factor up to which packing it costs less than the pairs taken once save."""

BFLOAT16_GAIN, FLOAT32_GAIN = 5, 1.5
"""How many times faster each pair of tokens is multiplied once than torch multiplies as many numbers for G[n]."""


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: left1, right1, left2 and right2.

    Returns:
        None, or the reason.
    """
    return native.why_not(ROOM, *inputs)


def not_for_auto(*inputs: torch.Tensor) -> str | None:
    """Say why `auto` should pass this backend by.

    Args:
        inputs: left1, right1, left2 and right2.

    Returns:
        None, or the reason.
    """
    here, reason = native.not_for_auto(ROOM, *inputs)
    if not here:
        return reason
    # measured: OMP_NUM_THREADS=1 gradshield-fast bench --op ghost_norm_sq --isa {avx2,avx512,amx}
    if not native.at_least("avx512"):
        return "not faster than torch's products with this instruction set"
    # and, at two threads: python benchmarks/ops/run.py --device cpu
    if contested(*inputs):
        return None
    if any(x.dtype == torch.float32 and x.ndim == 2 and x.shape[1] > WIDEST_FLOAT32 for x in inputs):
        return "torch's float32 product is faster for rows so wide"
    wide = any(x.ndim == 2 and x.dtype != torch.bfloat16 and x.shape[1] > WIDEST for x in inputs)
    return "torch's float32 product is as fast for rows so wide" if wide else None


def contested(*inputs: torch.Tensor) -> bool:
    """Say whether `auto` should time this backend against the others: where a factor of few tokens is wide.

    Args:
        inputs: left1, right1, left2 and right2.

    Returns:
        Whether it should.
    """
    wide = [x for x in inputs if x.ndim == 2 and x.dtype == torch.float32 and x.shape[1] > WIDEST_FLOAT32]
    return any(native.contested(x.numel() * x.shape[0]) for x in wide)


def ghost_inner(
    left1: torch.Tensor,
    right1: torch.Tensor,
    left2: torch.Tensor,
    right2: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    threads: int | None = None,
    isa: int = native.BEST,
) -> torch.Tensor:
    """s[n] = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u]).

    Args:
        left1: Float[Tensor, "tokens rows"] or ids.
        right1: Float[Tensor, "tokens cols"] or ids.
        left2: like left1.
        right2: like right1.
        cu_seqlens: Int[Tensor, "examples+1"], row boundaries.
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        Float32[Tensor, "examples"].
    """
    if (cuda := native.elsewhere(ROOM, "ghost_inner", right1)) is not None:
        return cuda(left1, right1, left2, right2, cu_seqlens)
    bounds = list(pairwise(cu_seqlens.tolist()))
    long = [n for n, (start, end) in enumerate(bounds) if _long(end - start, left1, right1, left2, right2)]
    skipped = set(long)
    out = torch.zeros(len(bounds))
    # ids that are converted must live until the call ends; one conversion of a tensor given twice keeps it one factor
    factors = {id(x): x if x.ndim == 2 else x.long().contiguous() for x in (left1, right1, left2, right2)}
    codes = {key: native.matrix(x) if x.ndim == 2 else native.id_vector(x) for key, x in factors.items()}
    native.extension.ghost_inner(
        (codes[id(left1)], codes[id(left2)]),
        (codes[id(right1)], codes[id(right2)]),
        [x for n, span in enumerate(bounds) for x in ((0, 0) if n in skipped else span)],
        out.data_ptr(),
        native.threads(threads),
        isa,
    )
    for n in long:
        start, end = bounds[n]
        parts = {key: x[start:end] for key, x in factors.items()}
        l1, r1, l2, r2 = (parts[id(x)] for x in (left1, right1, left2, right2))
        out[n] = reference.ghost_inner(l1, r1, l2, r2, torch.tensor([0, end - start]))[0]
    return out


def _long(tokens: int, left1: torch.Tensor, right1: torch.Tensor, left2: torch.Tensor, right2: torch.Tensor) -> bool:
    """Say whether G[n] itself, by torch's matrix product, is the cheaper way for an example of so many tokens."""
    if any(x.ndim == 1 for x in (left1, right1, left2, right2)):
        return False
    rows, cols = left1.shape[1], right1.shape[1]
    narrow = native.at_least("avx512_bf16") and left1.dtype == right1.dtype == torch.bfloat16
    gain = BFLOAT16_GAIN if narrow else FLOAT32_GAIN
    if left1 is not left2 or right1 is not right2:
        gain /= 2
    return tokens * (rows + cols) > gain * rows * cols
