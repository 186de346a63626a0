from __future__ import annotations

import pytest
import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import ghost_dot_lowrank
from tests.ops.cases import BOUND, DTYPES, LENGTHS, WIDTHS, backends, packed, per_example, stack

BACKENDS = backends("ghost_dot_lowrank")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
def test_is_the_dense_product_with_the_factors_multiplied_out(
    lens: list[int], d_in: int, d_out: int, dtype: torch.dtype, backend: str
) -> None:
    a, g, _, cu = packed(lens, d_in, d_out, dtype)
    ranks = [1, 4, 2]
    p, q = torch.randn(d_out, 7), torch.randn(d_in, 7)
    gradients, magnitudes = per_example(a, g, cu)
    truth, scale = [], []
    for gradient, magnitude in zip(gradients, magnitudes, strict=True):
        parts = list(zip(p.double().split(ranks, 1), q.double().split(ranks, 1), strict=True))
        truth.append(torch.stack([((x @ y.T) * gradient).sum() for x, y in parts]))
        scale.append(torch.stack([((x.abs() @ y.abs().T) * magnitude).sum() for x, y in parts]))
    out = ghost_dot_lowrank(a, g, p, q, cu, ranks=ranks, backend=backend)
    assert out.dtype == torch.float32
    assert ((out - stack(truth, 3)).abs() <= BOUND * stack(scale, 3)).all()


def test_one_direction_needs_no_ranks() -> None:
    a, g, _, cu = packed([3, 5], 8, 6, torch.float64)
    p, q = torch.randn(6, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    one = ghost_dot_lowrank(a, g, p, q, cu)
    assert one.shape == (2,)
    torch.testing.assert_close(one, ghost_dot_lowrank(a, g, p, q, cu, ranks=[3])[:, 0])
    torch.testing.assert_close(
        one, torch.stack([x.sum() for x in ghost_dot_lowrank(a, g, p, q).split([3, 5])]), rtol=1e-12, atol=1e-12
    )


def test_bad_calls_name_the_op_and_what_came() -> None:
    a, g, _, cu = packed([3, 5], 8, 6, torch.float32)
    p, q = torch.randn(6, 3), torch.randn(8, 3)
    with pytest.raises(InputError, match=r"ghost_dot_lowrank: ranks must sum to the 3 columns of p, got \[1, 1\]"):
        ghost_dot_lowrank(a, g, p, q, cu, ranks=[1, 1])
    with pytest.raises(InputError, match="q must have d_in=8 rows"):
        ghost_dot_lowrank(a, g, p, q[:7], cu)
    with pytest.raises(InputError, match="the same columns"):
        ghost_dot_lowrank(a, g, p[:, :2], q, cu)
    with pytest.raises(InputError, match="p must be"):
        ghost_dot_lowrank(a, g, p[:5], q, cu)
