"""The universal rule: any module's share of the dot product, from the derivative of its output along the direction.

    s[n] = sum_{t in n} g[t] . y_dot[t],      y_dot = d/de f(theta + e r; inputs) at e = 0

with f the module, theta its own weights and the inputs held fixed. Nothing about the layer needs to be known, so that
experts kept as 3-D weights, convolutions, attention sinks and state-space scales all score right. Three ways to get
there, tried in this order:

    jvp         forward-mode derivative y_dot, one more forward pass of the module for each direction
    double_vjp  the vjp is linear in its cotangent v, so grad_v <J^T v, r> = J r = y_dot; for operators without a
                forward-mode formula but with a second derivative
    row_vjp     one vjp of the module for each row: slow, needs nothing but a first derivative. It also gives the
                squared norms, for which the other two have no form
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_map

from gradshield_fast.direction import Entry
from gradshield_fast.errors import BackendUnavailable, is_out_of_memory
from gradshield_fast.layout import Layout, RowAxisLost
from gradshield_fast.lowrank import LowRank
from gradshield_fast.rule import Context
from gradshield_fast.tally import Tally

CHAIN = ("jvp", "double_vjp", "row_vjp")


class MethodFailed(Exception):
    """A way of the universal rule that this module's operators do not support.

    Attributes:
        site: key of the site that failed.
    """

    def __init__(self, site: tuple[str, str], error: Exception) -> None:
        """Remember which site failed.

        Args:
            site: (module name, method).
            error: what the operator raised.
        """
        super().__init__(f"{site[0] or 'the model'}, {site[1]}: {error}")
        self.site = site


@dataclass
class Call:
    """One call of a module: its inputs, detached, and the derivatives of its outputs once they were worked out.

    Attributes:
        args: positional inputs.
        kwargs: named inputs.
        outputs: number of outputs whose gradient is awaited.
        y_dot: the derivatives of every output along every direction, or None.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: int = 1
    y_dot: list[list[torch.Tensor | None]] | None = None


