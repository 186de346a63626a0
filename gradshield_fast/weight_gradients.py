"""Choosing weights, and taking their gradients one at a time as a backward pass brings them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

from gradshield_fast.errors import InputError

Take = Callable[[str, torch.Tensor], None]


def chosen_weights(model: torch.nn.Module, pattern: str | None) -> dict[str, torch.nn.Parameter]:
    """Choose weights by name.

    Args:
        model: the model.
        pattern: regular expression, searched in the names of `model.named_parameters()`; a tied weight is found under
            each of its names. None: the weights that require grad where others do not (PEFT), else all.

    Returns:
        First name -> floating-point weight.

    Raises:
        InputError: the pattern is not a regular expression or matches nothing.
    """
    floating = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if pattern is None:
        chosen = {name: p for name, p in floating.items() if p.requires_grad} or floating
    else:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise InputError(f"weights: {pattern!r} is not a regular expression: {error}") from error
        hits = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if regex.search(name)}
        chosen = {name: p for name, p in floating.items() if id(p) in hits}
    if not chosen:
        some = list(floating)[:: max(1, len(floating) // 4)][:5]
        raise InputError(f"weights: no floating-point weight matches {pattern!r}; names are such as {', '.join(some)}")
    return chosen


@contextmanager
def each_gradient(weights: Mapping[str, torch.nn.Parameter], take: Take) -> Iterator[None]:
    """Hand every backward pass's gradients over, one weight at a time, and free each at once.

    A tied weight's gradient comes once a pass, with all its contributions. The weights are left frozen, with the
    gradients they had.

    Args:
        weights: frozen weights; inside they require grad.
        take: called with a weight's name and its gradient.

    Yields:
        Nothing.
    """

    def hook(name: str) -> Callable[[torch.Tensor], None]:
        def hand_over(weight: torch.Tensor) -> None:
            g, weight.grad = weight.grad, None
            if g is not None:
                take(name, g.to_dense() if g.is_sparse else g)

        return hand_over

    before = {name: weight.grad for name, weight in weights.items()}
    handles = []
    try:
        for name, weight in weights.items():
            weight.grad = None
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(hook(name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(False)
            weight.grad = before[name]


class GradientSum:
    """Sum of gradients in float32 (float64 for a float64 weight), whatever the weights' dtype.

    Attributes:
        sums: weight's name -> sum so far; a weight that no pass has reached is missing.
    """

    def __init__(self) -> None:
        """Start with nothing."""
        self.sums: dict[str, torch.Tensor] = {}

    def __call__(self, name: str, g: torch.Tensor) -> None:
        """Add a gradient.

        Args:
            name: the weight's name.
            g: its gradient, which is this object's from now on.
        """
        if name in self.sums:
            self.sums[name] += g
        else:
            self.sums[name] = g if g.dtype == torch.float64 else g.float()


class GradientCosine:
    """Cosine of each backward pass's gradient with a direction, over its weights, without keeping the gradient."""

    def __init__(self, direction: Mapping[str, torch.Tensor]) -> None:
        """Start with no pass.

        Args:
            direction: weight's name -> entry.
        """
        self._direction = direction
        self._norm = sum(float(r.double().square().sum()) for r in direction.values()) ** 0.5
        self._dot: list[torch.Tensor] = []
        self._square: list[torch.Tensor] = []

    def __call__(self, name: str, g: torch.Tensor) -> None:
        """Take a gradient in.

        Args:
            name: the weight's name.
            g: its gradient.
        """
        if name in self._direction:
            r = self._direction[name]
            g = g.to(r.dtype)
            self._dot.append((g * r).sum())
            self._square.append(g.square().sum())

    def finish(self) -> float:
        """End a pass.

        Returns:
            Its cosine; 0.0 where either is zero.
        """
        dot = sum(float(x) for x in self._dot)
        size = sum(float(x) for x in self._square) ** 0.5 * self._norm
        self._dot, self._square = [], []
        return dot / size if size > 0 else 0.0
