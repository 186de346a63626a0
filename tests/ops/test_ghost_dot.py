from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield_fast.errors import BackendUnavailable, InputError
from gradshield_fast.ops import ghost_dot
from tests.ops.cases import BOUND, DTYPES, LENGTHS, WIDTHS, backends, packed, per_example, stack

BACKENDS = backends("ghost_dot")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
def test_is_the_inner_product_with_the_per_example_gradient(
    lens: list[int], d_in: int, d_out: int, dtype: torch.dtype, backend: str
) -> None:
    a, g, r, cu = packed(lens, d_in, d_out, dtype)
    gradients, magnitudes = per_example(a, g, cu)
    truth = stack([(r.double() * x).sum((1, 2)) for x in gradients], 2)
    scale = stack([(r.double().abs() * x).sum((1, 2)) for x in magnitudes], 2)
    out = ghost_dot(a, g, r, cu, backend=backend)
    assert out.dtype == torch.float32
    assert out.shape == truth.shape
    assert ((out - truth).abs() <= BOUND * scale).all()
    assert torch.equal(out, ghost_dot(a, g, r, cu, backend=backend))


@settings(max_examples=40, deadline=None)
@given(
    lens=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    d_in=st.integers(1, 20),
    d_out=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_any_shape(lens: list[int], d_in: int, d_out: int, seed: int) -> None:
    a, g, r, cu = packed(lens, d_in, d_out, torch.float32, seed=seed)
    gradients, magnitudes = per_example(a, g, cu)
    truth = stack([(r[0].double() * x).sum() for x in gradients])
    scale = stack([(r[0].double().abs() * x).sum() for x in magnitudes])
    assert ((ghost_dot(a, g, r[0], cu) - truth).abs() <= BOUND * scale).all()


def test_position_terms_sum_to_the_row() -> None:
    a, g, r, cu = packed([3, 0, 8], 12, 7, torch.float64)
    terms = ghost_dot(a, g, r.double())
    rows = torch.stack([terms[i:j].sum(0) for i, j in ((0, 3), (3, 3), (3, 11))])
    torch.testing.assert_close(rows, ghost_dot(a, g, r.double(), cu), rtol=1e-12, atol=1e-12)


def test_moving_an_example_moves_its_score_and_nothing_else() -> None:
    a, g, r, cu = packed([4, 6, 2], 12, 7, torch.float32)
    out = ghost_dot(a, g, r[0], cu)
    order = torch.cat([torch.arange(10, 12), torch.arange(0, 4), torch.arange(4, 10)])
    moved = ghost_dot(a[order], g[order], r[0], torch.tensor([0, 2, 6, 12], dtype=torch.int32))
    _, magnitudes = per_example(a, g, cu)
    scale = stack([(r[0].double().abs() * x).sum() for x in magnitudes])
    assert ((moved[[1, 2, 0]] - out).abs() <= BOUND * scale).all()


def test_bad_calls_name_the_op_and_what_came() -> None:
    a, g, r, cu = packed([4, 6], 12, 7, torch.float32)
    with pytest.raises(InputError, match=r"ghost_dot: cu_seqlens must end at the number of tokens: got 9.*10 tokens"):
        ghost_dot(a, g, r, cu.clone().index_fill_(0, torch.tensor(2), 9))
    with pytest.raises(InputError, match="ghost_dot: cu_seqlens must start at 0, got 1"):
        ghost_dot(a, g, r, torch.tensor([1, 4, 10], dtype=torch.int32))
    with pytest.raises(InputError, match="ghost_dot: cu_seqlens must never fall"):
        ghost_dot(a, g, r, torch.tensor([0, 11, 10], dtype=torch.int32))
    with pytest.raises(InputError, match="int32 or int64"):
        ghost_dot(a, g, r, cu.float())
    with pytest.raises(InputError, match="a has 9 tokens, but g has 10"):
        ghost_dot(a[:9], g, r, cu)
    with pytest.raises(InputError, match="ghost_dot: r must be"):
        ghost_dot(a, g, r.transpose(1, 2), cu)
    with pytest.raises(InputError, match="a must be float32"):
        ghost_dot(a.long(), g, r, cu)
    with pytest.raises(InputError, match="backend must be one of"):
        ghost_dot(a, g, r, cu, backend="fortran")
    with pytest.raises(BackendUnavailable, match="ghost_dot: backend 'triton' is not built"):
        ghost_dot(a, g, r, cu, backend="triton")


@pytest.mark.parametrize("plant", ["dropped token", "scaled", "swapped direction", "neighbour's token"])
def test_the_bound_catches_planted_errors(plant: str) -> None:
    a, g, r, cu = packed([16, 9], 32, 16, torch.bfloat16)
    gradients, magnitudes = per_example(a, g, cu)
    truth = stack([(r.double() * x).sum((1, 2)) for x in gradients], 2)
    scale = stack([(r.double().abs() * x).sum((1, 2)) for x in magnitudes], 2)
    if plant == "dropped token":
        g = g.clone()
        g[3] = 0
    elif plant == "scaled":
        r = r * 1.001
    elif plant == "swapped direction":
        r = r.flip(0)
    else:
        cu = torch.tensor([0, 17, 25], dtype=torch.int32)
    assert not ((ghost_dot(a, g, r, cu) - truth).abs() <= BOUND * scale).all()
