"""Linear layers whose float32 products are ours where torch's are slow: its CPU library favours one maker's processors.

    y = x W^T + b,      dL/dx = dL/dy W       (W frozen, so that there is no dL/dW)

Both are `lowrank_project`'s C++ kernel, whose float32 multiply-adds use all of AVX-512 wherever it is. Who is faster
is measured once for a model's largest layer and kept on disk (measured.py), not for each shape as the ops' `auto` does:
a row's score should not depend on how many tokens it was batched with. Calibration still has to confirm the scores.
16-bit products stay torch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from gradshield_fast.ops import measured
from gradshield_fast.ops.ghost_dot_lowrank.kernel_native import lowrank_project
from gradshield_fast.ops.native import extension

OP = "linear"
"""The measurement's name, under which a preference may be kept too."""

NAMES = ("torch", "native")

TOKENS = 1024
"""Tokens of the trial."""

SMALL = 1 << 17
"""Elements of the largest layer's weight below which nothing is measured, or replaced."""

GAIN = 0.2
"""Share of torch's time that ours must save."""

METHODS = frozenset({"linear", "fused head", "embedding", "layer_norm", "rms_norm", "bias"})
"""Rules that do not run a module again by torch.func, for which our layers have no rule of their own."""


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.weight = weight
        y = lowrank_project(x.reshape(-1, x.shape[-1]), weight.T)
        return (y if bias is None else y.add_(bias)).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        dx = lowrank_project(dy.reshape(-1, dy.shape[-1]), ctx.weight)
        return dx.view(*dy.shape[:-1], ctx.weight.shape[1]), None, None


def _layers(model: nn.Module) -> list[nn.Linear]:
    return [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and type(module).forward is nn.Linear.forward
        and "forward" not in vars(module)
        and module.weight.dtype == torch.float32
        and module.weight.device.type == "cpu"
        and module.weight.numel() >= SMALL
    ]


def faster(model: nn.Module, backend: str) -> bool:
    """Whether our products of the model's linear layers were measured faster than torch's, or are preferred.

    Args:
        model: the model.
        backend: what the scorer was asked for: by any but "auto" and "native" these kernels are not to run.

    Returns:
        Whether to try them; no for a model without a large float32 layer on the CPU, and without the C++ kernels.
    """
    layers = _layers(model)
    if extension is None or not layers or backend not in ("auto", "native"):
        return False
    if (choice := measured.preferred(OP)) in NAMES:
        return choice == "native"
    # an output head, many times taller than wide, is the fused loss's
    weight = max((layer.weight.detach() for layer in layers), key=lambda w: (len(w) <= 8 * w.shape[1], w.numel()))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, weight.shape[1], generator=generator)
    calls = {
        "torch": partial(torch.mm, x, weight.T),
        "native": partial(lowrank_project, x, weight.T),
    }
    clock = measured.cpu_milliseconds
    return measured.fastest(OP, measured.processor(), [x, weight], calls, clock, alike=["torch"], gain=GAIN) == "native"


@contextmanager
def replaced(model: nn.Module) -> Iterator[None]:
    """Run the model's large float32 linear layers by our products, for the scope.

    Args:
        model: the model, frozen.

    Yields:
        Nothing.
    """

    def forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
        if x.dtype != torch.float32 or x.shape[-1] != layer.in_features:
            return nn.functional.linear(x, layer.weight, layer.bias)
        return _Linear.apply(x, layer.weight, layer.bias)  # pyright: ignore[reportReturnType]

    layers = _layers(model)
    for layer in layers:
        vars(layer)["forward"] = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
