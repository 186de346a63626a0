"""The formula of the scale's and the bias's ghost dot product in plain PyTorch."""

from __future__ import annotations

import torch

from gradshield_fast.ops.checks import accumulate_dtype


def why_not(*inputs: torch.Tensor | None) -> None:
    """Say why this backend cannot run: it always can.

    Args:
        inputs: the op's tensors.
    """
    del inputs


def scale_dot(x_hat: torch.Tensor | None, g: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
    """Position terms u[t, k] = sum_i g[t, i] x_hat[t, i] r[k, i]; x_hat = 1 where it is None.

    Args:
        x_hat: Float[Tensor, "tokens d"] or None.
        g: Float[Tensor, "tokens d"].
        r: Float[Tensor, "directions d"].

    Returns:
        Float[Tensor, "tokens directions"], float32 (float64 for float64 inputs).
    """
    dtype = accumulate_dtype(g, r) if x_hat is None else accumulate_dtype(x_hat, g, r)
    scaled = g.to(dtype) if x_hat is None else g.to(dtype) * x_hat.to(dtype)
    return scaled @ r.to(dtype).T
