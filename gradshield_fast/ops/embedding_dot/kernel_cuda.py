"""The embedding's ghost dot product in CUDA C++: csrc/embedding_dot."""

from __future__ import annotations

import torch

from gradshield_fast.ops import cuda


def why_not(ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        ids: Int[Tensor, "tokens"].
        g: Float[Tensor, "tokens d"].
        r: Float[Tensor, "directions vocabulary d"].

    Returns:
        None where it can, else the reason.
    """
    return cuda.why_not(ids, g, r)


def embedding_dot(ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Position terms u[t, k] = g[t] . r[k, ids[t]]; NaN where an id is no row of the table.

    Args:
        ids: Int64[Tensor, "tokens"].
        g: Float[Tensor, "tokens d"].
        r: Float[Tensor, "directions vocabulary d"].

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    u = torch.empty(g.shape[0], r.shape[0], dtype=torch.float32, device=g.device)
    cuda.launch("embedding_dot", ids.long(), g, r, u)
    return u
