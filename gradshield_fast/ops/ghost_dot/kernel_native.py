"""The ghost dot product in C++, on the CPU: r a[t] is never written."""

from __future__ import annotations

import torch

from gradshield_fast.ops import native

ROOM = __package__ or ""


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: a, g and r.

    Returns:
        None, or the reason.
    """
    return native.why_not(ROOM, *inputs)


def not_for_auto(*inputs: torch.Tensor) -> str | None:
    """Say why `auto` should pass this backend by.

    Args:
        inputs: a, g and r.

    Returns:
        None, or the reason.
    """
    here, reason = native.not_for_auto(ROOM, *inputs)
    if not here:
        return reason
    # measured: OMP_NUM_THREADS=1 gradshield-fast bench --op ghost_dot --isa {avx2,avx512,amx}
    a, g = inputs[0], inputs[1]
    if contested(*inputs):
        return None
    if not native.at_least("amx"):
        return "torch's float32 product is as fast with this instruction set"
    if a.shape[0] < 48 or (a.dtype != torch.bfloat16 and g.shape[1] < 128):
        return "torch's float32 product is as fast for so few tokens or columns"
    return None


def contested(*inputs: torch.Tensor) -> bool:
    """Say whether `auto` should time this backend against the others: not with AMX, whose product torch does not have.

    Args:
        inputs: a, g and r.

    Returns:
        Whether it should.
    """
    a, r = inputs[0], inputs[2]
    return not native.at_least("amx") and native.contested(a.shape[0] * r.numel())


def ghost_dot(
    a: torch.Tensor, g: torch.Tensor, r: torch.Tensor, *, threads: int | None = None, isa: int = native.BEST
) -> torch.Tensor:
    """Position terms u[t, k] = g[t] . (r[k] a[t]).

    Args:
        a: Float[Tensor, "tokens d_in"].
        g: Float[Tensor, "tokens d_out"].
        r: Float[Tensor, "directions d_out d_in"].
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    if (cuda := native.elsewhere(ROOM, "ghost_dot", a)) is not None:
        return cuda(a, g, r)
    u = torch.empty(a.shape[0], r.shape[0])
    if u.numel():
        native.extension.ghost_dot(
            native.matrix(a),
            native.matrix(g),
            native.matrix(r[0]),
            r.shape[0],
            r.stride(0),
            u.data_ptr(),
            native.threads(threads),
            isa,
        )
    return u
