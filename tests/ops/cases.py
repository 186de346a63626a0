"""Packed inputs for op tests: views into larger buffers, so that strides are never the simple ones."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from _pytest.mark import ParameterSet

from gradshield_fast.ops import available, dispatch

EPS_FP32 = torch.finfo(torch.float32).eps
BOUND = 8 * EPS_FP32
LENGTHS = [[1], [16], [5, 0, 11], [37, 1, 64, 3], []]
WIDTHS = [(32, 16), (33, 17), (160, 96)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def strided(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random values in a tensor whose last axis is a slice of a wider, NaN-filled buffer."""
    buffer = torch.full((*shape[:-1], shape[-1] + 5), float("nan"), dtype=dtype)
    view = buffer[..., 2 : 2 + shape[-1]]
    view.copy_(torch.randn(shape, generator=generator))
    return view


def far(x: torch.Tensor, axis: int) -> torch.Tensor:
    """The same values, more than 2^31 elements from first to last along an axis, in memory never touched."""
    step = 2**31 // (x.shape[axis] - 1) + 8
    strides = list(x.stride())
    strides[axis] = step
    return torch.empty_strided(x.shape, strides, dtype=x.dtype).copy_(x)


def packed(
    lens: list[int], d_in: int, d_out: int, dtype: torch.dtype, *, directions: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations, output gradients, K directions and row boundaries."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lens)
    a = strided(generator, dtype, tokens, d_in)
    g = strided(generator, dtype, tokens, d_out)
    r = strided(generator, torch.float32, directions, d_out, d_in)
    return a, g, r, boundaries(lens)


def boundaries(lens: list[int]) -> torch.Tensor:
    """Row boundaries of packed examples."""
    return torch.tensor([0, *lens], dtype=torch.int32).cumsum(0).to(torch.int32)


def per_example(
    a: torch.Tensor, g: torch.Tensor, cu_seqlens: torch.Tensor
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Float64 per-example gradients, and the same of the magnitudes: the truth, written another way than any op."""
    bounds = cu_seqlens.tolist()
    pairs = list(pairwise(bounds))
    a, g = a.double(), g.double()
    return (
        [g[i:j].T @ a[i:j] for i, j in pairs],
        [g[i:j].abs().T @ a[i:j].abs() for i, j in pairs],
    )


def stack(values: list[torch.Tensor], *tail: int) -> torch.Tensor:
    """Stack results of examples; an empty batch keeps its shape."""
    return torch.stack(values) if values else torch.zeros(0, *tail, dtype=torch.float64)


def backends(op: str) -> list[ParameterSet]:
    """The backends of an op as parameters; one that cannot run here is skipped, with its reason."""
    out = []
    for name in available()[op]:
        reason = dispatch.why_not(op, name, torch.zeros(1, 1))
        out.append(pytest.param(name, marks=[] if reason is None else pytest.mark.skip(reason=f"{name}: {reason}")))
    return out
