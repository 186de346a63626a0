"""Signature, checks and dispatch of the two-sided projection of per-example gradients."""

from __future__ import annotations

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch, library
from gradshield_fast.ops.ghost_project import kernel_native, kernel_triton, reference

OP = "ghost_project"
BACKENDS = dispatch.register(OP, {"native": kernel_native, "triton": kernel_triton, "reference": reference})


def _run(
    a: torch.Tensor,
    g: torch.Tensor,
    p_in: torch.Tensor,
    p_out: torch.Tensor,
    cu_seqlens: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    checks.need_boundaries(OP, cu_seqlens, a.shape[0])
    return dispatch.run(OP, backend, "ghost_project", (a, g, p_in, p_out), a, g, p_in, p_out, cu_seqlens)


def _shape(
    a: torch.Tensor,
    g: torch.Tensor,
    p_in: torch.Tensor,
    p_out: torch.Tensor,
    cu_seqlens: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    del backend
    dtype = checks.accumulate_dtype(a, g, p_in, p_out)
    return a.new_empty((cu_seqlens.shape[0] - 1, p_out.shape[1], p_in.shape[1]), dtype=dtype)


_project = library.define(
    "ghost_project",
    "(Tensor a, Tensor g, Tensor p_in, Tensor p_out, Tensor cu_seqlens, str backend) -> Tensor",
    _run,
    _shape,
)


def ghost_project(
    a: torch.Tensor,
    g: torch.Tensor,
    p_in: torch.Tensor,
    p_out: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Project every packed example's gradient of a linear layer to a small matrix, from both sides.

        s[n] = p_out^T G[n] p_in = sum_{t in n} (p_out^T g[t]) (p_in^T a[t])^T,      G[n] = sum_{t in n} g[t] a[t]^T

    With p_out and p_in random this is the compressed gradient of projected influence scores; with orthonormal bases of
    a direction's two sides it holds all that a low-rank direction can see of G[n].

    Args:
        a: Float[Tensor, "tokens d_in"], activation entering the layer.
        g: Float[Tensor, "tokens d_out"], output gradient of the summed token loss, in nats.
        p_in: Float[Tensor, "d_in k_in"], input side of the projection.
        p_out: Float[Tensor, "d_out k_out"], output side of the projection.
        cu_seqlens: Int32[Tensor, "examples+1"], row boundaries; a repeat is an empty example, whose projection is 0.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "examples k_out k_in"], nats/weight; float64 where an input is float64.

    Raises:
        InputError: a shape, dtype or device disagrees.
        BackendUnavailable: the named backend cannot run these inputs.

    Source: arXiv:2405.13954 (LoGra), the two-sided projection of a layer's per-example gradient.
    """
    for name, x in (("a", a), ("g", g), ("p_in", p_in), ("p_out", p_out)):
        checks.need_matrix(OP, name, x)
    checks.need_same_tokens(OP, a=a, g=g)
    if p_in.shape[0] != a.shape[1] or p_out.shape[0] != g.shape[1]:
        raise InputError(
            f"{OP}: p_in must have d_in={a.shape[1]} rows (from a) and p_out d_out={g.shape[1]} (from g), "
            f"got {tuple(p_in.shape)} and {tuple(p_out.shape)}"
        )
    checks.need_one_device(OP, a=a, p_in=p_in, p_out=p_out)
    checks.need_cu_seqlens(OP, cu_seqlens, a)
    return _project(a, g, p_in, p_out, cu_seqlens, backend)
