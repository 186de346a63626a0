"""Signature, checks and dispatch of the embedding's ghost dot product."""

from __future__ import annotations

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import checks, dispatch
from gradshield_fast.ops.embedding_dot import kernel_native, reference
from gradshield_fast.ops.segments import segment_sum

BACKENDS = dispatch.register(
    "embedding_dot",
    {
        "native": kernel_native,
        "reference": reference,
    },
)


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
    op = "embedding_dot"
    checks.need_matrix(op, "g", g)
    if ids.ndim != 1 or ids.dtype not in (torch.int32, torch.int64):
        raise InputError(f"{op}: ids must be a vector of int32 or int64, got {ids.dtype} of shape {tuple(ids.shape)}")
    tokens = checks.need_same_tokens(op, ids=ids, g=g)
    single = r.ndim == 2
    if r.ndim not in (2, 3) or r.shape[-1] != g.shape[1]:
        raise InputError(
            f"{op}: r must be [vocabulary, d] or [directions, vocabulary, d] with d={g.shape[1]} (from g), "
            f"got {tuple(r.shape)}"
        )
    if ids.device.type == "cpu" and tokens and not (int(ids.min()) >= 0 and int(ids.max()) < r.shape[-2]):
        raise InputError(
            f"{op}: ids must lie in 0..{r.shape[-2] - 1} (the table's rows), got {int(ids.min())}..{int(ids.max())}"
        )
    if cu_seqlens is not None:
        checks.need_cu_seqlens(op, cu_seqlens, tokens)
    r = r[None] if single else r
    _, room = dispatch.pick(op, backend, ids, g, r)
    u = room.embedding_dot(ids.long(), g, r)
    s = u if cu_seqlens is None else segment_sum(u, cu_seqlens)
    return s[:, 0] if single else s
