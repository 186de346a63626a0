"""The scale's and the bias's ghost dot product in C++, on the CPU: one pass over both, no product stored."""

from __future__ import annotations

import torch

from gradshield_fast.ops import native

ROOM = __package__ or ""

NO_SCALE: native.TensorCode = (0, 0, -1, 1, 1, 0)
"""What the extension takes for a bias, in the place of x_hat."""


def why_not(*inputs: torch.Tensor | None) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: x_hat or None, g and r.

    Returns:
        None, or the reason.
    """
    return native.why_not(ROOM, *(x for x in inputs if x is not None))


def not_for_auto(*inputs: torch.Tensor | None) -> str | None:
    """Say why `auto` should pass this backend by.

    Args:
        inputs: x_hat or None, g and r.

    Returns:
        None, or the reason.
    """
    given = [x for x in inputs if x is not None]
    here, reason = native.not_for_auto(ROOM, *given)
    if not here:
        return reason
    # measured at two threads: python benchmarks/ops/run.py --device cpu
    float32 = all(x.dtype == torch.float32 for x in given)
    return "float32 is as fast by torch" if float32 and not contested(*inputs) else None


def contested(*inputs: torch.Tensor | None) -> bool:
    """Say whether `auto` should time this backend against the others.

    Args:
        inputs: x_hat or None, g and r.

    Returns:
        Whether it should.
    """
    g, r = inputs[1], inputs[2]
    float32 = all(x is None or x.dtype == torch.float32 for x in inputs)
    # an element that is read once takes as long as eight multiply-adds of a product
    return g is not None and r is not None and float32 and native.contested((8 + r.shape[0]) * g.numel())


def scale_dot(
    x_hat: torch.Tensor | None,
    g: torch.Tensor,
    r: torch.Tensor,
    *,
    threads: int | None = None,
    isa: int = native.BEST,
) -> torch.Tensor:
    """Position terms u[t, k] = sum_i g[t, i] x_hat[t, i] r[k, i]; x_hat = 1 where it is None.

    Args:
        x_hat: Float[Tensor, "tokens d"] or None.
        g: Float[Tensor, "tokens d"].
        r: Float[Tensor, "directions d"].
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    if (cuda := native.elsewhere(ROOM, "scale_dot", g)) is not None:
        return cuda(x_hat, g, r)
    u = torch.empty(g.shape[0], r.shape[0])
    if u.numel():
        scale = NO_SCALE if x_hat is None else native.matrix(x_hat)
        native.extension.scale_dot(
            scale, native.matrix(g), native.matrix(r), u.data_ptr(), native.threads(threads), isa
        )
    return u
