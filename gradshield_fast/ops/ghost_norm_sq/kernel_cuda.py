"""The ghost norm in CUDA C++: csrc/ghost_norm_sq."""

from __future__ import annotations

from itertools import pairwise

import torch

from gradshield_fast.ops import cuda

TILE = 64
"""Tokens, or columns, on each side of a block's tile."""


def why_not(left1: torch.Tensor, right1: torch.Tensor, left2: torch.Tensor, right2: torch.Tensor) -> str | None:
    """Say why this backend cannot run.

    Args:
        left1: Float[Tensor, "tokens rows"] or ids.
        right1: Float[Tensor, "tokens cols"] or ids.
        left2: like left1.
        right2: like right1.

    Returns:
        None where it can, else the reason.
    """
    if any(x.ndim == 1 for x in (left1, right1, left2, right2)):
        return "ids in the place of a factor run on the reference"
    return cuda.why_not(left1, right1, left2, right2)


def tile_lists(
    bounds: list[int], left_width: int, right_width: int, *, same: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """List the tiles of every example, in the form that takes fewer operations for it.

    The matrices of token products are symmetric where both gradients are the same: a tile above the diagonal counts
    twice and its mirror image is left out.

    Args:
        bounds: row boundaries, on the host.
        left_width: columns of the left factors.
        right_width: columns of the right factors.
        same: whether both gradients are one.

    Returns:
        Int32[Tensor, "tiles 4"] of the form over tokens and of the form over columns: example, first tile, second tile,
        weight; and Int64[Tensor, "examples 2"], where an example's tiles start and stop, those over tokens counted
        first.
    """
    by_tokens, by_columns, counts = [], [], []
    columns = torch.cartesian_prod(torch.arange(-(-left_width // TILE)), torch.arange(-(-right_width // TILE)))
    for n, (start, end) in enumerate(pairwise(bounds)):
        tokens = end - start
        products = tokens * (left_width + right_width) / (2 if same else 1)
        outer = products > left_width * right_width
        if outer:
            tiles = columns
        else:
            side = torch.arange(-(-tokens // TILE))
            tiles = torch.cartesian_prod(side, side)
            tiles = tiles[tiles[:, 0] <= tiles[:, 1]] if same else tiles
        weight = 2 - (tiles[:, 0] == tiles[:, 1]).long() if same and not outer else torch.ones(len(tiles))
        item = torch.stack([torch.full((len(tiles),), n), tiles[:, 0], tiles[:, 1], weight.long()], 1)
        (by_columns if outer else by_tokens).append(item)
        counts.append((outer, len(tiles)))
    empty = torch.zeros(0, 4, dtype=torch.int64)
    first, second = torch.cat([empty, *by_tokens]), torch.cat([empty, *by_columns])
    return first.int(), second.int(), _spans(counts, len(first))


def _spans(counts: list[tuple[bool, int]], over_tokens: int) -> torch.Tensor:
    """Say where each example's parts lie.

    Args:
        counts: for each example, whether it is in the form over columns, and its tiles.
        over_tokens: tiles of the form over tokens, after which those over columns lie.

    Returns:
        Int64[Tensor, "examples 2"].
    """
    at = [0, over_tokens]
    spans = []
    for outer, count in counts:
        spans.append((at[outer], at[outer] + count))
        at[outer] += count
    return torch.tensor(spans, dtype=torch.int64).reshape(-1, 2)


def ghost_inner(
    left1: torch.Tensor, right1: torch.Tensor, left2: torch.Tensor, right2: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """s[n] = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u]), in the cheaper of its two orders.

    The list of tiles depends on the boundaries, so they are brought to the host: one synchronisation.

    Args:
        left1: Float[Tensor, "tokens rows"].
        right1: Float[Tensor, "tokens cols"].
        left2: like left1.
        right2: like right1.
        cu_seqlens: Int[Tensor, "examples+1"], row boundaries.

    Returns:
        Float32[Tensor, "examples"].
    """
    factors = [left1, right1, left2, right2]
    device = left1.device
    # values on a device were not checked: boundaries that fall, or leave the tokens, must not make a kernel do so
    cu = cu_seqlens.to("cpu", torch.int64).clamp(0, left1.shape[0]).cummax(0).values
    same = left2 is left1 and right2 is right1
    tokens, columns, spans = tile_lists(cu.tolist(), left1.shape[1], right1.shape[1], same=same)
    cu, tokens, columns, spans = (x.to(device, non_blocking=True) for x in (cu, tokens, columns, spans))
    parts = torch.empty(len(tokens) + len(columns), dtype=torch.float32, device=device)
    cuda.launch("ghost_inner", factors, cu, tokens, parts[: len(tokens)], False, same)
    cuda.launch("ghost_inner", factors, cu, columns, parts[len(tokens) :], True, same)
    out = torch.empty(cu.numel() - 1, dtype=torch.float32, device=device)
    cuda.launch("sum_items", parts, spans, out)
    return out
