"""Signature, checks and dispatch of the ghost norm and of the inner product behind it."""

from __future__ import annotations

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch, library
from gradshield_fast.ops.ghost_norm_sq import kernel_native, kernel_triton, reference

OP = "ghost_norm_sq"
BACKENDS = dispatch.register(OP, {"native": kernel_native, "triton": kernel_triton, "reference": reference})


def _run(
    left1: torch.Tensor,
    right1: torch.Tensor,
    left2: torch.Tensor,
    right2: torch.Tensor,
    cu_seqlens: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    checks.need_boundaries(OP, cu_seqlens, left1.shape[0])
    for side, x, y in (("left", left1, left2), ("right", right1, right2)):
        for number, ids, matrix in ((1, x, y), (2, y, x)):
            if ids.ndim == 1 and matrix.ndim == 2:
                checks.need_ids(OP, f"ids in {side}{number}", ids, matrix.shape[1])
    factors = (left1, right1, left2, right2)
    return dispatch.run(OP, backend, "ghost_inner", factors, *factors, cu_seqlens)


def _shape(
    left1: torch.Tensor,
    right1: torch.Tensor,
    left2: torch.Tensor,
    right2: torch.Tensor,
    cu_seqlens: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    del backend
    dtype = checks.accumulate_dtype(*(x for x in (left1, right1, left2, right2) if x.is_floating_point()))
    return left1.new_empty((cu_seqlens.shape[0] - 1,), dtype=dtype)


_inner = library.define(
    "ghost_inner",
    "(Tensor left1, Tensor right1, Tensor left2, Tensor right2, Tensor cu_seqlens, str backend) -> Tensor",
    _run,
    _shape,
)


def ghost_norm_sq(a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Squared Frobenius norm of every packed example's gradient of a linear layer.

        ||G[n]||_F^2 = sum_{t, u in n} (a[t] . a[u]) (g[t] . g[u]),      G[n] = sum_{t in n} g[t] a[t]^T

    Norms add over weights that are used once; for a weight with several uses (tied embeddings, a module called
    twice) the cross terms come from `ghost_inner`.

    Args:
        a: Float[Tensor, "tokens d_in"], activation entering the layer; or Int64[Tensor, "tokens"], the ids of an
            embedding, which stand for one-hot rows.
        g: Float[Tensor, "tokens d_out"], output gradient of the summed token loss, in nats.
        cu_seqlens: Int32[Tensor, "examples+1"], row boundaries; a repeat is an empty example, whose norm is 0.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "examples"], nats²/weight²; float64 where an input is float64.

    Raises:
        InputError: a shape, dtype or device disagrees.
        BackendUnavailable: the named backend cannot run these inputs.

    Source: arXiv:1510.01799 (one position), arXiv:2110.05679 (sequences).
    """
    return ghost_inner(g, a, g, a, cu_seqlens, backend=backend).clamp_min(0)


def ghost_inner(
    left1: torch.Tensor,
    right1: torch.Tensor,
    left2: torch.Tensor,
    right2: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Inner product, example by example, of two per-example gradients given as factors.

        s[n] = <G1[n], G2[n]>_F = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u]),
        Gi[n] = sum_{t in n} lefti[t] righti[t]^T

    A linear layer has left = g and right = a; an embedding has left = ids (one-hot rows) and right = g; a layer that
    stores [in, out] has left = a and right = g. With both uses of a tied weight this is the cross term of its norm.

    Args:
        left1: Float[Tensor, "tokens rows"], or Int64[Tensor, "tokens"] for one-hot rows.
        right1: Float[Tensor, "tokens cols"], or ids.
        left2: like left1.
        right2: like right1.
        cu_seqlens: Int32[Tensor, "examples+1"], row boundaries of all four.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "examples"]; float64 where an input is float64.

    Raises:
        InputError: a shape, dtype or device disagrees.
        BackendUnavailable: the named backend cannot run these inputs.
    """
    factors = {"left1": left1, "right1": right1, "left2": left2, "right2": right2}
    for name, x in factors.items():
        checks.need_tensor(OP, name, x)
        if x.ndim == 1 and x.dtype in checks.INDEX_DTYPES:
            continue
        checks.need_matrix(OP, name, x)
    checks.need_same_tokens(OP, **factors)
    if not any(x.is_floating_point() for x in factors.values()):
        raise InputError(f"{OP}: at least one factor must be floating point, got ids only")
    for x, y, side in ((left1, left2, "left"), (right1, right2, "right")):
        if x.ndim == 2 and y.ndim == 2 and x.shape[1] != y.shape[1]:
            raise InputError(f"{OP}: {side}1 and {side}2 must be equally wide, got {x.shape[1]} and {y.shape[1]}")
    checks.need_cu_seqlens(OP, cu_seqlens, left1)
    return _inner(left1, right1, left2, right2, cu_seqlens, backend)
