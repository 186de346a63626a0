from __future__ import annotations

import pytest
import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import ghost_inner, ghost_norm_sq
from tests.ops.cases import BOUND, DTYPES, LENGTHS, backends, boundaries, packed, per_example, stack

BACKENDS = backends("ghost_norm_sq")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (4, 3): the d_out-by-d_in form is cheaper; (160, 96): the tokens-by-tokens form is
@pytest.mark.parametrize(("d_in", "d_out"), [(4, 3), (33, 17), (160, 96)])
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
def test_is_the_norm_of_the_per_example_gradient(
    lens: list[int], d_in: int, d_out: int, dtype: torch.dtype, backend: str
) -> None:
    a, g, _, cu = packed(lens, d_in, d_out, dtype)
    gradients, magnitudes = per_example(a, g, cu)
    out = ghost_norm_sq(a, g, cu, backend=backend)
    truth = stack([x.square().sum() for x in gradients])
    scale = stack([x.square().sum() for x in magnitudes])
    assert ((out - truth).abs() <= BOUND * scale).all()
    assert (out >= 0).all()


def test_cross_term_of_a_tied_embedding_and_head() -> None:
    vocabulary, width, lens = 11, 6, [5, 0, 7]
    cu = boundaries(lens)
    ids = torch.randint(vocabulary, (12,))
    e, a = torch.randn(12, width, dtype=torch.float64), torch.randn(12, width, dtype=torch.float64)
    g = torch.randn(12, vocabulary, dtype=torch.float64)
    one_hot = torch.nn.functional.one_hot(ids, vocabulary).double()
    embedding, _ = per_example(e, one_hot, cu)
    head, _ = per_example(a, g, cu)
    truth = stack([(x * y).sum() for x, y in zip(embedding, head, strict=True)])
    torch.testing.assert_close(ghost_inner(ids, e, g, a, cu), truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ghost_inner(g, a, ids, e, cu), truth, rtol=1e-12, atol=1e-12)
    norm = stack([x.square().sum() for x in embedding])
    torch.testing.assert_close(ghost_norm_sq(ids, e, cu), norm, rtol=1e-12, atol=1e-12)


def test_bad_calls_name_the_op_and_what_came() -> None:
    a, g, _, cu = packed([3, 5], 8, 6, torch.float32)
    with pytest.raises(InputError, match="ghost_norm_sq: left1 has 7 tokens, but right1 has 8"):
        ghost_norm_sq(a, g[:7], cu)
    with pytest.raises(InputError, match="left1 and left2 must be equally wide, got 6 and 5"):
        ghost_inner(g, a, g[:, :5], a, cu)
    ids = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(InputError, match="ids only"):
        ghost_inner(ids, ids, ids, ids, cu)
