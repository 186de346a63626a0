from __future__ import annotations

import pytest
import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import embedding_dot
from tests.ops.cases import BOUND, DTYPES, LENGTHS, backends, boundaries, per_example, stack, strided

BACKENDS = backends("embedding_dot")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 33, 64])
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
def test_is_the_inner_product_with_the_table_gradient(
    lens: list[int], width: int, dtype: torch.dtype, backend: str
) -> None:
    generator = torch.Generator().manual_seed(0)
    vocabulary = 13
    ids = torch.randint(vocabulary, (sum(lens),), generator=generator)
    g = strided(generator, dtype, sum(lens), width)
    r = strided(generator, torch.float32, 2, vocabulary, width)
    cu = boundaries(lens)
    one_hot = torch.nn.functional.one_hot(ids, vocabulary)
    gradients, magnitudes = per_example(g, one_hot, cu)
    truth = stack([(r.double() * x).sum((1, 2)) for x in gradients], 2)
    scale = stack([(r.double().abs() * x).sum((1, 2)) for x in magnitudes], 2)
    out = embedding_dot(ids, g, r, cu, backend=backend)
    assert ((out - truth).abs() <= BOUND * scale).all()


def test_bad_calls_name_the_op_and_what_came() -> None:
    g, r = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(InputError, match=r"embedding_dot: ids must lie in 0..4 \(the table's rows\), got 0..5"):
        embedding_dot(torch.tensor([0, 5, 1]), g, r)
    with pytest.raises(InputError, match=r"ids must be a vector of int32 or int64, got torch\.float32"):
        embedding_dot(torch.zeros(3), g, r)
    with pytest.raises(InputError, match="ids has 2 tokens, but g has 3"):
        embedding_dot(torch.tensor([0, 1]), g, r)
    with pytest.raises(InputError, match="embedding_dot: r must be"):
        embedding_dot(torch.tensor([0, 1, 2]), g, r.T)
