"""Every native kernel, on every instruction set that this processor has, against float64 on the same rounded inputs."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradshield_fast.ops.ghost_dot_lowrank import kernel_native as lowrank_native
from gradshield_fast.ops.ghost_dot_lowrank import reference as lowrank_reference
from tests.kernels.native.calls import Call, Size, calls, isas, needs_native
from tests.ops.cases import BOUND, DTYPES, far

pytestmark = needs_native

SIZES = [
    Size([1], 1, 1, 1),
    Size([5, 0, 11], 33, 17, 5),
    Size([50, 1, 33], 160, 96, 16),
    Size([70], 545, 300, 40),
    Size([2, 49], 210, 131, 140),
    Size([], 8, 8, 4),
    Size([3, 2], 0, 7, 3),
    Size([3, 0, 2], 24, 2500, 4),  # rows longer than the 1024 elements that are taken at once
]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Fill what torch.empty gives with NaN, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def hold(out: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor, what: str) -> None:
    """Hold a result to the bound."""
    assert out.dtype == torch.float32, what
    assert out.shape == truth.shape, what
    assert ((out - truth).abs() <= BOUND * scale).all(), what


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_is_within_the_bound_and_the_same_for_any_number_of_threads(size: Size, dtype: torch.dtype, isa: int) -> None:
    for call in calls(size, dtype):
        out = call.run(threads=1, isa=isa)
        hold(out, call.truth(), call.scale(), call.function)
        for threads in (1, 2, 3):
            assert torch.equal(out, call.run(threads=threads, isa=isa)), call.function


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("direction", [torch.float16, torch.bfloat16], ids=str)
def test_directions_in_sixteen_bits(direction: torch.dtype, isa: int) -> None:
    for dtype in DTYPES:
        for call in calls(Size([40, 30], 70, 50, 9), dtype, direction=direction):
            hold(call.run(isa=isa), call.truth(), call.scale(), call.function)


@pytest.mark.parametrize("isa", isas())
def test_more_than_two_to_the_31_elements_by_strides(isa: int) -> None:
    torch.use_deterministic_algorithms(False)  # or every page of the buffers would be filled
    for call in calls(Size([3, 50], 40, 24, 3), torch.bfloat16):
        for i, x in enumerate(call.inputs):
            for axis in range(x.ndim if x is not None and x.is_floating_point() else 0):
                assert x is not None
                moved = call._replace(inputs=(*call.inputs[:i], far(x, axis), *call.inputs[i + 1 :]))
                hold(moved.run(isa=isa), call.truth(), call.scale(), f"{call.function}, input {i}, axis {axis}")


@pytest.mark.parametrize("isa", isas())
def test_many_tokens_on_many_threads(isa: int) -> None:
    # enough work that the threads are woken; examples of one length, then one long one
    for size in (Size([100] * 12, 130, 64, 16), Size([1200], 130, 64, 16)):
        for call in calls(size, torch.bfloat16):
            out = call.run(threads=1, isa=isa)
            hold(out, call.truth(), call.scale(), call.function)
            assert torch.equal(out, call.run(threads=3, isa=isa)), call.function


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(st.integers(0, 70), max_size=4),
    d_in=st.integers(1, 90),
    d_out=st.integers(1, 90),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    isa=st.integers(0, 4),
    threads=st.integers(1, 3),
)
def test_any_shape(
    lens: list[int], d_in: int, d_out: int, rank: int, dtype: torch.dtype, isa: int, threads: int
) -> None:
    for call in calls(Size(lens, d_in, d_out, rank), dtype):
        hold(call.run(threads=threads, isa=isa), call.truth(), call.scale(), call.function)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_of_one_sign_keep_the_bound(dtype: torch.dtype, isa: int) -> None:
    # nothing cancels: rounding errors of one direction would add up
    for call in calls(Size([64], 2048, 48, 4), dtype):
        for x in call.inputs:
            if x is not None and x.is_floating_point():
                x.copy_(x.abs() + 0.5)
        hold(call.run(isa=isa), call.truth(), call.scale(), call.function)


def test_calls_from_several_threads_do_not_mix() -> None:
    work = calls(Size([300] * 4, 200, 64, 16), torch.bfloat16)
    alone = [call.run(threads=2) for call in work]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for out, expected in zip(pool.map(lambda call: call.run(threads=2), work), alone, strict=True):
                assert torch.equal(out, expected)


def test_torch_still_multiplies_after_the_matrix_unit_was_used() -> None:
    x, y = torch.randn(64, 64).bfloat16(), torch.randn(64, 64).bfloat16()
    before = x @ y
    for call in calls(Size([64], 96, 64, 16), torch.bfloat16):
        call.run(threads=1)
        assert torch.equal(before, x @ y)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("tokens", [1, 16, 31, 70, 130])
@pytest.mark.parametrize(("width", "rank"), [(32, 16), (192, 3), (576, 48), (1568, 130)])
def test_rows_that_lie_on_whole_lines(tokens: int, width: int, rank: int, isa: int) -> None:
    # the matrix unit loads these from the caller's memory: what lies between and behind them must not be seen. Numbers
    # lie there and not NaN, which would show in the results and send the rows to the float32 product.
    random = torch.Generator().manual_seed(0)
    buffer = torch.full((tokens, width + 64), 7.0, dtype=torch.bfloat16)
    x = buffer[:, 32 : 32 + width]
    x.copy_(torch.randn(tokens, width, generator=random))
    factor, z = torch.randn(width, rank, generator=random), torch.randn(tokens, rank, generator=random)
    member = (torch.arange(rank)[:, None] // 5 % 4 == torch.arange(4)).float()
    for call in (
        Call(lowrank_native, lowrank_reference, "lowrank_project", (x, factor)),
        Call(lowrank_native, lowrank_reference, "lowrank_contract", (z, x, factor, member)),
    ):
        out = call.run(threads=1, isa=isa)
        hold(out, call.truth(), call.scale(), call.function)
        assert torch.equal(out, call.run(threads=3, isa=isa)), call.function
