"""The formula of the embedding's ghost dot product in plain PyTorch."""

from __future__ import annotations

import torch

from gradshield_fast.ops.checks import accumulate_dtype


def why_not(*inputs: torch.Tensor) -> None:
    """Say why this backend cannot run: it always can.

    Args:
        inputs: the op's tensors.
    """
    del inputs


def embedding_dot(ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Position terms u[t, k] = g[t] . r[k, ids[t]].

    Args:
        ids: Int64[Tensor, "tokens"].
        g: Float[Tensor, "tokens d"].
        r: Float[Tensor, "directions vocabulary d"].

    Returns:
        Float[Tensor, "tokens directions"], float32 (float64 for float64 inputs).
    """
    dtype = accumulate_dtype(g, r)
    g = g.to(dtype)
    u = g.new_empty(g.shape[0], r.shape[0])
    for k in range(r.shape[0]):
        u[:, k] = torch.einsum("td,td->t", r[k][ids].to(dtype), g)
    return u
