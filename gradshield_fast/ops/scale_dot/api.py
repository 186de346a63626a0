"""Signature, checks and dispatch of the scale's and the bias's ghost dot product."""

from __future__ import annotations

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch
from gradshield_fast.ops.scale_dot import kernel_triton, reference
from gradshield_fast.ops.segments import segment_sum

BACKENDS = dispatch.register(
    "scale_dot",
    {
        "triton": kernel_triton,
        "reference": reference,
    },
)


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
    op = "scale_dot"
    checks.need_matrix(op, "g", g)
    tokens = g.shape[0]
    if x_hat is not None:
        checks.need_matrix(op, "x_hat", x_hat)
        tokens = checks.need_same_tokens(op, x_hat=x_hat, g=g)
        if x_hat.shape != g.shape:
            raise InputError(f"{op}: x_hat and g must have one shape, got {tuple(x_hat.shape)} and {tuple(g.shape)}")
    single = r.ndim == 1
    if r.ndim not in (1, 2) or r.shape[-1] != g.shape[1]:
        raise InputError(f"{op}: r must be [d] or [directions, d] with d={g.shape[1]} (from g), got {tuple(r.shape)}")
    if cu_seqlens is not None:
        checks.need_cu_seqlens(op, cu_seqlens, tokens)
    r = r[None] if single else r
    _, room = dispatch.pick(op, backend, x_hat, g, r)
    u = room.scale_dot(x_hat, g, r)
    s = u if cu_seqlens is None else segment_sum(u, cu_seqlens)
    return s[:, 0] if single else s
