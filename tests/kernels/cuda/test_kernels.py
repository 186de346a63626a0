"""The CUDA kernels on the emulator, called through the backends' own Python, against float64."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradshield_fast.ops import cuda
from gradshield_fast.ops.ghost_norm_sq import kernel_cuda as norm_cuda
from tests.kernels.cuda.cases import LAYOUTS, OPS, case, error_in_bounds, run
from tests.kernels.cuda.emulator import EmulatedLaunch
from tests.ops.cases import DTYPES, LENGTHS, WIDTHS, boundaries, far

ALL_OPS = list(OPS)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
@pytest.mark.parametrize("op", ALL_OPS)
def test_within_the_bound(
    emulated: EmulatedLaunch, op: str, d_in: int, d_out: int, dtype: torch.dtype, layout: str
) -> None:
    c = case([37, 1, 0, 64, 3], d_in, d_out, dtype_a=dtype, layout=layout)
    assert error_in_bounds(op, c, run(op, c)) <= 1
    assert emulated.names


@pytest.mark.parametrize("lens", LENGTHS, ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
def test_any_rows(emulated: EmulatedLaunch, op: str, lens: list[int]) -> None:
    c = case(lens, 40, 24)
    assert error_in_bounds(op, c, run(op, c)) <= 1


@pytest.mark.parametrize("dtype_r", DTYPES, ids=str)
@pytest.mark.parametrize("dtype_g", DTYPES, ids=str)
@pytest.mark.parametrize("dtype_a", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["ghost_dot", "embedding_dot", "ghost_norm_sq"])
def test_any_mixture_of_dtypes(
    emulated: EmulatedLaunch, op: str, dtype_a: torch.dtype, dtype_g: torch.dtype, dtype_r: torch.dtype
) -> None:
    c = case([9, 21], 48, 24, dtype_a=dtype_a, dtype_g=dtype_g, dtype_r=dtype_r)
    assert error_in_bounds(op, c, run(op, c)) <= 1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("op", ALL_OPS)
def test_more_than_two_to_the_31_elements_by_strides(emulated: EmulatedLaunch, op: str, axis: int) -> None:
    c = case([3, 30], 16, 8)
    for name in ("a", "g"):
        assert error_in_bounds(op, c, run(op, dataclasses.replace(c, **{name: far(getattr(c, name), axis)}))) <= 1


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_in_any_thread_order(emulated: EmulatedLaunch, op: str, dtype: torch.dtype) -> None:
    c = case([70, 5], 70, 130, dtype_a=dtype, directions=3, ranks=40)
    first = run(op, c)
    for seed in (1, 2, 3):
        emulated.module.set_seed(seed)
        assert torch.equal(run(op, c), first)


# Terms of one sign are the hardest case for a fixed bound, and the emulator's matrix instruction cuts every sum.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
def test_long_sums_of_one_sign(emulated: EmulatedLaunch, op: str, dtype: torch.dtype) -> None:
    c = case([3, 160], 2048, 8, dtype_a=dtype, positive=True, directions=1)
    assert error_in_bounds(op, c, run(op, c)) <= 1


@pytest.mark.parametrize("op", ALL_OPS)
@pytest.mark.parametrize(("d_in", "d_out", "ranks"), [(0, 5, 3), (5, 0, 3), (0, 0, 3), (5, 4, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sums_of_nothing_are_zero(
    emulated: EmulatedLaunch, op: str, d_in: int, d_out: int, ranks: int, dtype: torch.dtype
) -> None:
    c = case([3, 2], d_in, d_out, ranks=ranks, dtype_a=dtype)
    if op == "lowrank_contract":
        c.a = torch.ones(5, 1, dtype=dtype)  # z is made from its first column
    if op == "embedding_dot" and not d_out:
        pytest.skip("an empty table has no ids")
    out = run(op, c)
    assert out.isfinite().all()
    assert error_in_bounds(op, c, out) <= 1


def test_repeated_rows_need_not_be_written_out(emulated: EmulatedLaunch) -> None:
    c = case([4, 30], 40, 24, dtype_a=torch.float32, directions=3)
    c.g, c.a, c.r = c.g[:1].expand(34, -1), c.a[:, :1].expand(-1, 40), c.r[:1].expand(3, -1, -1)
    for op in ALL_OPS:
        assert error_in_bounds(op, c, run(op, c)) <= 1


# One token and one output: nothing averages the rounding of the one long sum.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ALL_OPS)
def test_one_very_long_sum_of_one_sign(
    emulated: EmulatedLaunch, monkeypatch: pytest.MonkeyPatch, op: str, dtype: torch.dtype
) -> None:
    # as many slices as a large batch has: those that the bound asks for, none to fill the device
    monkeypatch.setattr(cuda, "slices", lambda blocks, width: max(1, -(-width // cuda.LONGEST_SUM)))
    for seed in range(2):
        c = case([1, 3], 14336, 1, dtype_a=dtype, positive=True, directions=1, seed=seed)
        if op == "lowrank_contract":
            c = case([1, 3], 1, 14336, dtype_a=dtype, positive=True, directions=1, seed=seed)
        assert error_in_bounds(op, c, run(op, c)) <= 1


def test_a_very_long_example(emulated: EmulatedLaunch) -> None:
    c = case([6000], 8, 5, dtype_a=torch.float32, positive=True, directions=1)
    for op in ("ghost_norm_sq", "ghost_project"):
        assert error_in_bounds(op, c, run(op, c)) <= 1


def test_a_wide_output_is_added_in_parts(emulated: EmulatedLaunch) -> None:
    c = case([5], 32, 8 * 64 + 3)
    assert error_in_bounds("ghost_dot", c, run("ghost_dot", c)) <= 1
    assert emulated.names == ["ghost_dot"]


def listed(
    lens: list[int], left: int, right: int, *, same: bool
) -> tuple[list[list[int]], list[list[int]], torch.Tensor]:
    cu = boundaries(lens).long()
    made = norm_cuda.plan(cu, int(cu[-1]), left, right, same=same)
    used = [[item for item in items.tolist() if item[0] >= 0] for items in made[:2]]
    return used[0], used[1], made.spans


def test_examples_take_the_cheaper_form(emulated: EmulatedLaunch) -> None:
    tokens, columns, spans = listed([2, 0, 400], 96, 64, same=True)
    assert tokens == [[0, 0, 0, 1]]
    assert columns == [[2, 0, 0, 1], [2, 1, 0, 1]]
    assert (spans[:, 1] - spans[:, 0]).tolist() == [1, 0, 2]
    tokens, columns, _ = listed([100], 512, 512, same=True)
    assert tokens == [[0, 0, 0, 1], [0, 0, 1, 2], [0, 1, 1, 1]]
    assert not columns
    c = case([2, 0, 400], 96, 64)
    assert error_in_bounds("ghost_norm_sq", c, run("ghost_norm_sq", c)) <= 1


@pytest.mark.parametrize("same", [False, True])
@settings(max_examples=200, deadline=None)
@given(lens=st.lists(st.integers(0, 900), max_size=6), left=st.integers(0, 700), right=st.integers(0, 700))
def test_the_bound_on_the_tiles_leaves_room_for_all(same: bool, lens: list[int], left: int, right: int) -> None:
    tokens, columns, spans = listed(lens, left, right, same=same)
    side = [-(-n // norm_cuda.TILE) for n in lens]
    wide = -(-left // norm_cuda.TILE) * -(-right // norm_cuda.TILE)
    for n, length in enumerate(lens):
        mine = [item for item in tokens if item[0] == n]
        if length * (left + right) / (2 if same else 1) > left * right:
            assert not mine
            assert sorted(x[1:] for x in columns if x[0] == n) == sorted(
                [o, i, 1] for o in range(-(-left // norm_cuda.TILE)) for i in range(-(-right // norm_cuda.TILE))
            )
            assert spans[n].diff().tolist() == [wide]
        else:
            pairs = [(t, u) for u in range(side[n]) for t in range(u + 1 if same else side[n])]
            assert sorted(x[1:] for x in mine) == sorted([t, u, 2 if same and t < u else 1] for t, u in pairs)
            assert spans[n].diff().tolist() == [len(pairs)]


def test_the_plan_waits_for_no_value() -> None:
    """On the meta device there are no values, and whatever asked for one would raise."""
    for examples in (0, 1, 3):
        cu = torch.empty(examples + 1, dtype=torch.int64, device="meta")
        for same in (False, True):
            for made in norm_cuda.plan(cu, 5000, 576, 1536, same=same):
                assert made.device.type == "meta"


def test_boundaries_that_leave_the_tokens_are_not_followed(emulated: EmulatedLaunch) -> None:
    c = case([8, 8], 32, 16)
    c.cu = torch.tensor([-5, 4, 10, 99], dtype=torch.int32)
    for op in ("ghost_project", "ghost_norm_sq"):
        assert run(op, c).isfinite().all()


def test_an_unknown_id_is_a_nan_and_no_read(emulated: EmulatedLaunch) -> None:
    c = case([4], 32, 16)
    c.ids[1], c.ids[2] = 16, -1
    assert run("embedding_dot", c).isnan().all(1).tolist() == [False, True, True, False]


def test_an_infinity_reaches_its_token_alone(emulated: EmulatedLaunch) -> None:
    c = case([130], 32, 16)
    c.a[5, 3] = math.inf
    bad = ~run("ghost_dot", c).isfinite().all(1)
    assert bad.nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("op", ALL_OPS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lens=st.lists(st.integers(0, 40), min_size=0, max_size=4),
    d_in=st.integers(1, 70),
    d_out=st.integers(1, 70),
    dtype_a=st.sampled_from(DTYPES),
    dtype_g=st.sampled_from(DTYPES),
    dtype_r=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    directions=st.integers(1, 3),
    ranks=st.integers(1, 40),
    seed=st.integers(0, 2**16),
)
def test_any_shape(
    emulated: EmulatedLaunch,
    op: str,
    lens: list[int],
    d_in: int,
    d_out: int,
    dtype_a: torch.dtype,
    dtype_g: torch.dtype,
    dtype_r: torch.dtype,
    layout: str,
    directions: int,
    ranks: int,
    seed: int,
) -> None:
    emulated.module.set_seed(seed)
    c = case(
        lens,
        d_in,
        d_out,
        dtype_a=dtype_a,
        dtype_g=dtype_g,
        dtype_r=dtype_r,
        layout=layout,
        directions=directions,
        ranks=ranks,
        seed=seed,
    )
    assert error_in_bounds(op, c, run(op, c)) <= 1
