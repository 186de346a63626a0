"""Where the rows of a batch lie inside a module's tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Layout:
    """How a tensor's leading axes hold the batch's rows.

    Attributes:
        kind: "rows": the first axis is the rows; "flat": the first axis is rows times tokens, row by row;
            "single": the batch has one row, so that every element belongs to it; "packed": one axis holds the
            tokens of all rows, one row after another without padding.
        token_axis: the axis that holds the row's tokens (for "packed", those of all rows); None where there is none
            (and for "flat").
    """

    kind: str
    token_axis: int | None


class RowAxisLost(Exception):
    """A module's tensors do not keep the batch's rows apart where its rule looks for them.

    Attributes:
        site: the key of the site that raised.
    """

    def __init__(self, site: tuple[str, str], shape: Sequence[int]) -> None:
        """Remember which site raised.

        Args:
            site: (module name, method).
            shape: the leading shape that was met.
        """
        super().__init__(f"{site[0] or 'the model'}: no row axis in {tuple(shape)}")
        self.site = site


def layout_of(lead: Sequence[int], rows: int, tokens: int) -> Layout | None:
    """Recognise a layout by shape alone; calibration then checks it by value.

    Args:
        lead: leading axes of a module's tensor.
        rows: rows of the batch.
        tokens: tokens of the padded batch.

    Returns:
        The layout, or None where no axis matches.
    """
    if lead and lead[0] == rows:
        for axis in range(1, len(lead)):
            if lead[axis] == tokens:
                return Layout("rows", axis)
        if rows > 1 or lead[0] != tokens * rows:
            return Layout("rows", None)
    if lead and lead[0] == rows * tokens:
        return Layout("flat", None)
    return Layout("single", None) if rows == 1 else None


def packed_layout(lead: Sequence[int], tokens: int) -> Layout | None:
    """Recognise a packed layout by shape alone.

    Args:
        lead: leading axes of a module's tensor.
        tokens: tokens of all rows.

    Returns:
        The layout, or None where no axis matches.
    """
    return next((Layout("packed", axis) for axis, size in enumerate(lead) if size == tokens), None)


def by_token(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Bring the tokens of a packed tensor to the front.

    Args:
        x: Tensor "lead... last" with a packed layout.
        layout: where the tokens are.

    Returns:
        Tensor "tokens positions last": the positions that belong to each token.
    """
    assert layout.token_axis is not None
    return x.movedim(layout.token_axis, 0).flatten(1, -2) if x.ndim > 2 else x[:, None]


def by_row(x: torch.Tensor, layout: Layout, rows: int) -> torch.Tensor:
    """View a tensor as one block of positions for each row.

    Args:
        x: Tensor "lead... last", whose lead has the layout.
        layout: where the rows are.
        rows: rows of the batch.

    Returns:
        Tensor "rows positions last".
    """
    return x.reshape(rows, -1, x.shape[-1])


def sum_rows(u: torch.Tensor, layout: Layout, rows: int) -> torch.Tensor:
    """Sum position terms over everything that belongs to a row, in float64.

    Args:
        u: Tensor "lead... directions".
        layout: where the rows are.
        rows: rows of the batch.

    Returns:
        Float64[Tensor, "rows directions"].
    """
    return by_row(u, layout, rows).sum(1, dtype=torch.float64)


def tokens_of(u: torch.Tensor, layout: Layout, rows: int, tokens: int) -> torch.Tensor | None:
    """View a padded tensor as the positions of each token.

    Args:
        u: Tensor "lead... last".
        layout: where the rows and the tokens are.
        rows: rows of the batch.
        tokens: tokens of the padded batch.

    Returns:
        Tensor "rows*tokens positions last", or None where the layout has no token axis.
    """
    if layout.kind == "rows" and layout.token_axis is not None:
        u = u.movedim(layout.token_axis, 1)
    elif layout.kind != "flat":
        return None
    return u.reshape(rows * tokens, -1, u.shape[-1])
