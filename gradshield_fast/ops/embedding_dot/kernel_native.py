"""The embedding's ghost dot product in C++, on the CPU: rows of the table are read where they lie."""

from __future__ import annotations

import torch

from gradshield_fast.ops import native

ROOM = __package__ or ""


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        inputs: ids, g and r.

    Returns:
        None, or the reason.
    """
    return native.why_not(ROOM, *inputs)


def not_for_auto(*inputs: torch.Tensor) -> str | None:
    """Say why `auto` should pass this backend by.

    Args:
        inputs: ids, g and r.

    Returns:
        None, or the reason.
    """
    # measured faster with every instruction set: gradshield-fast bench --op embedding_dot --isa ...
    return native.not_for_auto(ROOM, *inputs)[1]


def embedding_dot(
    ids: torch.Tensor, g: torch.Tensor, r: torch.Tensor, *, threads: int | None = None, isa: int = native.BEST
) -> torch.Tensor:
    """Position terms u[t, k] = g[t] . r[k, ids[t]].

    Args:
        ids: Int64[Tensor, "tokens"], rows of the table.
        g: Float[Tensor, "tokens d"].
        r: Float[Tensor, "directions vocabulary d"].
        threads: None: as many as torch uses.
        isa: limit on the instruction set, a position in `native.ISAS`.

    Returns:
        Float32[Tensor, "tokens directions"].
    """
    if (cuda := native.elsewhere(ROOM, "embedding_dot", g)) is not None:
        return cuda(ids, g, r)
    ids = ids.contiguous()
    u = torch.empty(g.shape[0], r.shape[0])
    if u.numel():
        native.extension.embedding_dot(
            ids.data_ptr(),
            native.matrix(g),
            native.matrix(r[0]),
            r.shape[0],
            r.stride(0),
            u.data_ptr(),
            native.threads(threads),
            isa,
        )
    return u
