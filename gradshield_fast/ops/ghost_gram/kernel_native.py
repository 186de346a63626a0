"""The ghost Gram matrix in C++, on the CPU: products of tokens with tokens, never stored."""

from __future__ import annotations

import torch

from gradshield_fast.ops import native

ROOM = __package__ or ""


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: a1, g1, a2 and g2.

    Returns:
        None, or the reason.
    """
    return native.why_not(ROOM, *inputs)


def not_for_auto(*inputs: torch.Tensor) -> str | None:
    """Say why `auto` should pass this backend by.

    Args:
        inputs: a1, g1, a2 and g2.

    Returns:
        None, or the reason.
    """
    # measured: gradshield-fast bench --op ghost_gram --isa {avx2,avx512}
    if native.at_least("avx512"):
        return None
    return "not faster than torch's products with this instruction set"


def contested(*inputs: torch.Tensor) -> bool:
    """Say whether `auto` should time this backend against the others.

    Args:
        inputs: a1, g1, a2 and g2.

    Returns:
        Whether it should.
    """
    a1, g1, a2 = inputs[:3]
    return native.contested(a1.shape[0] * a2.shape[0] * (a1.shape[1] + g1.shape[1]))


def ghost_gram(
    a1: torch.Tensor,
    g1: torch.Tensor,
    cu1: torch.Tensor,
    a2: torch.Tensor,
    g2: torch.Tensor,
    cu2: torch.Tensor,
    *,
    threads: int | None = None,
    isa: int = native.BEST,
) -> torch.Tensor:
    """s[n, m] = sum_{t in n} sum_{u in m} (a1[t] . a2[u]) (g1[t] . g2[u]).

    Args:
        a1: Float[Tensor, "tokens1 d_in"].
        g1: Float[Tensor, "tokens1 d_out"].
        cu1: Int[Tensor, "examples1+1"].
        a2: Float[Tensor, "tokens2 d_in"].
        g2: Float[Tensor, "tokens2 d_out"].
        cu2: Int[Tensor, "examples2+1"].
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        Float32[Tensor, "examples1 examples2"].
    """
    out = torch.empty(cu1.numel() - 1, cu2.numel() - 1)
    if out.numel():
        native.extension.ghost_gram(
            (native.matrix(a1), native.matrix(g1)),
            cu1.tolist(),
            (native.matrix(a2), native.matrix(g2)),
            cu2.tolist(),
            out.data_ptr(),
            native.threads(threads),
            isa,
        )
    return out
