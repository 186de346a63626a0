"""The ghost norm in CUDA C++: csrc/ghost_norm_sq."""

from __future__ import annotations

from typing import NamedTuple

import torch

from gradshield_fast.ops import cuda
from gradshield_fast.ops.boundaries import derived
from gradshield_fast.ops.segments import held

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


class Plan(NamedTuple):
    """The tiles of every example, each in the form that takes fewer operations for it.

    Attributes:
        over_tokens: Int32[Tensor, "tiles 4"], tiles of the form over tokens: example, first tile, second tile, weight;
            example -1 where the bound on their number leaves a place empty.
        over_columns: the same of the form over columns.
        spans: Int64[Tensor, "examples 2"], where an example's tiles start and stop, those over tokens counted first.
    """

    over_tokens: torch.Tensor
    over_columns: torch.Tensor
    spans: torch.Tensor


def plan(cu: torch.Tensor, tokens: int, left_width: int, right_width: int, *, same: bool) -> Plan:
    """List the tiles on the device that the boundaries lie on: nothing waits for their values.

    The host knows bounds: an example in the form over tokens is no longer than where both forms cost the same, all of
    them have sum_n ceil(tokens[n] / 64) <= (tokens + 63 examples) / 64 tiles along a side, and few can be longer than
    that. A place that stays empty costs a block that ends at once. The matrices of token products are symmetric where
    both gradients are the same: a tile above the diagonal counts twice and its mirror image is left out.

    Args:
        cu: Int64[Tensor, "examples+1"], row boundaries that never fall, within 0..tokens.
        tokens: the number of tokens.
        left_width: columns of the left factors.
        right_width: columns of the right factors.
        same: whether both gradients are one.

    Returns:
        The plan.
    """
    examples = cu.numel() - 1
    widths = left_width + right_width
    # tokens widths / (2 if same) <= left_width right_width
    longest = min((2 if same else 1) * left_width * right_width // widths, tokens) if widths else tokens
    lengths = cu.diff()
    outer = lengths > longest
    side = (lengths + (TILE - 1)) // TILE
    square = side * (side + 1) // 2 if same else side * side
    sides, longest_side = (tokens + (TILE - 1) * examples) // TILE, -(-longest // TILE)
    room = sides * (longest_side + 1) // 2 if same else sides * longest_side
    rows, columns = -(-left_width // TILE), -(-right_width // TILE)
    room_outer = min(examples, tokens // (longest + 1)) * rows * columns

    example, at, starts = _places(torch.where(outer, 0, square), room)
    if same:  # the tiles on and above the diagonal, column by column
        second = ((8.0 * at.double() + 1.0).sqrt() - 1.0).div(2.0).long()
        first = at - second * (second + 1) // 2
        weight = 2 - (first == second).long()
    else:
        across = torch.cat([side.clamp_min(1), side.new_ones(1)])[example]
        first, second, weight = at // across, at % across, torch.ones_like(at)
    over_tokens = torch.stack([example, first, second, weight], 1).int()

    example, at, starts_outer = _places(torch.where(outer, rows * columns, 0), room_outer)
    parts = at // max(columns, 1), at % max(columns, 1), torch.ones_like(at)
    over_columns = torch.stack([example, *parts], 1).int()
    spans = torch.where(outer[:, None], room + _spans(starts_outer), _spans(starts))
    return Plan(over_tokens, over_columns, spans)


def _places(counts: torch.Tensor, room: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Give each of `room` places to an example, in order, as many as it counts.

    Args:
        counts: Int64[Tensor, "examples"], at most `room` together.
        room: places.

    Returns:
        Int64[Tensor, "room"]: each place's example, or -1, and its number among that example's, or 0; and
        Int64[Tensor, "examples+1"], where each example's places start.
    """
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    place = torch.arange(room, device=counts.device)
    example = torch.searchsorted(starts, place, right=True) - 1
    empty = example == counts.numel()
    at = (place - starts[example]).masked_fill(empty, 0)
    return example.masked_fill(empty, -1), at, starts


def _spans(starts: torch.Tensor) -> torch.Tensor:
    return torch.stack([starts[:-1], starts[1:]], 1)


def ghost_inner(
    left1: torch.Tensor, right1: torch.Tensor, left2: torch.Tensor, right2: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """s[n] = sum_{t, u in n} (left1[t] . left2[u]) (right1[t] . right2[u]), in the cheaper of its two orders.

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
    cu = held(cu_seqlens, left1.shape[0], device)
    same = left2 is left1 and right2 is right1
    shape = (left1.shape[0], left1.shape[1], right1.shape[1])
    tokens, columns, spans = derived(cu, ("plan", *shape, same), lambda: plan(cu, *shape, same=same))
    parts = torch.empty(len(tokens) + len(columns), dtype=torch.float32, device=device)
    cuda.launch("ghost_inner", factors, cu, tokens, parts[: len(tokens)], False, same)
    if len(columns):
        cuda.launch("ghost_inner", factors, cu, columns, parts[len(tokens) :], True, same)
    out = torch.empty(cu.numel() - 1, dtype=torch.float32, device=device)
    cuda.launch("sum_items", parts, spans, out)
    return out
