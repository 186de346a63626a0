"""Signature, checks and dispatch of the low-rank ghost dot product, whole and in its two halves."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch, library
from gradshield_fast.ops.ghost_dot_lowrank import kernel_native, kernel_triton, reference
from gradshield_fast.ops.segments import segment_sum

OP = "ghost_dot_lowrank"
BACKENDS = dispatch.register(OP, {"native": kernel_native, "triton": kernel_triton, "reference": reference})


def _run_project(a: torch.Tensor, q: torch.Tensor, backend: str) -> torch.Tensor:
    return dispatch.run(OP, backend, "lowrank_project", (a, q), a, q)


def _shape_project(a: torch.Tensor, q: torch.Tensor, backend: str) -> torch.Tensor:
    del backend
    return a.new_empty((a.shape[0], q.shape[1]), dtype=checks.accumulate_dtype(a, q))


def _run_contract(
    z: torch.Tensor, g: torch.Tensor, p: torch.Tensor, member: torch.Tensor, backend: str
) -> torch.Tensor:
    return dispatch.run(OP, backend, "lowrank_contract", (z, g, p), z, g, p, member)


def _shape_contract(
    z: torch.Tensor, g: torch.Tensor, p: torch.Tensor, member: torch.Tensor, backend: str
) -> torch.Tensor:
    del backend
    return z.new_empty((z.shape[0], member.shape[1]), dtype=checks.accumulate_dtype(z, g, p))


_project = library.define(
    "lowrank_project", "(Tensor a, Tensor q, str backend) -> Tensor", _run_project, _shape_project
)
_contract = library.define(
    "lowrank_contract",
    "(Tensor z, Tensor g, Tensor p, Tensor member, str backend) -> Tensor",
    _run_contract,
    _shape_contract,
)


def membership(ranks: Sequence[int], like: torch.Tensor) -> torch.Tensor:
    """Build the 0/1 matrix that says which columns of p and q belong to which direction.

    Args:
        ranks: columns of each direction, in order.
        like: a tensor whose device and dtype the matrix takes.

    Returns:
        Float[Tensor, "ranks directions"].
    """
    owner = torch.tensor([k for k, rank in enumerate(ranks) for _ in range(rank)], dtype=torch.int64)
    return (owner[:, None] == torch.arange(len(ranks))).to(device=like.device, dtype=like.dtype)


def lowrank_project(a: torch.Tensor, q: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """First half: project activations onto a direction's input side, so that `a` need not be kept for the backward.

        z[t, j] = q[:, j] . a[t]

    Args:
        a: Float[Tensor, "tokens d_in"], activation entering the layer.
        q: Float[Tensor, "d_in ranks"], input side of r = p q^T; several directions lie side by side.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "tokens ranks"] (float64 where an input is float64).

    Raises:
        InputError: a shape, dtype or device disagrees.
    """
    checks.need_matrix(OP, "a", a)
    checks.need_matrix(OP, "q", q)
    if a.shape[1] != q.shape[0]:
        raise InputError(f"{OP}: q must have d_in={a.shape[1]} rows (from a), got {tuple(q.shape)}")
    checks.need_one_device(OP, a=a, q=q)
    return _project(a, q, backend)


def lowrank_contract(
    z: torch.Tensor, g: torch.Tensor, p: torch.Tensor, member: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """Second half: position terms from the projected activations and the output gradient.

        u[t, k] = sum_{j of direction k} z[t, j] (p[:, j] . g[t])

    Args:
        z: Float[Tensor, "tokens ranks"], from `lowrank_project`.
        g: Float[Tensor, "tokens d_out"], output gradient of the summed token loss, in nats.
        p: Float[Tensor, "d_out ranks"], output side of r = p q^T.
        member: Float[Tensor, "ranks directions"], from `membership`.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "tokens directions"] (float64 where an input is float64).

    Raises:
        InputError: a shape, dtype or device disagrees.
    """
    checks.need_matrix(OP, "z", z)
    checks.need_matrix(OP, "g", g)
    checks.need_matrix(OP, "p", p)
    checks.need_matrix(OP, "member", member)
    checks.need_same_tokens(OP, z=z, g=g)
    if p.shape != (g.shape[1], z.shape[1]) or member.shape[0] != z.shape[1]:
        raise InputError(
            f"{OP}: p must be [d_out, ranks] = [{g.shape[1]}, {z.shape[1]}] and member [ranks, directions], "
            f"got {tuple(p.shape)} and {tuple(member.shape)}"
        )
    checks.need_one_device(OP, g=g, p=p, member=member)
    return _contract(z, g, p, member, backend)


def ghost_dot_lowrank(
    a: torch.Tensor,
    g: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    ranks: Sequence[int] | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Ghost dot product of every packed example with one or K low-rank reference directions.

        s[n] = <G[n], p q^T>_F = sum_{t in n} (p^T g[t]) . (q^T a[t])

    Args:
        a: Float[Tensor, "tokens d_in"], activation entering the layer.
        g: Float[Tensor, "tokens d_out"], output gradient; L is the *summed* token loss, in nats.
        p: Float[Tensor, "d_out ranks"], output side; the columns of several directions lie side by side.
        q: Float[Tensor, "d_in ranks"], input side.
        cu_seqlens: Int32[Tensor, "examples+1"], row boundaries; None: position terms are returned.
        ranks: columns of each direction, summing to p.shape[1]; None: all columns are one direction.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "examples"] without `ranks`, else "examples directions"; "tokens" in the place of "examples"
        without cu_seqlens. Float64 where an input is float64.

    Raises:
        InputError: a shape, dtype or device disagrees, or `ranks` does not sum to the columns.
        BackendUnavailable: the named backend cannot run these inputs.

    Source: arXiv:2406.11011 (ghost dot product); the low-rank form is the same sum taken in factors.
    """
    checks.need_matrix(OP, "a", a)
    checks.need_matrix(OP, "g", g)
    checks.need_matrix(OP, "p", p)
    checks.need_matrix(OP, "q", q)
    checks.need_same_tokens(OP, a=a, g=g)
    if p.shape[-1] != q.shape[-1]:
        raise InputError(f"{OP}: p and q must have the same columns, got {tuple(p.shape)} and {tuple(q.shape)}")
    if ranks is not None and (sum(ranks) != p.shape[1] or min(ranks, default=0) < 0):
        raise InputError(f"{OP}: ranks must sum to the {p.shape[1]} columns of p, got {list(ranks)}")
    if cu_seqlens is not None:
        checks.need_cu_seqlens(OP, cu_seqlens, a)
    z = lowrank_project(a, q, backend=backend)
    u = lowrank_contract(z, g, p, membership([p.shape[1]] if ranks is None else ranks, z), backend=backend)
    s = u if cu_seqlens is None else segment_sum(u, cu_seqlens, OP)
    return s[:, 0] if ranks is None else s
