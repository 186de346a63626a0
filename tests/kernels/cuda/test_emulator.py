"""The emulator itself: faults of a few lines each are caught and named, sound kernels pass in any thread order."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.cuda.emulator import build

SEEDS = [0, 1, 2, 3]
FAULTS = {
    "neighbour_without_barrier": "(reads|writes) shared memory that .*no barrier between|never written",
    "lane_without_warp_barrier": "(reads|writes) shared memory that .*no barrier between|never written",
    "warp_barrier_is_not_enough": "(reads|writes) shared memory that .*no barrier between|never written",
    "second_round_too_early": "shared memory that (another thread reads|thread [0-9]+ wrote), with no barrier between",
    "copy_without_wait": "reads shared memory before its asynchronous copy was waited for",
    "copy_waited_for_too_little": "reads shared memory before its asynchronous copy was waited for",
    "copy_without_barrier": "no barrier between|never written|before its asynchronous copy",
    "copy_never_waited_for": "ends with asynchronous copies that nobody waited for",
    "copy_from_an_odd_address": "copies from an address not aligned to 16",
    "reads_past_the_buffer": "reads 4 bytes of global memory outside every buffer, address 0x",
    "reads_between_rows": "reads 4 bytes of global memory outside every buffer, address 0x",
    "writes_past_the_buffer": "writes 4 bytes of global memory outside every buffer, address 0x",
    "writes_an_input": "writes 4 bytes of global memory in a read-only buffer",
    "reads_an_unwritten_output": "reads 4 bytes of global memory never written|another thread of this launch wrote",
    "leaves_an_output": "was not written at byte 0",
    "two_threads_write_one_place": "writes global memory that another thread of this launch wrote",
    "reads_unwritten_shared": "thread 63: reads shared memory that was never written",
    "reads_past_shared": "touches shared memory outside its 2048 bytes",
    "some_skip_the_barrier": "barrier divergence: 24 of 64 threads have ended; thread 0 waits at line",
    "two_barriers": "barrier divergence: at the barrier of line",
    "lanes_diverge": "warp divergence: at line",
}


@pytest.fixture(scope="module")
def faulty() -> ModuleType:
    return build("_emulator_selftest", [Path(__file__).with_name("faulty_kernels.cpp")])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_caught_and_named(faulty: ModuleType, kernel: str, seed: int) -> None:
    error, _ = faulty.run(kernel, seed)
    assert error, "the fault went through"
    assert re.search(FAULTS[kernel], error), error
    if kernel != "leaves_an_output":
        assert error.startswith(f"{kernel}: block (0, 0, 0)")


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("neighbour_with_barrier", [(t + 33) % 64 % 32 for t in range(64)]),
        ("lane_with_warp_barrier", [(t ^ 1) % 32 for t in range(64)]),
        # the copy takes 12 bytes, so every fourth float is zero
        ("copy_with_wait", [(t + 1) % 8 * 4 for t in range(64)]),
        ("sums_a_warp", [sum(range(32))] * 64),
    ],
)
def test_a_sound_kernel_gives_its_result_in_any_order(
    faulty: ModuleType, kernel: str, expected: list[int], seed: int
) -> None:
    error, out = faulty.run(kernel, seed)
    assert error == ""
    assert out == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_matrix_instruction_multiplies(faulty: ModuleType, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 16, generator=generator).to(dtype) for n in (16, 8))
    c = torch.randn(16, 8, generator=generator)
    bits = [x.view(torch.int16).flatten().to(torch.int32).bitwise_and(0xFFFF).tolist() for x in (a, b)]
    out = torch.tensor(faulty.multiply(*bits, c.flatten().tolist(), dtype == torch.bfloat16)).reshape(16, 8)
    truth = a.double() @ b.double().T + c.double()
    eps = torch.finfo(torch.float32).eps
    assert ((out - truth).abs() <= eps * truth.abs()).all()
    # never away from zero: the emulator cuts
    assert (out.abs() <= truth.abs()).all()


@settings(max_examples=300, deadline=None)
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_three_terms_hold_a_float32(faulty: ModuleType, x: float) -> None:
    terms = torch.tensor(faulty.split(x), dtype=torch.int32).to(torch.int16).view(torch.bfloat16).double()
    if abs(x) >= 2.0**-109 or x == 0:
        assert float(terms.sum()) == x
    else:
        assert abs(float(terms.sum()) - x) < 2.0**-133


@pytest.mark.parametrize("x", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_does_not_become_finite(faulty: ModuleType, x: float) -> None:
    terms = torch.tensor(faulty.split(x), dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    assert terms.sum().isnan()
