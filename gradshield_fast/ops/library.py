"""Making an op known to torch, so that torch.compile and export see one node with a shape and not what is inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "gradshield_fast"


def define(name: str, schema: str, run: Callable[..., Any], shape: Callable[..., Any]) -> Callable[..., Any]:
    """Register a torch op, and give the function that a room calls it by.

    An eager call goes straight to `run`: the dispatcher's way around costs tens of microseconds, at two calls a layer.
    While torch.compile traces, the call becomes a node of the graph. What depends on values (boundaries, ids, labels)
    is therefore checked inside `run`. No op is differentiable: results carry no gradient, whatever came in.

    Args:
        name: the op's name in `torch.ops.gradshield_fast`.
        schema: its arguments and results, such as "(Tensor a, str backend) -> Tensor".
        run: what it does on real tensors. Its results share no memory with its arguments.
        shape: the same on fake tensors: results of the right shape, dtype and device, with any values.

    Returns:
        A function of the arguments in `schema`, by position.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "default", run)
    torch.library.register_fake(qualified, shape)
    packet = getattr(getattr(torch.ops, NAMESPACE), name)

    def call(*inputs: Any) -> Any:
        if torch.compiler.is_compiling():
            return packet(*inputs)
        with torch.no_grad():  # else a result would be differentiable or not depending on the backend
            return run(*inputs)

    return call
