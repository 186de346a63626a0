"""Sums over the tokens of each packed example, the same bits every time."""

from __future__ import annotations

import torch

from gradshield_fast.ops import checks, library
from gradshield_fast.ops.boundaries import derived


def held(cu_seqlens: torch.Tensor, tokens: int, device: torch.device) -> torch.Tensor:
    """Bring row boundaries to a device, held to the tokens that there are.

    On a GPU nobody has looked at their values (`checks.need_boundaries`), and no kernel may read where they lead.

    Args:
        cu_seqlens: Int[Tensor, "examples+1"], row boundaries.
        tokens: the number of tokens.
        device: where they are wanted.

    Returns:
        Int64[Tensor, "examples+1"], within 0..tokens and never falling.
    """
    return derived(
        cu_seqlens,
        ("held", tokens, device),
        lambda: cu_seqlens.to(device=device, dtype=torch.int64).clamp(0, tokens).cummax(0).values,
    )


def segment_sum(u: torch.Tensor, cu_seqlens: torch.Tensor, op: str = "segment_sum") -> torch.Tensor:
    """Sum position terms over each example's tokens.

        s[n] = sum_{t = cu_seqlens[n]}^{cu_seqlens[n+1] - 1} u[t]

    The sum runs in float64 and in token order, without atomics, so that neither the row's length nor a second run
    changes the result beyond the last rounding.

    Args:
        u: Float[Tensor, "tokens ..."], position terms.
        cu_seqlens: Int[Tensor, "examples+1"], row boundaries; a repeat is an empty example, whose sum is 0.
        op: the op whose terms these are, for messages.

    Returns:
        Tensor of u's dtype, "examples ...".

    Raises:
        InputError: the boundaries do not start at 0, fall, or do not end at the number of tokens.
    """
    return _segment_sum(u, cu_seqlens, op)


def _run(u: torch.Tensor, cu_seqlens: torch.Tensor, op: str) -> torch.Tensor:
    checks.need_boundaries(op, cu_seqlens, u.shape[0])
    on_cpu = cu_seqlens.device.type == "cpu"  # and so checked above
    offsets = cu_seqlens.to(u.device, torch.int64) if on_cpu else held(cu_seqlens, u.shape[0], u.device)
    if u.shape[0] == 0 or offsets.numel() == 1:
        return u.new_zeros((offsets.numel() - 1, *u.shape[1:]))
    return torch.segment_reduce(u.double(), "sum", offsets=offsets, axis=0, initial=0.0).to(u.dtype)


def _shape(u: torch.Tensor, cu_seqlens: torch.Tensor, op: str) -> torch.Tensor:
    del op
    return u.new_empty((cu_seqlens.shape[0] - 1, *u.shape[1:]))


_segment_sum = library.define("segment_sum", "(Tensor u, Tensor cu_seqlens, str op) -> Tensor", _run, _shape)
