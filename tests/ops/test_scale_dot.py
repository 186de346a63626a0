from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import scale_dot
from tests.ops.cases import BOUND, DTYPES, LENGTHS, backends, boundaries, stack, strided

BACKENDS = backends("scale_dot")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 33, 64])
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
def test_is_the_inner_product_with_the_vector_gradient(
    lens: list[int], width: int, dtype: torch.dtype, bias: bool, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    x_hat, g = (strided(generator, dtype, sum(lens), width) for _ in range(2))
    r = strided(generator, torch.float32, 2, width)
    cu = boundaries(lens)
    terms = g.double() * (1 if bias else x_hat.double())
    rows = [terms[i:j] for i, j in pairwise(cu.tolist())]
    truth = stack([r.double() @ x.sum(0) for x in rows], 2)
    scale = stack([r.double().abs() @ x.abs().sum(0) for x in rows], 2)
    out = scale_dot(None if bias else x_hat, g, r, cu, backend=backend)
    assert ((out - truth).abs() <= BOUND * scale).all()


def test_bad_calls_name_the_op_and_what_came() -> None:
    g = torch.randn(3, 4)
    with pytest.raises(InputError, match=r"scale_dot: x_hat and g must have one shape, got \(3, 5\) and \(3, 4\)"):
        scale_dot(torch.randn(3, 5), g, torch.randn(4))
    with pytest.raises(InputError, match=r"r must be \[d\] or \[directions, d\] with d=4"):
        scale_dot(None, g, torch.randn(3))
