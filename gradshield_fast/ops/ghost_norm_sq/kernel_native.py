"""The ghost norm in C++, on the CPU: products of tokens with tokens, a pair of a norm once, no matrix of them kept."""

from __future__ import annotations

import torch

from gradshield_fast.ops import native

ROOM = __package__ or ""


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
    return native.not_for_auto(ROOM, *inputs)[1]


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
    out = torch.empty(cu_seqlens.numel() - 1)
    # ids that are converted must live until the call ends; one conversion of a tensor given twice keeps it one factor
    factors = {id(x): x if x.ndim == 2 else x.long().contiguous() for x in (left1, right1, left2, right2)}
    codes = {key: native.matrix(x) if x.ndim == 2 else native.id_vector(x) for key, x in factors.items()}
    native.extension.ghost_inner(
        (codes[id(left1)], codes[id(left2)]),
        (codes[id(right1)], codes[id(right2)]),
        cu_seqlens.tolist(),
        out.data_ptr(),
        native.threads(threads),
        isa,
    )
    return out
