"""The formula of the ghost dot product in plain PyTorch."""

from __future__ import annotations

import torch

from gradshield_fast.ops.checks import accumulate_dtype


def why_not(*inputs: torch.Tensor) -> None:
    """Say why this backend cannot run: it always can.

    Args:
        inputs: the op's tensors.
    """
    del inputs


def ghost_dot(a: torch.Tensor, g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Position terms u[t, k] = g[t] . (r[k] a[t]), accumulated in float32 (float64 for float64 inputs).

    Args:
        a: Float[Tensor, "tokens d_in"].
        g: Float[Tensor, "tokens d_out"].
        r: Float[Tensor, "directions d_out d_in"].

    Returns:
        Float[Tensor, "tokens directions"].
    """
    dtype = accumulate_dtype(a, g, r)
    a, g = a.to(dtype), g.to(dtype)
    u = a.new_empty(a.shape[0], r.shape[0])
    for k in range(r.shape[0]):
        # (a r^T) costs the same products in either order; the elementwise factor is the one already in memory.
        u[:, k] = torch.einsum("to,to->t", a @ r[k].to(dtype).T, g)
    return u
