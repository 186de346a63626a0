"""What kernels derive from row boundaries on a GPU: worked out once a batch, where every layer asks for it.

A model's layers all see the same rows, and a derivation is a dozen small launches, or a wait for a value: more than
most kernels that need it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

Result = TypeVar("Result")

KEPT = 32
"""Derivations that are kept: a model has a handful of layer shapes, and two batches may take turns."""

_LOCK = threading.Lock()
_KEPT: dict[tuple[Hashable, ...], tuple[torch.Tensor, object]] = {}


def derived(cu_seqlens: torch.Tensor, about: tuple[Hashable, ...], derive: Callable[[], Result]) -> Result:
    """Give what follows from row boundaries, from memory where the same was derived of the very same tensor.

    The tensor is kept with it, so that its memory cannot become another's, and any change in place raises its version.
    Each stream has its own, as nothing waits for another stream's work.

    Args:
        cu_seqlens: Int[Tensor, "examples+1"], row boundaries.
        about: what else it follows from, and what it is; hashable.
        derive: works it out; what it returns must not be changed.

    Returns:
        What `derive` returns.
    """
    if cu_seqlens.device.type != "cuda" or cu_seqlens.is_inference() or torch.cuda.is_current_stream_capturing():
        return derive()
    stream = torch.cuda.current_stream(cu_seqlens.device).cuda_stream
    key = (cu_seqlens.data_ptr(), cu_seqlens._version, cu_seqlens.shape, cu_seqlens.stride(), cu_seqlens.dtype)
    key = (*key, cu_seqlens.device, stream, about)
    with _LOCK:
        found = _KEPT.get(key)
    if found is not None:
        return found[1]  # pyright: ignore[reportReturnType]
    result = derive()
    with _LOCK:
        while len(_KEPT) >= KEPT:
            del _KEPT[next(iter(_KEPT))]
        _KEPT[key] = (cu_seqlens, result)
    return result
