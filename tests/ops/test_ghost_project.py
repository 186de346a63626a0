from __future__ import annotations

import pytest
import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import ghost_dot_lowrank, ghost_project
from tests.ops.cases import BOUND, DTYPES, LENGTHS, WIDTHS, backends, packed, per_example, stack, strided

BACKENDS = backends("ghost_project")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
def test_is_the_gradient_projected_on_both_sides(
    lens: list[int], d_in: int, d_out: int, dtype: torch.dtype, backend: str
) -> None:
    a, g, _, cu = packed(lens, d_in, d_out, dtype)
    generator = torch.Generator().manual_seed(3)
    p_in, p_out = strided(generator, torch.float32, d_in, 5), strided(generator, torch.float32, d_out, 3)
    gradients, magnitudes = per_example(a, g, cu)
    truth = stack([p_out.double().T @ x @ p_in.double() for x in gradients], 3, 5)
    scale = stack([p_out.double().abs().T @ x @ p_in.double().abs() for x in magnitudes], 3, 5)
    out = ghost_project(a, g, p_in, p_out, cu, backend=backend)
    assert out.dtype == torch.float32
    assert out.shape == (len(lens), 3, 5)
    assert ((out - truth).abs() <= BOUND * scale).all()


def test_its_trace_is_the_low_rank_ghost_dot() -> None:
    a, g, _, cu = packed([3, 0, 9], 8, 6, torch.float64)
    p, q = torch.randn(6, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    traces = ghost_project(a, g, q, p, cu).diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(traces, ghost_dot_lowrank(a, g, p, q, cu), rtol=1e-12, atol=1e-12)


def test_bad_calls_name_the_op_and_what_came() -> None:
    a, g, _, cu = packed([3, 5], 8, 6, torch.float32)
    with pytest.raises(InputError, match=r"ghost_project: p_in must have d_in=8 rows .* got \(7, 2\) and \(6, 2\)"):
        ghost_project(a, g, torch.randn(7, 2), torch.randn(6, 2), cu)
    with pytest.raises(InputError, match="cu_seqlens must start at 0, got 1"):
        ghost_project(a, g, torch.randn(8, 2), torch.randn(6, 2), cu + 1)
