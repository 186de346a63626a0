"""Signature, checks and dispatch of the ghost dot product."""

from __future__ import annotations

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch, library
from gradshield_fast.ops.ghost_dot import kernel_native, kernel_triton, reference
from gradshield_fast.ops.segments import segment_sum

OP = "ghost_dot"
BACKENDS = dispatch.register(OP, {"native": kernel_native, "triton": kernel_triton, "reference": reference})


def _run(a: torch.Tensor, g: torch.Tensor, r: torch.Tensor, backend: str) -> torch.Tensor:
    return dispatch.run(OP, backend, "ghost_dot", (a, g, r), a, g, r)


def _shape(a: torch.Tensor, g: torch.Tensor, r: torch.Tensor, backend: str) -> torch.Tensor:
    del backend
    return a.new_empty((a.shape[0], r.shape[0]), dtype=checks.accumulate_dtype(a, g, r))


_terms = library.define("ghost_dot_terms", "(Tensor a, Tensor g, Tensor r, str backend) -> Tensor", _run, _shape)


def ghost_dot(
    a: torch.Tensor,
    g: torch.Tensor,
    r: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Ghost dot product of every packed example with one or K dense reference directions.

        s[n] = <G[n], r>_F = sum_{t in n} g[t] . (r a[t]),      G[n] = sum_{t in n} g[t] a[t]^T

    Args:
        a: Float[Tensor, "tokens d_in"], activation entering the layer.
        g: Float[Tensor, "tokens d_out"], output gradient; L is the *summed* token loss, in nats.
        r: Float[Tensor, "d_out d_in"], reference direction laid out like the weight of a linear layer; or
            Float[Tensor, "directions d_out d_in"].
        cu_seqlens: Int32[Tensor, "examples+1"], starts at 0, ends at tokens; a repeat is an empty example. None: no
            row sums, the position terms u[t] = g[t] . (r a[t]) are returned.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "examples"], or "examples directions" for a three-dimensional r, in nats²/weight² when r is a
        loss gradient; "tokens" in the place of "examples" without cu_seqlens. Float64 where an input is float64.

    Raises:
        InputError: a shape, dtype or device disagrees.
        BackendUnavailable: the named backend cannot run these inputs.

    Source: the ghost dot product of arXiv:2406.11011, with the validation gradient stored as `r`.
    """
    checks.need_matrix(OP, "a", a)
    checks.need_matrix(OP, "g", g)
    checks.need_same_tokens(OP, a=a, g=g)
    checks.need_float(OP, "r", r)
    single = r.ndim == 2
    if r.ndim not in (2, 3) or r.shape[-2:] != (g.shape[1], a.shape[1]):
        raise InputError(
            f"{OP}: r must be [d_out, d_in] or [directions, d_out, d_in] with d_out={g.shape[1]} (from g) and "
            f"d_in={a.shape[1]} (from a), got {tuple(r.shape)}. Is the weight stored [in, out]? Then pass r.T"
        )
    checks.need_one_device(OP, a=a, r=r)
    if cu_seqlens is not None:
        checks.need_cu_seqlens(OP, cu_seqlens, a)
    r = r[None] if single else r
    u = _terms(a, g, r, backend)
    s = u if cu_seqlens is None else segment_sum(u, cu_seqlens, OP)
    return s[:, 0] if single else s
