"""Signature, checks and dispatch of the ghost Gram matrix."""

from __future__ import annotations

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch, library
from gradshield_fast.ops.ghost_gram import kernel_native, kernel_triton, reference

OP = "ghost_gram"
BACKENDS = dispatch.register(OP, {"native": kernel_native, "triton": kernel_triton, "reference": reference})


def _run(
    a1: torch.Tensor,
    g1: torch.Tensor,
    cu1: torch.Tensor,
    a2: torch.Tensor,
    g2: torch.Tensor,
    cu2: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    checks.need_boundaries(OP, cu1, a1.shape[0], "cu_seqlens1")
    checks.need_boundaries(OP, cu2, a2.shape[0], "cu_seqlens2")
    return dispatch.run(OP, backend, "ghost_gram", (a1, g1, a2, g2), a1, g1, cu1, a2, g2, cu2)


def _shape(
    a1: torch.Tensor,
    g1: torch.Tensor,
    cu1: torch.Tensor,
    a2: torch.Tensor,
    g2: torch.Tensor,
    cu2: torch.Tensor,
    backend: str,
) -> torch.Tensor:
    del backend
    return a1.new_empty((cu1.shape[0] - 1, cu2.shape[0] - 1), dtype=checks.accumulate_dtype(a1, g1, a2, g2))


_gram = library.define(
    "ghost_gram",
    "(Tensor a1, Tensor g1, Tensor cu1, Tensor a2, Tensor g2, Tensor cu2, str backend) -> Tensor",
    _run,
    _shape,
)


def ghost_gram(
    a1: torch.Tensor,
    g1: torch.Tensor,
    cu_seqlens1: torch.Tensor,
    a2: torch.Tensor,
    g2: torch.Tensor,
    cu_seqlens2: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Inner products of every example of one packed batch with every example of another.

        s[n, m] = <G1[n], G2[m]>_F = sum_{t in n} sum_{u in m} (a1[t] . a2[u]) (g1[t] . g2[u]),
        Gi[n] = sum_{t in n} gi[t] ai[t]^T

    Args:
        a1: Float[Tensor, "tokens1 d_in"], activation entering the layer, first batch.
        g1: Float[Tensor, "tokens1 d_out"], output gradient of the summed token loss, in nats.
        cu_seqlens1: Int32[Tensor, "examples1+1"], row boundaries of the first batch; a repeat is an empty example.
        a2: Float[Tensor, "tokens2 d_in"], second batch.
        g2: Float[Tensor, "tokens2 d_out"], second batch.
        cu_seqlens2: Int32[Tensor, "examples2+1"], row boundaries of the second batch.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "examples1 examples2"], nats²/weight²; float64 where an input is float64.

    Raises:
        InputError: a shape, dtype or device disagrees.
        BackendUnavailable: the named backend cannot run these inputs.

    Source: arXiv:2406.11011, the ghost dot product between the examples of two batches.
    """
    for name, x in (("a1", a1), ("g1", g1), ("a2", a2), ("g2", g2)):
        checks.need_matrix(OP, name, x)
    checks.need_same_tokens(OP, a1=a1, g1=g1)
    checks.need_same_tokens(OP, a2=a2, g2=g2)
    if a1.shape[1] != a2.shape[1] or g1.shape[1] != g2.shape[1]:
        raise InputError(
            f"{OP}: both batches must come from one layer: a1 and a2 have {a1.shape[1]} and {a2.shape[1]} columns, "
            f"g1 and g2 {g1.shape[1]} and {g2.shape[1]}"
        )
    checks.need_one_device(OP, a1=a1, a2=a2)
    checks.need_cu_seqlens(OP, cu_seqlens1, a1, "cu_seqlens1")
    checks.need_cu_seqlens(OP, cu_seqlens2, a2, "cu_seqlens2")
    return _gram(a1, g1, cu_seqlens1, a2, g2, cu_seqlens2, backend)
