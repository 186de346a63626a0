"""The two-sided projection in C++, on the CPU."""

from __future__ import annotations

import torch

from gradshield_fast.ops import native

ROOM = __package__ or ""


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: a, g, p_in and p_out.

    Returns:
        None, or the reason.
    """
    return native.why_not(ROOM, *inputs)


def not_for_auto(*inputs: torch.Tensor) -> str | None:
    """Say why `auto` should pass this backend by.

    Args:
        inputs: a, g, p_in and p_out.

    Returns:
        None, or the reason.
    """
    here, reason = native.not_for_auto(ROOM, *inputs)
    if not here:
        return reason
    # measured: OMP_NUM_THREADS=1 gradshield-fast bench --op ghost_project --isa {avx2,avx512,amx}
    # and, at two threads: python benchmarks/ops/run.py --device cpu
    if inputs[0].dtype == torch.float32 and not contested(*inputs):
        return "float32 is as fast by torch's product"
    if native.at_least("avx2"):
        return None
    return "not faster than torch's products with this instruction set"


def contested(*inputs: torch.Tensor) -> bool:
    """Say whether `auto` should time this backend against the others.

    Args:
        inputs: a, g, p_in and p_out.

    Returns:
        Whether it should.
    """
    a, g, p_in, p_out = inputs
    return a.dtype == torch.float32 and native.contested(a.numel() * p_in.shape[1] + g.numel() * p_out.shape[1])


def ghost_project(
    a: torch.Tensor,
    g: torch.Tensor,
    p_in: torch.Tensor,
    p_out: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    threads: int | None = None,
    isa: int = native.BEST,
) -> torch.Tensor:
    """s[n] = sum_{t in n} (p_out^T g[t]) (p_in^T a[t])^T.

    Args:
        a: Float[Tensor, "tokens d_in"].
        g: Float[Tensor, "tokens d_out"].
        p_in: Float[Tensor, "d_in k_in"].
        p_out: Float[Tensor, "d_out k_out"].
        cu_seqlens: Int[Tensor, "examples+1"].
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        Float32[Tensor, "examples k_out k_in"].
    """
    if (cuda := native.elsewhere(ROOM, "ghost_project", a)) is not None:
        return cuda(a, g, p_in, p_out, cu_seqlens)
    out = torch.empty(cu_seqlens.numel() - 1, p_out.shape[1], p_in.shape[1])
    if out.numel():
        native.extension.ghost_project(
            native.matrix(a),
            native.matrix(g),
            native.matrix(p_in),
            native.matrix(p_out),
            cu_seqlens.tolist(),
            out.data_ptr(),
            native.threads(threads),
            isa,
        )
    return out
