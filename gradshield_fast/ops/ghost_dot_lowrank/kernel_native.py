"""The low-rank ghost dot product in C++, on the CPU: a and g are read once, in their own type, by any strides."""

from __future__ import annotations

import torch

from gradshield_fast.ops import native

ROOM = __package__ or ""


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: a and q, or z, g and p.

    Returns:
        None, or the reason.
    """
    return native.why_not(ROOM, *inputs)


def not_for_auto(*inputs: torch.Tensor) -> str | None:
    """Say why `auto` should pass this backend by.

    Args:
        inputs: a and q, or z, g and p.

    Returns:
        None, or the reason.
    """
    here, reason = native.not_for_auto(ROOM, *inputs)
    if not here:
        return reason
    # measured: OMP_NUM_THREADS=1 gradshield-fast bench --op ghost_dot_lowrank --isa {avx2,avx512,amx}
    x, ranks = _product(*inputs)
    if x.dtype == torch.float32 and not contested(*inputs):
        return "float32 is as fast by torch's product"
    if native.at_least("avx512") or (native.at_least("avx2") and x.numel() >= 1 << 19 and ranks <= 32):
        return None
    return "not faster than torch's product with this instruction set"


def contested(*inputs: torch.Tensor) -> bool:
    """Say whether `auto` should time this backend against the others.

    Args:
        inputs: a and q, or z, g and p.

    Returns:
        Whether it should.
    """
    x, ranks = _product(*inputs)
    return x.dtype == torch.float32 and native.contested(x.numel() * ranks)


def _product(*inputs: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The long factor, and the columns of the other."""
    return (inputs[0], inputs[1].shape[-1]) if len(inputs) == 2 else (inputs[1], inputs[0].shape[-1])


def lowrank_project(
    a: torch.Tensor, q: torch.Tensor, *, threads: int | None = None, isa: int = native.BEST
) -> torch.Tensor:
    """z[t, j] = q[:, j] . a[t].

    Args:
        a: Float[Tensor, "tokens d_in"].
        q: Float[Tensor, "d_in ranks"].
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        Float32[Tensor, "tokens ranks"].
    """
    if (cuda := native.elsewhere(ROOM, "lowrank_project", a)) is not None:
        return cuda(a, q)
    z = torch.empty(a.shape[0], q.shape[1])
    native.extension.lowrank_project(native.matrix(a), native.matrix(q), z.data_ptr(), native.threads(threads), isa)
    return z


def lowrank_contract(
    z: torch.Tensor,
    g: torch.Tensor,
    p: torch.Tensor,
    member: torch.Tensor,
    *,
    threads: int | None = None,
    isa: int = native.BEST,
) -> torch.Tensor:
    """u[t, k] = sum_{j of direction k} z[t, j] (p[:, j] . g[t]).

    Args:
        z: Float[Tensor, "tokens ranks"].
        g: Float[Tensor, "tokens d_out"].
        p: Float[Tensor, "d_out ranks"].
        member: Float[Tensor, "ranks directions"], 1 where column j belongs to direction k, else 0.
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    if (cuda := native.elsewhere(ROOM, "lowrank_contract", g)) is not None:
        return cuda(z, g, p, member)
    belongs = member.float().contiguous()  # small: ranks x directions
    u = torch.empty(g.shape[0], belongs.shape[1])
    native.extension.lowrank_contract(
        native.matrix(z),
        native.matrix(g),
        native.matrix(p),
        belongs.data_ptr(),
        belongs.shape[1],
        u.data_ptr(),
        native.threads(threads),
        isa,
    )
    return u
