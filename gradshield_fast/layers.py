"""Layer type -> rule, one line each; every other weight goes to the universal rule (universal.py).

A rule here is only a faster way to the universal rule's sum over positions of g[t] . y_dot[t]. Choosing one by a
module's class may be wrong for a subclass that does more; that is found before scoring starts, because every plan is
checked against autograd on a small batch (plan.py), and a rule that disagrees is replaced by the universal one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from gradshield_fast.direction import Entry
from gradshield_fast.layout import Layout
from gradshield_fast.matrix_rules import EmbeddingRule, MatrixRule
from gradshield_fast.ops.scale_dot import scale_dot
from gradshield_fast.rule import Context, Rule
from gradshield_fast.tally import Tally

Normalised = tuple[torch.Tensor, torch.Tensor | None]
"""x_hat as two factors: Float[Tensor, "... d"], and Float[Tensor, "... 1"], a number a position, or None where it is 1.

An RMSNorm's x_hat is its input times 1 / rms, so that it need not be written: a position's term is that of the input,
multiplied once.
"""


class ScaleRule:
    """Norm weights and biases: u[t] = sum_i g[t, i] x_hat[t, i] r[i], with x_hat = 1 for a bias."""

    def __init__(
        self,
        weight: str,
        entries: Sequence[Entry | None],
        device: torch.device,
        context: Context,
        normalise: Callable[[Any, torch.Tensor], Normalised] | None,
    ) -> None:
        """Prepare the direction on a vector weight.

        Args:
            weight: its name.
            entries: Float[Tensor, "d"] of each direction, or None.
            device: where the module is.
            context: what the scorer's rules share.
            normalise: (module, input) -> x_hat, in factors; None for a bias.
        """
        self.weight, self.context, self.normalise = weight, context, normalise
        given = [e for e in entries if isinstance(e, torch.Tensor)]
        zero = torch.zeros_like(given[0])
        self.r = torch.stack([e if isinstance(e, torch.Tensor) else zero for e in entries]).to(device, context.dtype)

    def keep(self, module: nn.Module, a: torch.Tensor) -> tuple[nn.Module, torch.Tensor] | None:
        """Keep the norm's input; its normalised form is worked out again in the backward.

        Args:
            module: the norm, or the layer with the bias.
            a: Float[Tensor, "... d"].

        Returns:
            The module and its input; None for a bias.
        """
        return None if self.normalise is None else (module, a.detach())

    def add(self, kept: tuple[nn.Module, torch.Tensor] | None, g: torch.Tensor, layout: Layout, tally: Tally) -> None:
        """Add this use of the weight.

        Args:
            kept: what `keep` returned.
            g: Float[Tensor, "... d"].
            layout: where the rows are.
            tally: the batch's sums.
        """
        x, by = (None, None) if kept is None or self.normalise is None else self.normalise(*kept)
        flat = None if x is None else x.reshape(-1, x.shape[-1])
        u = scale_dot(flat, g.reshape(-1, g.shape[-1]), self.r, backend=self.context.backend)
        u = u.reshape(*g.shape[:-1], -1)
        tally.add(self.weight, u if by is None else u * by, layout)
        if self.context.norms:
            v = g.to(self.context.dtype) if by is None else g * by
            tally.add_vector_norm(self.weight, v if x is None else v * x, layout)


def _layer_norm(module: nn.LayerNorm, a: torch.Tensor) -> Normalised:
    x = a if a.dtype == torch.float64 else a.float()
    return nn.functional.layer_norm(x, module.normalized_shape, None, None, module.eps), None


def _rms_norm(module: Any, a: torch.Tensor) -> Normalised:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if eps is None:
        eps = torch.finfo(module.weight.dtype).eps
    if a.dtype == torch.float64:
        # transformers' norms work in float32 whatever the model's dtype; a float64 oracle sees that rounding too
        x = a if type(module).forward is nn.RMSNorm.forward else a.float()
        return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)).to(a.dtype), None
    # one pass over the input, nothing of its size written
    mean = torch.linalg.vector_norm(a, dim=-1, keepdim=True, dtype=torch.float32).square() / a.shape[-1]
    return a, torch.rsqrt(mean + eps)


def method_of(module: nn.Module, local: str) -> str:
    """Name the rule for a weight by its module's class: a guess that calibration confirms or replaces.

    Args:
        module: the module that owns the weight.
        local: the weight's name in it, "weight" or "bias" as a rule.

    Returns:
        "linear", "conv1d", "embedding", "layer_norm", "rms_norm", "bias", or "jvp" (the universal rule).
    """
    forward = type(module).forward
    conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    linear = isinstance(module, nn.Linear)  # subclasses too: one that does more is found by calibration
    if local == "bias" and (linear or conv1d or forward is nn.LayerNorm.forward):
        return "bias"
    if local != "weight":
        return "jvp"
    if linear:
        return "linear"
    if conv1d:
        return "conv1d"
    if forward is nn.Embedding.forward or (isinstance(module, nn.Embedding) and hasattr(module, "embed_scale")):
        # renormalised tables change in the forward pass, and frequency scaling changes the gradient
        plain = getattr(module, "max_norm", None) is None and not getattr(module, "scale_grad_by_freq", False)
        return "embedding" if plain else "jvp"
    if forward is nn.LayerNorm.forward and len(getattr(module, "normalized_shape", ())) == 1:
        return "layer_norm"
    if type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", torch.empty(0, 0)).ndim == 1:
        return "rms_norm"
    return "jvp"


def make_rule(
    method: str, weight: str, entries: Sequence[Entry | None], device: torch.device, context: Context
) -> Rule:
    """Make the rule that `method_of` named.

    Args:
        method: the rule's name.
        weight: the weight's name in the model.
        entries: the direction's entry on the weight, one for each direction, or None.
        device: where the weight is.
        context: what the scorer's rules share.

    Returns:
        The rule.
    """
    if method == "linear":
        return MatrixRule(weight, entries, device, context)
    if method == "conv1d":
        return MatrixRule(weight, entries, device, context, transposed=True)
    if method == "embedding":
        return EmbeddingRule(weight, entries, device, context)
    normalise = {"layer_norm": _layer_norm, "rms_norm": _rms_norm, "bias": None}[method]
    return ScaleRule(weight, entries, device, context, normalise)
