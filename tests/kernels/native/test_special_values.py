"""Subnormal numbers, infinities, NaNs, magnitudes far apart: the matrix unit flushes and mixes what float32 keeps."""

from __future__ import annotations

import pytest
import torch

from gradshield_fast.ops.ghost_dot.kernel_native import ghost_dot
from gradshield_fast.ops.ghost_dot_lowrank.kernel_native import lowrank_project
from gradshield_fast.ops.ghost_norm_sq import reference
from gradshield_fast.ops.ghost_norm_sq.kernel_native import ghost_inner
from tests.kernels.native.calls import isas, needs_native
from tests.ops.cases import BOUND

pytestmark = needs_native

TOKENS, WIDTH = 70, 200
WIDTHS = [200, 192]  # rows that are copied, and rows that tiles load where they lie: whole lines of memory
COLUMNS = [20, 130]  # enough columns for float32 rows to be cut into parts, too


def project(a: torch.Tensor, q: torch.Tensor, isa: int) -> None:
    """Hold a projection to the bound, with half of the smallest float32 number for the last rounding."""
    out = lowrank_project(a, q, isa=isa)
    truth, scale = a.double() @ q.double(), a.double().abs() @ q.double().abs()
    assert ((out - truth).abs() <= BOUND * scale + 2**-150 * a.shape[1]).all()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("size", [1e-39, 1e-37, 1e-30, 1e-20, 1e10, 1e20, 1e30])
def test_a_row_of_any_magnitude(size: float, columns: int, dtype: torch.dtype, isa: int, width: int) -> None:
    torch.manual_seed(0)
    a, q = torch.randn(TOKENS, width), torch.randn(width, columns)
    a[37] *= size
    a[3, 5] *= size
    project(a.to(dtype), q, isa)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("size", [1e-44, 1e-38, 1e-30, 1e-10, 1e10, 1e30])
def test_directions_of_any_magnitude(size: float, columns: int, dtype: torch.dtype, isa: int) -> None:
    torch.manual_seed(0)
    a, q = torch.randn(TOKENS, WIDTH).to(dtype), torch.randn(WIDTH, columns)
    q[:, 3] *= size  # a whole column
    q[7, 5] *= size  # one number among others
    q[:, 6] = 0
    project(a, q, isa)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("pieces", [False, True], ids=["columns", "pieces"])
@pytest.mark.parametrize("width", [70, 192, 300])
@pytest.mark.parametrize("size", [1e-39, 1e-37, 1e-30, 1e-10, 1e10, 1e30, 1e36])
def test_sixteen_bit_factors_of_any_magnitude(size: float, width: int, pieces: bool, isa: int) -> None:
    torch.manual_seed(0)
    a, q = torch.randn(TOKENS, width).sign() * torch.rand(TOKENS, width).add(0.2), torch.randn(width, 37).clamp(-1, 1)
    a[37] *= min(size, 1.0)  # large on both sides would be no float32 number
    a[3, 5] *= min(size, 1.0)
    q[:, 3] *= size  # a whole column
    q[7, 5] *= size  # one number among others
    q[:, 6] = 0
    a, q = a.bfloat16(), q.bfloat16()
    project(a, q.T.contiguous().T if pieces else q, isa)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("width", [70, 192, 300])
@pytest.mark.parametrize("size", [1e20, 1e30, 1e36])
def test_large_rows_on_sixteen_bit_columns_that_are_scaled_up(size: float, width: int, isa: int) -> None:
    torch.manual_seed(0)
    a, q = torch.randn(TOKENS, width).clamp(-1, 1), torch.randn(width, 37).clamp(-1, 1)
    a[37] *= size  # the scale of a column would make its products infinite
    a[3, 5] *= size
    project(a.bfloat16(), q.bfloat16(), isa)


