"""The CUDA backends on a GPU: the same cases as on the emulator, and what only a device can show."""

from __future__ import annotations

import pytest
import torch

from gradshield_fast.ops import cuda
from gradshield_fast.ops.ghost_dot import kernel_cuda as dot_cuda
from tests.kernels.cuda.cases import LAYOUTS, OPS, Case, case, error_in_bounds, run
from tests.ops.cases import DTYPES, WIDTHS

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _built() -> None:
    reason = cuda.why_not(torch.empty(1, device="cuda"))
    if reason is not None:
        pytest.skip(reason)


def on_gpu(op: str, c: Case) -> float:
    return error_in_bounds(op, c, run(op, c.to("cuda")).cpu())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), [*WIDTHS, (2048, 520)])
@pytest.mark.parametrize("op", list(OPS))
def test_within_the_bound(op: str, d_in: int, d_out: int, dtype: torch.dtype, layout: str) -> None:
    assert on_gpu(op, case([37, 1, 0, 640, 3], d_in, d_out, dtype_a=dtype, layout=layout)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", list(OPS))
def test_long_sums_of_one_sign(op: str, dtype: torch.dtype) -> None:
    assert on_gpu(op, case([3, 700], 14336, 64, dtype_a=dtype, positive=True, directions=1)) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", list(OPS))
def test_the_same_bits_again(op: str, dtype: torch.dtype) -> None:
    c = case([700, 5, 0, 90], 576, 1536, dtype_a=dtype).to("cuda")
    first = run(op, c)
    for _ in range(5):
        assert torch.equal(run(op, c), first)


def test_the_current_stream_is_used() -> None:
    c = case([2000], 576, 1536)
    on_device = c.to("cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late = torch.zeros_like(on_device.a)
        torch.cuda._sleep(20_000_000)
        late.copy_(on_device.a)
        u = dot_cuda.ghost_dot(late, on_device.g, on_device.r)
    stream.synchronize()
    assert error_in_bounds("ghost_dot", c, u.cpu()) <= 1


def test_more_than_two_to_the_31_elements() -> None:
    tokens, d_in = 2**31 // 4096 + 512, 4096
    if torch.cuda.mem_get_info()[0] < 8 * 2**30:
        pytest.skip("needs 8 GiB of free GPU memory")
    a = torch.zeros(tokens, d_in, dtype=torch.bfloat16, device="cuda")
    a[-1] = 1
    g = torch.ones(tokens, 8, dtype=torch.bfloat16, device="cuda")
    r = torch.ones(1, 8, d_in, device="cuda")
    u = dot_cuda.ghost_dot(a, g, r)
    assert float(u[-1]) == 8 * d_in
    assert not u[:-1].any()