class UniversalRule:
    """The universal rule at one module, for a set of weights in its subtree."""

    def __init__(
        self,
        key: tuple[str, str],
        module: torch.nn.Module,
        weights: Mapping[str, str],
        entries: Mapping[str, Sequence[Entry | None]],
        context: Context,
    ) -> None:
        """Prepare the directions as tangents of the module's weights.

        Args:
            key: (module name, method).
            module: the module.
            weights: name in the model -> name in the module.
            entries: name in the model -> the direction's entry on it, one for each direction, or None.
            context: what the scorer's rules share.
        """
        self.key, self.module, self.context = key, module, context
        self.weights = dict(weights)
        own = dict(module.named_parameters(remove_duplicate=False))
        self.values = {local: own[local] for local in self.weights.values()}
        self.tangents: list[dict[str, torch.Tensor]] = [
            {
                local: _dense(entry).to(own[local].device, own[local].dtype)
                for name, local in self.weights.items()
                if (entry := entries[name][k]) is not None
            }
            for k in range(context.directions)
        ]

    def add(self, call: Call, output: int, g: torch.Tensor, layout: Layout, tally: Tally) -> None:
        """Add the share of one output of one call.

        Args:
            call: the call.
            output: the output's place among the call's flattened outputs.
            g: its gradient.
            layout: where the rows are in `g`.
            tally: the batch's sums.

        Raises:
            MethodFailed: an operator of the module has no derivative of this kind.
        """
        method = "row_vjp" if tally.norm_sq is not None else self.key[1]
        name = ", ".join(self.weights)
        try:
            if method == "row_vjp":
                self._add_by_row(call, output, g, layout, tally, name)
                return
            if call.y_dot is None:
                directional = self._jvp if method == "jvp" else self._double_vjp
                call.y_dot = [directional(call, k) for k in range(self.context.directions)]
            u = g.new_zeros((*g.shape[:-1], self.context.directions), dtype=self.context.dtype)
            for k, tangents in enumerate(call.y_dot):
                tangent = tangents[output]
                if tangent is not None:
                    u[..., k] = (g.to(u.dtype) * tangent.to(u.dtype)).sum(-1)
            if call.outputs == 1:
                call.y_dot = None
        except RuntimeError as error:
            # a named backend that cannot run is the user's to hear, not a reason to score by another method
            if isinstance(error, BackendUnavailable) or is_out_of_memory(error):
                raise
            raise MethodFailed(self.key, error) from error
        tally.add(name, u, layout)

    def _jvp(self, call: Call, k: int) -> list[torch.Tensor | None]:
        """Derivatives of the module's outputs along direction k, in forward mode."""
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
            duals = {
                local: forward_ad.make_dual(self.values[local].detach(), t) for local, t in self.tangents[k].items()
            }
            out = functional_call(self.module, duals, call.args, call.kwargs)
            return [forward_ad.unpack_dual(y).tangent if _is_float(y) else None for y in tree_flatten(out)[0]]

    def _double_vjp(self, call: Call, k: int) -> list[torch.Tensor | None]:
        """The same derivatives as the gradient, with respect to its cotangent, of the vjp's product with r."""
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            leaves = {local: self.values[local].detach().requires_grad_() for local in self.tangents[k]}
            out = tree_flatten(functional_call(self.module, leaves, call.args, call.kwargs))[0]
            result: list[torch.Tensor | None] = [None] * len(out)
            live = [i for i, y in enumerate(out) if _is_float(y) and y.requires_grad]
            if not live or not leaves:
                return result
            v = [torch.zeros_like(out[i], requires_grad=True) for i in live]
            pulled = torch.autograd.grad(
                [out[i] for i in live], list(leaves.values()), v, create_graph=True, allow_unused=True
            )
            product = sum(
                (x * t).sum() for x, t in zip(pulled, self.tangents[k].values(), strict=True) if x is not None
            )
            if not isinstance(product, torch.Tensor) or not product.requires_grad:
                return result
            for i, y_dot in zip(live, torch.autograd.grad(product, v, allow_unused=True), strict=True):
                result[i] = y_dot
            return result

    def _add_by_row(self, call: Call, output: int, g: torch.Tensor, layout: Layout, tally: Tally, name: str) -> None:
        """One vjp for each row, of this module alone; its gradient is gone before the next row's."""
        if tally.token_dot is not None:
            raise RowAxisLost(self.key, g.shape)  # one vjp a row has no position terms; a jvp nearer to the root may
        if tally.norm_sq is not None and (call.outputs > 1 or not tally.norm_by_weight.keys().isdisjoint(self.weights)):
            raise RowAxisLost(self.key, g.shape)  # the norm of a sum: only nearer to the root is there one output
        leaves = {local: self.values[local].detach().requires_grad_() for local in self.weights.values()}
        rows = tally.rows
        dots = torch.zeros(rows, self.context.directions, dtype=torch.float64, device=g.device)
        norms = {weight: torch.zeros(rows, dtype=torch.float64, device=g.device) for weight in self.weights}
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            y = tree_flatten(functional_call(self.module, leaves, call.args, call.kwargs))[0][output]
            if y.requires_grad:
                for n in range(rows):
                    masked = torch.zeros_like(g)
                    masked.view(rows, -1)[n] = g.reshape(rows, -1)[n]
                    pulled = torch.autograd.grad(
                        y, list(leaves.values()), masked, retain_graph=n + 1 < rows, allow_unused=True
                    )
                    for (weight, local), x in zip(self.weights.items(), pulled, strict=True):
                        if x is None:
                            continue
                        x = x.to(self.context.dtype)
                        norms[weight][n] = x.square().sum(dtype=torch.float64)
                        for k in range(self.context.directions):
                            tangent = self.tangents[k].get(local)
                            if tangent is not None:
                                dots[n, k] += (x * tangent).sum(dtype=torch.float64)
        tally.add_rows(name, dots)
        for weight, norm_sq in norms.items():
            tally.add_norm_sq(weight, norm_sq)


def detached(tree: Any) -> Any:
    """Cut a call's inputs from the graph, sharing their storage and version counters.

    Args:
        tree: any nesting of tensors and other values.

    Returns:
        The same nesting.
    """
    return tree_map(lambda x: x.detach() if isinstance(x, torch.Tensor) else x, tree)


def _is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def _dense(entry: Entry) -> torch.Tensor:
    return entry.dense() if isinstance(entry, LowRank) else entry
