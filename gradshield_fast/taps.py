"""The capture that torch.compile sees through: position terms leave the backward pass as the gradient of a carrier.

    y = f(a);    y' = Tap(y, c, kept) = y;    backward:  dL/dy = g goes on as it is,  dL/dc = u(kept, g)

The carrier c is a tensor of zeros that nothing reads. Each tapped layer names its position terms as the carrier's
gradient, so that autograd adds them up over the layers, and a compiler that traces the model's backward pass traces
the scoring with it, where hooks would be out of its sight. Squared norms leave by a second carrier in the same way.
Only rules that go by positions can be tapped: linear layers, norm weights and biases.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gradshield_fast.capture import Site
from gradshield_fast.layers import ScaleRule
from gradshield_fast.matrix_rules import MatrixRule
from gradshield_fast.ops import ghost_norm_sq
from gradshield_fast.repeated import reclassed, with_forward
from gradshield_fast.rule import Rule


@dataclass(eq=False)
class Carrier:
    """Where a batch's sums arrive; shared by all the taps of a scorer.

    Attributes:
        terms: Float32[Tensor, "tokens directions"], zeros whose gradient is the sum of the taps' position terms; None
            between batches, when taps do nothing.
        squares: Float32[Tensor, "rows"], the same for squared norms; None without norms.
        bounds: Int32[Tensor, "rows+1"], row n owns tokens bounds[n]:bounds[n+1].
        member: Float32[Tensor, "rows tokens"], 1 where a token is the row's; None without norms.
    """

    terms: torch.Tensor | None = None
    squares: torch.Tensor | None = None
    bounds: torch.Tensor | None = None
    member: torch.Tensor | None = None


class _MatrixTap(torch.autograd.Function):
    """A linear layer's terms, from its activation or its projection."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        y: torch.Tensor,
        terms: torch.Tensor,
        squares: torch.Tensor | None,
        rule: MatrixRule,
        a: torch.Tensor | None,
        z: torch.Tensor | None,
        bounds: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(a, z, bounds)
        ctx.rule, ctx.norms = rule, squares is not None
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        a, z, bounds = ctx.saved_tensors
        flat = g.reshape(-1, g.shape[-1])
        u = ctx.rule.terms(a, z, flat)
        square = ghost_norm_sq(a, flat, bounds, backend=ctx.rule.context.backend) if ctx.norms else None
        return g, u, square, None, None, None, None


class _ScaleTap(torch.autograd.Function):
    """A norm weight's or a bias's terms, in plain operations that a compiler fuses with the layer's own."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        y: torch.Tensor,
        terms: torch.Tensor,
        squares: torch.Tensor | None,
        x: torch.Tensor | None,
        by: torch.Tensor | None,
        r: torch.Tensor,
        member: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(x, by, r, member)
        ctx.norms, ctx.tokens = squares is not None, terms.shape[0]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, by, r, member = ctx.saved_tensors
        v = g.to(r.dtype)
        if x is not None:
            v = v * x.to(r.dtype)
        if by is not None:
            v = v * by
        # a norm of each head has several positions a token
        v = v.reshape(ctx.tokens, -1, g.shape[-1]).sum(1)
        u = torch.stack([(v * r[k]).sum(-1) for k in range(r.shape[0])], -1)
        square = (member @ v).square().sum(-1) if ctx.norms else None
        return g, u, square, None, None, None, None


class Tap:
    """What a tapped module carries: its rules, and where their sums go."""

    def __init__(self, rules: Sequence[Rule], carrier: Carrier) -> None:
        """Sort the rules.

        Args:
            rules: the module's.
            carrier: shared by all the taps.
        """
        self.carrier = carrier
        self.matrices = [rule for rule in rules if isinstance(rule, MatrixRule)]
        self.scales = [rule for rule in rules if isinstance(rule, ScaleRule)]

    def apply(self, module: nn.Module, a: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Tap one call of the module.

        Args:
            module: the module.
            a: its input.
            y: its output.

        Returns:
            The output, with a backward pass that also feeds the carrier.
        """
        terms, squares = self.carrier.terms, self.carrier.squares
        if terms is None:
            return y
        for rule in self.matrices:
            z = rule.project(a)
            kept = a.detach().reshape(-1, a.shape[-1]) if rule.r is not None or squares is not None else None
            y = _MatrixTap.apply(y, terms, squares, rule, kept, z, self.carrier.bounds)  # pyright: ignore
        for rule in self.scales:
            x, by = (None, None) if rule.normalise is None else rule.normalise(module, a.detach())
            y = _ScaleTap.apply(y, terms, squares, x, by, rule.r, self.carrier.member)  # pyright: ignore
        return y


_KINDS: dict[type, type] = {}


def _tapped_kind(kind: type) -> type:
    """The class whose forward taps; made once, so that a compiler sees one class for every layer of a kind."""
    if kind not in _KINDS:

        def forward(self: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            y = kind.forward(self, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
            return self._gradshield_tap.apply(self, args[0] if args else next(iter(kwargs.values())), y)

        _KINDS[kind] = with_forward(kind, forward)
    return _KINDS[kind]


@contextmanager
def tapped(sites: Sequence[Site], carrier: Carrier) -> Iterator[None]:
    """Tap the modules of some sites, by giving them a class whose forward does, and take it back at the end.

    Args:
        sites: the modules, with rules for linear layers, norm weights and biases only.
        carrier: where their sums go.

    Yields:
        Nothing.
    """
    taps = {}
    for site in sites:
        rules = [rule for group in site.rules.values() for rule in group]
        taps[site.module] = {"_gradshield_tap": Tap(rules, carrier)}
    with reclassed({module: _tapped_kind(type(module)) for module in taps}, taps):
        yield
