"""Signature, checks and dispatch of the embedding's ghost dot product."""

from __future__ import annotations

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch, library
from gradshield_fast.ops.embedding_dot import kernel_native, kernel_triton, reference
from gradshield_fast.ops.segments import segment_sum

OP = "embedding_dot"
BACKENDS = dispatch.register(OP, {"native": kernel_native, "triton": kernel_triton, "reference": reference})


def _run(ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor, backend: str) -> torch.Tensor:
    if ids.device.type == "cpu" and ids.numel() and not (int(ids.min()) >= 0 and int(ids.max()) < r.shape[1]):
        raise InputError(
            f"{OP}: ids must lie in 0..{r.shape[1] - 1} (the table's rows), got {int(ids.min())}..{int(ids.max())}"
        )
    return dispatch.run(OP, backend, "embedding_dot", (ids, g, r), ids.long(), g, r)


def _shape(ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor, backend: str) -> torch.Tensor:
    del backend
    return g.new_empty((ids.shape[0], r.shape[0]), dtype=checks.accumulate_dtype(g, r))


_terms = library.define("embedding_dot_terms", "(Tensor ids, Tensor g, Tensor r, str backend) -> Tensor", _run, _shape)


def embedding_dot(
    ids: torch.Tensor,
    g: torch.Tensor,
    r: torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """Ghost dot product of every packed example with a direction on an embedding table.

        s[n] = <G[n], r>_F = sum_{t in n} g[t] . r[ids[t]],      G[n] = sum_{t in n} onehot(ids[t]) g[t]^T

    Args:
        ids: Int64[Tensor, "tokens"], rows of the table that were looked up.
        g: Float[Tensor, "tokens d"], gradient of the summed token loss with respect to the embedding's output.
        r: Float[Tensor, "vocabulary d"] or Float[Tensor, "directions vocabulary d"].
        cu_seqlens: Int32[Tensor, "examples+1"], row boundaries; None: position terms are returned.
        backend: "auto" or a backend's name.

    Returns:
        Float32[Tensor, "examples"], or "examples directions" for a three-dimensional r; "tokens" in the place of
        "examples" without cu_seqlens. Float64 where an input is float64.

    Raises:
        InputError: a shape, dtype or device disagrees.
        BackendUnavailable: the named backend cannot run these inputs.

    Source: arXiv:2406.11011, written for a one-hot activation.
    """
    checks.need_matrix(OP, "g", g)
    checks.need_index(OP, "ids", ids)
    checks.need_same_tokens(OP, ids=ids, g=g)
    checks.need_float(OP, "r", r)
    single = r.ndim == 2
    if r.ndim not in (2, 3) or r.shape[-1] != g.shape[1]:
        raise InputError(
            f"{OP}: r must be [vocabulary, d] or [directions, vocabulary, d] with d={g.shape[1]} (from g), "
            f"got {tuple(r.shape)}"
        )
    checks.need_one_device(OP, g=g, r=r)
    if cu_seqlens is not None:
        checks.need_cu_seqlens(OP, cu_seqlens, g)
    r = r[None] if single else r
    u = _terms(ids, g, r, backend)
    s = u if cu_seqlens is None else segment_sum(u, cu_seqlens, OP)
    return s[:, 0] if single else s
