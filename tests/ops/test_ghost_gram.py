from __future__ import annotations

import pytest
import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import ghost_gram, ghost_norm_sq
from tests.ops.cases import BOUND, DTYPES, LENGTHS, WIDTHS, backends, packed, per_example

BACKENDS = backends("ghost_gram")


def inner(left: list[torch.Tensor], right: list[torch.Tensor]) -> torch.Tensor:
    """All inner products of two lists of matrices."""
    rows = [[float((x * y).sum()) for y in right] for x in left]
    return torch.tensor(rows, dtype=torch.float64).reshape(len(left), len(right))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
def test_is_every_inner_product_of_per_example_gradients(
    lens: list[int], d_in: int, d_out: int, dtype: torch.dtype, backend: str
) -> None:
    a1, g1, _, cu1 = packed(lens, d_in, d_out, dtype)
    a2, g2, _, cu2 = packed([7, 0, 40], d_in, d_out, dtype, seed=1)
    (left, left_size), (right, right_size) = per_example(a1, g1, cu1), per_example(a2, g2, cu2)
    out = ghost_gram(a1, g1, cu1, a2, g2, cu2, backend=backend)
    assert out.dtype == torch.float32
    assert out.shape == (len(lens), 3)
    assert ((out - inner(left, right)).abs() <= BOUND * inner(left_size, right_size)).all()


def test_its_diagonal_is_the_squared_norm() -> None:
    a, g, _, cu = packed([3, 0, 9, 1500], 8, 6, torch.float64)
    gram = ghost_gram(a, g, cu, a, g, cu)
    torch.testing.assert_close(gram.diagonal(), ghost_norm_sq(a, g, cu), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gram, gram.T, rtol=1e-12, atol=1e-9)


def test_bad_calls_name_the_op_and_what_came() -> None:
    a, g, _, cu = packed([3, 5], 8, 6, torch.float32)
    with pytest.raises(InputError, match="ghost_gram: both batches must come from one layer: a1 and a2 have 8 and 7"):
        ghost_gram(a, g, cu, a[:, :7], g, cu)
    with pytest.raises(InputError, match="must end at the number of tokens: got 8, but there are 7"):
        ghost_gram(a, g, cu, a[:7], g[:7], cu)
    with pytest.raises(InputError, match="a2 must be a matrix"):
        ghost_gram(a, g, cu, a[0], g, cu)