@pytest.mark.parametrize("isa", isas())
def test_a_sixteen_bit_column_of_magnitudes_far_apart(isa: int) -> None:
    torch.manual_seed(0)
    a, q = torch.randn(TOKENS, WIDTH), torch.randn(WIDTH, 37)
    q[:, 5] *= 1e-30
    q[7, 5] = 1e30  # no scale of the column keeps both
    a[:, 7] = 0
    project(a.bfloat16(), q.bfloat16(), isa)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("pieces", [False, True], ids=["columns", "pieces"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_in_sixteen_bit_factors_stays_in_its_place(value: float, pieces: bool, isa: int) -> None:
    torch.manual_seed(0)
    a, q = torch.randn(TOKENS, WIDTH).abs().bfloat16() + 1, torch.randn(WIDTH, 37).abs().bfloat16() + 1
    a[37, 5], q[7, 3] = value, value
    out = lowrank_project(a, q.T.contiguous().T if pieces else q, isa=isa)
    truth = a.double() @ q.double()
    assert torch.equal(out.isfinite(), truth.isfinite())
    assert torch.equal(out.isnan(), truth.isnan())


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_gradients_near_the_smallest_number_keep_their_bits(
    columns: int, dtype: torch.dtype, isa: int, width: int
) -> None:
    torch.manual_seed(0)
    a, q = (torch.randn(TOKENS, width) * 1e-37).to(dtype), torch.randn(width, columns) * 1e20
    assert bool(((a != 0) & (a.abs() < 1.17e-38)).any())
    project(a, q, isa)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", COLUMNS)
def test_infinities_and_nans_reach_their_own_token_only(
    columns: int, dtype: torch.dtype, value: float, isa: int, width: int
) -> None:
    torch.manual_seed(0)
    a, q = torch.randn(TOKENS, width).to(dtype), torch.ones(width, columns)  # 1 has no lower part, and inf x 0 is NaN
    clean = lowrank_project(a, q, isa=isa)
    a[40, 150] = value
    out = lowrank_project(a, q, isa=isa)
    others = torch.arange(TOKENS) != 40
    assert ((out - clean)[others].abs() <= BOUND * (a.double().abs() @ q.double())[others]).all()
    expected = torch.full((columns,), value)
    torch.testing.assert_close(out[40], expected, equal_nan=True)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_and_nans_in_the_direction(value: float, isa: int) -> None:
    torch.manual_seed(0)
    a, q = torch.randn(TOKENS, WIDTH).abs().bfloat16() + 1, torch.ones(WIDTH, 3)
    q[9, 1] = value
    out = lowrank_project(a, q, isa=isa)
    torch.testing.assert_close(out[:, 1], torch.full((TOKENS,), value), equal_nan=True)
    assert out[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("isa", isas())
def test_a_broken_token_breaks_its_own_terms_only(isa: int) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(TOKENS, 40).bfloat16(), torch.randn(TOKENS, 30).bfloat16()
    r = torch.randn(1, 30, 40)
    a[11, 2] = float("nan")
    u = ghost_dot(a, g, r, isa=isa)
    assert u.isnan().nonzero()[:, 0].tolist() == [11]
    norms = ghost_inner(g, a, g, a, torch.tensor([0, 10, 20, TOKENS]), isa=isa)
    assert norms.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("small", ["a", "g"])
def test_norms_of_rows_whose_products_are_subnormal(small: str, isa: int) -> None:
    torch.manual_seed(0)
    a, g = torch.randn(TOKENS, WIDTH) * 3e-20, torch.randn(TOKENS, 40) * 1e10
    a, g = (a.bfloat16(), g.bfloat16()) if small == "a" else (g.bfloat16(), a.bfloat16())
    cu = torch.tensor([0, 10, 10, 15, TOKENS])
    norms = ghost_inner(g, a, g, a, cu, isa=isa).double()
    truth = reference.ghost_inner(g.double(), a.double(), g.double(), a.double(), cu)
    g_size, a_size = g.double().abs(), a.double().abs()
    scale = reference.ghost_inner(g_size, a_size, g_size, a_size, cu)
    assert ((norms - truth).abs() <= BOUND * scale).all()
    assert (norms > 0).tolist() == [True, False, True, True]
