"""A 16-bit model's weights in float32 for a while, to tell a wrong way to run it from one that rounds differently."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch

SIXTEEN_BITS = (torch.bfloat16, torch.float16)


def extra_bytes(model: torch.nn.Module) -> int:
    """Count what `widened` takes: a float32 copy beside the weights.

    Args:
        model: the model.

    Returns:
        Bytes.
    """
    return sum(4 * x.numel() for x in _sixteen_bit(model))


@contextmanager
def widened(model: torch.nn.Module) -> Iterator[None]:
    """Give a model's 16-bit weights and buffers as float32, the same values, and then their own storage back.

    Args:
        model: the model; no hook of ours may be in place that has kept a weight's type.

    Yields:
        Nothing.
    """
    held = [(x, x.data) for x in _sixteen_bit(model)]
    try:
        for x, data in held:
            x.data = data.float()
        yield
    finally:
        for x, data in held:
            x.data = data


def _sixteen_bit(model: torch.nn.Module) -> list[torch.Tensor]:
    tensors = {id(x): x for x in chain(model.parameters(), model.buffers())}
    return [x for x in tensors.values() if x.dtype in SIXTEEN_BITS]
