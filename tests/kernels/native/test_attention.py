"""The attention kernels of every instruction set that has them, against the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gradshield_fast.ops import native
from gradshield_fast.ops.varlen_attention import kernel_native, reference
from tests.kernels.native.calls import needs_native
from tests.ops.cases import boundaries, strided

LIMITS = ("avx512", "avx512_bf16", "amx")
"""Kernels, and the limit under which each is the best of the processors that have it."""

pytestmark = [needs_native, pytest.mark.skipif(kernel_native.isa() == "", reason="needs a CPU with AVX-512")]


def isas() -> list[Any]:
    """The kernels as parameters; one that this processor lacks, or has a better one for, is skipped."""
    lacks = pytest.mark.skip(reason="this processor does not run it, or the extension is not built")
    limits = {name: native.ISAS.index(name) for name in LIMITS}
    return [pytest.param(i, id=n, marks=() if kernel_native.isa(i) == n else lacks) for n, i in limits.items()]


class Shape(NamedTuple):
    lens: list[int]
    kv_heads: int
    group: int
    d: int


class Options(NamedTuple):
    scale: float = 0.2
    window: int | None = None
    softcap: float | None = None


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty gives with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make(shape: Shape, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Dout, q, k and v as slices of buffers full of NaN; the tokens before and behind the rows are NaN too."""
    generator = torch.Generator().manual_seed(seed)
    tokens, heads = sum(shape.lens), shape.kv_heads * shape.group
    out = []
    for count in (heads, heads, shape.kv_heads, shape.kv_heads):
        padded = strided(generator, torch.bfloat16, tokens + 2, count, shape.d)
        padded[0], padded[-1] = float("nan"), float("inf")
        out.append(padded[1:-1])
    return out, boundaries(shape.lens)


def both(module: Any, inputs: list[torch.Tensor], cu: torch.Tensor, o: Options, **how: int) -> list[torch.Tensor]:
    """Out, lse, dq, dk, dv."""
    dout, q, k, v = inputs
    out, lse = module.forward(q, k, v, cu, *o, **how)
    return [out, lse, *module.backward(dout, q, k, v, out, lse, cu, *o, **how)]


def hold(got: list[torch.Tensor], exact: list[torch.Tensor]) -> None:
    """Hold results to a few roundings to bfloat16 of the largest entry, and lse to float32."""
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, exact, strict=True):
        if not x.numel():
            continue
        error, size = (x.double() - y).abs().max(), y.abs().max()
        assert error <= (1e-5 * (1 + size) if name == "lse" else 0.012 * size + 1e-3), name


def check(shape: Shape, o: Options, isa: int, threads: int, seed: int = 0) -> None:
    """Run one case: error, and the same bits on any number of threads."""
    inputs, cu = make(shape, seed)
    got = both(kernel_native, inputs, cu, o, isa=isa, threads=threads)
    dout, q, k, v = [x.double() for x in inputs]
    # the backward pass is given `out` as the forward pass rounded it: that rounding is its input, not its error
    gradients = reference.backward(dout, q, k, v, got[0].double(), got[1].double(), cu, *o)
    hold(got, [*reference.forward(q, k, v, cu, *o), *gradients])
    for x, y in zip(got, both(kernel_native, inputs, cu, o, isa=isa, threads=1), strict=True):
        assert torch.equal(x, y)


SHAPES = [
    Shape([1, 2, 15, 16, 17], 2, 1, 32),
    Shape([31, 0, 32, 33], 1, 3, 64),
    Shape([255, 1, 257], 1, 4, 80),
    Shape([600], 1, 2, 128),
    Shape([130], 2, 8, 96),
    Shape([1300], 1, 1, 40),
]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("o", [Options(), Options(window=1), Options(window=300), Options(-0.1, 70, 2.0), Options(0.0)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_the_reference(shape: Shape, o: Options, isa: int) -> None:
    check(shape, o, isa, threads=3)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(
        st.sampled_from([0, 1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 129, 255, 256, 257]), max_size=3
    ),
    kv_heads=st.integers(1, 2),
    group=st.sampled_from([1, 3, 4, 8]),
    d=st.sampled_from([1, 8, 32, 64, 80, 96, 128]),
    window=st.none() | st.integers(1, 300),
    softcap=st.none() | st.sampled_from([0.5, 20.0]),
    scale=st.sampled_from([0.125, 1.0, -0.5]),
    isa=st.integers(2, 4),
)
@example(lens=[290], kv_heads=1, group=1, d=32, window=257, softcap=None, scale=1.0, isa=4)
@example(lens=[2], kv_heads=1, group=3, d=1, window=None, softcap=None, scale=-0.5, isa=3)
def test_any_shape(
    lens: list[int],
    kv_heads: int,
    group: int,
    d: int,
    window: int | None,
    softcap: float | None,
    scale: float,
    isa: int,
) -> None:
    check(Shape(lens, kv_heads, group, d), Options(scale * d**-0.5, window, softcap), isa, threads=2, seed=len(lens))


@pytest.mark.parametrize("isa", isas())
def test_a_row_has_the_same_bits_in_any_batch(isa: int) -> None:
    o, how = Options(), partial(both, kernel_native, isa=isa, threads=2)
    inputs, cu = make(Shape([40, 77, 300], 2, 3, 64))
    whole = how(inputs, cu, o)
    for start, end in ((0, 40), (40, 117), (117, 417)):
        part = how([x[start:end] for x in inputs], boundaries([end - start]), o)
        for i, (x, y) in enumerate(zip(part, whole, strict=True)):
            assert torch.equal(x, y[:, start:end] if i == 1 else y[start:end])


@pytest.mark.parametrize("isa", isas())
def test_large_scores_neither_overflow_nor_stall(isa: int) -> None:
    inputs, cu = make(Shape([100], 1, 2, 64))
    for x in inputs[1:3]:
        x *= 30
    got = both(kernel_native, inputs, cu, Options(1.0), isa=isa)
    assert all(torch.isfinite(x).all() for x in got)
    exact = both(reference, [x.double() for x in inputs], cu, Options(1.0))
    assert (got[1].double() - exact[1]).abs().max() <= 1e-6 * exact[1].abs().max()
    assert (got[0].double() - exact[0]).abs().max() <= 0.012 * exact[0].abs().max()
