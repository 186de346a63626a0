"""What a rule is: how one weight of one module turns (a, g) into position terms, and what all rules share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch

from gradshield_fast.layout import Layout
from gradshield_fast.tally import Tally


@dataclass(frozen=True)
class Context:
    """What every rule of a scorer shares.

    Attributes:
        directions: K.
        dtype: dtype that ops accumulate in: float32, or float64 for a float64 model.
        norms: whether squared norms are kept, so that the activation itself must be.
        backend: backend that the ops run on.
    """

    directions: int
    dtype: torch.dtype
    norms: bool
    backend: str


class Rule(Protocol):
    """How one weight of one module turns (a, g) into position terms."""

    def keep(self, module: Any, a: torch.Tensor) -> Any:
        """Take from the module's input what the backward will need.

        Args:
            module: the module.
            a: its first input.
        """
        ...

    def add(self, kept: Any, g: torch.Tensor, layout: Layout, tally: Tally) -> None:
        """Add this use of the weight.

        Args:
            kept: what `keep` returned.
            g: output gradient.
            layout: where the rows are.
            tally: the batch's sums.
        """
        ...
