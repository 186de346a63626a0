"""The repeated layers of a model: finding them, and giving them another forward pass for the scope of a scorer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradshield_fast.errors import InputError


def repeated_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the model's repeated layers: the list of modules of one class that holds most of its weights.

    Args:
        model: the model.

    Returns:
        Name -> layer; empty where there is no such list.
    """
    best, most = {}, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and len({type(layer) for layer in module}) == 1:
            size = sum(weight.numel() for weight in module.parameters())
            if size > most:
                best, most = {f"{name}.{i}": layer for i, layer in enumerate(module)}, size
    return best


def with_forward(kind: type, forward: Callable[..., Any]) -> type:
    """Derive a class that differs in its forward alone, under the same name.

    Args:
        kind: a module's class.
        forward: (module, *args, **kwargs) -> output.

    Returns:
        The class.
    """
    return type(kind.__name__, (kind,), {"forward": forward})


@contextmanager
def reclassed(kinds: Mapping[nn.Module, type], extra: Mapping[nn.Module, Mapping[str, Any]]) -> Iterator[None]:
    """Give modules another class for a scope.

    Args:
        kinds: module -> its class in the scope, a subclass of its own.
        extra: module -> attributes that it has in the scope.

    Yields:
        Nothing.
    """
    before = {module: type(module) for module in kinds}
    try:
        for module, kind in kinds.items():
            module.__dict__.update(extra.get(module, {}))
            module.__class__ = kind
        yield
    finally:
        for module, kind in before.items():
            module.__class__ = kind
            for name in extra.get(module, {}):
                module.__dict__.pop(name, None)


@contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Keep nothing of a repeated layer but its input: the backward pass runs each layer's forward again.

    Args:
        model: the model; layers that were given another class for the scope are taken as they are.

    Yields:
        Nothing.

    Raises:
        InputError: the model has no repeated layers.
    """
    layers = repeated_layers(model)
    if not layers:
        raise InputError("checkpoint: the model has no list of repeated layers of one class; score without it")
    kinds = {type(layer): _checkpointed_kind(type(layer)) for layer in layers.values()}
    with reclassed({layer: kinds[type(layer)] for layer in layers.values()}, {}):
        yield


def _checkpointed_kind(kind: Any) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return kind.forward(self, *args, **kwargs)
        # evaluation mode draws nothing at random, so there is no generator to put back
        return checkpoint(kind.forward, self, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

    return with_forward(kind, forward)
