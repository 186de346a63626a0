"""Signature, checks and dispatch of the scale's and the bias's ghost dot product."""

from __future__ import annotations

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch, library
from gradshield_fast.ops.scale_dot import kernel_native, kernel_triton, reference
from gradshield_fast.ops.segments import segment_sum

OP = "scale_dot"
BACKENDS = dispatch.register(OP, {"native": kernel_native, "triton": kernel_triton, "reference": reference})


def _run(x_hat: torch.Tensor | None, g: torch.Tensor, r: torch.Tensor, backend: str) -> torch.Tensor:
    return dispatch.run(OP, backend, "scale_dot", (x_hat, g, r), x_hat, g, r)


def _shape(x_hat: torch.Tensor | None, g: torch.Tensor, r: torch.Tensor, backend: str) -> torch.Tensor:
    del backend
    given = (g, r) if x_hat is None else (x_hat, g, r)
    return g.new_empty((g.shape[0], r.shape[0]), dtype=checks.accumulate_dtype(*given))


_terms = library.define("scale_dot_terms", "(Tensor? x_hat, Tensor g, Tensor r, str backend) -> Tensor", _run, _shape)


def scale_dot(
    x_hat: torch.Tensor | None,
    g: torch.Tensor,
    r: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Ghost dot product of every packed example with a direction on a scale (norm weight) or a bias.

        y[t] = w * x_hat[t] + b:      s_w[n] = sum_{t in n} sum_i g[t, i] x_hat[t, i] r[i],      s_b[n]: x_hat = 1

    The same holds where a norm scales by (1 + w). `x_hat` must be the normalised input itself: y / w divides by zero
    where a weight is zero.

    Args:
        x_hat: Float[Tensor, "tokens d"], normalised activation that the scale multiplies; None for a bias.
        g: Float[Tensor, "tokens d"], gradient of the summed token loss with respect to the output.
        r: Float[Tensor, "d"] or Float[Tensor, "directions d"].
        cu_seqlens: Int32[Tensor, "examples+1"], row boundaries; None: position terms are returned.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "examples"], or "examples directions" for a two-dimensional r; "tokens" in the place of
        "examples" without cu_seqlens. Float64 where an input is float64.

    Raises:
        InputError: a shape, dtype or device disagrees.
        BackendUnavailable: the named backend cannot run these inputs.
    """
    checks.need_matrix(OP, "g", g)
    if x_hat is not None:
        checks.need_matrix(OP, "x_hat", x_hat)
        checks.need_same_tokens(OP, x_hat=x_hat, g=g)
        if x_hat.shape != g.shape:
            raise InputError(f"{OP}: x_hat and g must have one shape, got {tuple(x_hat.shape)} and {tuple(g.shape)}")
    checks.need_float(OP, "r", r)
    single = r.ndim == 1
    if r.ndim not in (1, 2) or r.shape[-1] != g.shape[1]:
        raise InputError(f"{OP}: r must be [d] or [directions, d] with d={g.shape[1]} (from g), got {tuple(r.shape)}")
    checks.need_one_device(OP, g=g, r=r)
    if cu_seqlens is not None:
        checks.need_cu_seqlens(OP, cu_seqlens, g)
    r = r[None] if single else r
    u = _terms(x_hat, g, r, backend)
    s = u if cu_seqlens is None else segment_sum(u, cu_seqlens, OP)
    return s[:, 0] if single else s
