"""Inputs that are legal to torch and wrong, or odd, to an op: a clear error, or the right number, on every backend."""

from __future__ import annotations

import pytest
import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import (
    embedding_dot,
    ghost_dot,
    ghost_dot_lowrank,
    ghost_inner,
    linear_cross_entropy,
    scale_dot,
)
from tests.ops.cases import boundaries, packed

CU = boundaries([2, 3])


@pytest.mark.parametrize("last", [-1, 6, 1000, 10**9])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_id_that_names_no_column_is_refused(last: int, side: str, swapped: bool) -> None:
    ids, a, wide = torch.tensor([0, 1, 2, 3, last]), torch.randn(5, 8), torch.randn(5, 6)
    pair = (wide, ids) if swapped else (ids, wide)
    factors = (pair[0], a, pair[1], a) if side == "left" else (a, pair[0], a, pair[1])
    number = 2 if swapped else 1
    with pytest.raises(InputError, match=rf"ghost_norm_sq: ids in {side}{number} must lie in 0..5, got .*{last}"):
        ghost_inner(*factors, CU)


def test_a_lazily_negated_view_is_not_read_as_it_lies() -> None:
    a, g, r, cu = packed([3, 5], 8, 6, torch.float32)
    lazy = torch.complex(torch.zeros_like(a), a).conj().imag
    assert lazy.is_neg()
    torch.testing.assert_close(ghost_dot(lazy, g, r, cu), -ghost_dot(a, g, r, cu))
    labels = torch.arange(8)
    head = torch.randn(20, 8)
    got, want = (linear_cross_entropy(x, head, labels) for x in (lazy, lazy.resolve_neg()))
    torch.testing.assert_close(got.dh, want.dh, rtol=1e-4, atol=1e-5)


def test_directions_of_whole_numbers_are_refused() -> None:
    a, g, r, cu = packed([3, 5], 8, 6, torch.float32)
    with pytest.raises(InputError, match=r"ghost_dot: r must be float32, .*, got torch.int64"):
        ghost_dot(a, g, r.nan_to_num().long(), cu)
    with pytest.raises(InputError, match=r"embedding_dot: r must be float32"):
        embedding_dot(torch.zeros(8, dtype=torch.int64), g, torch.zeros(4, 6, dtype=torch.int32), cu)
    with pytest.raises(InputError, match=r"scale_dot: r must be float32"):
        scale_dot(None, g, torch.zeros(6, dtype=torch.bool), cu)


def test_no_result_carries_a_gradient_whatever_the_backend() -> None:
    a, g, r, cu = packed([3, 5], 8, 6, torch.bfloat16)
    for backend in ("auto", "reference"):
        assert not ghost_dot(a.clone().requires_grad_(), g, r, cu, backend=backend).requires_grad


def test_float64_token_weights_give_float64() -> None:
    h, head, labels = torch.randn(4, 8), torch.randn(9, 8), torch.arange(4)
    out = linear_cross_entropy(h, head, labels, torch.ones(4, dtype=torch.float64))
    assert (out.loss.dtype, out.dh.dtype) == (torch.float64, torch.float64)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_what_stands_at_a_masked_position_does_not_matter(backend: str) -> None:
    h, head = torch.randn(3, 8), torch.randn(9, 8)
    h[1] = float("nan")
    out = linear_cross_entropy(
        h, head, torch.tensor([1, -100, 2]), p=torch.ones(9, 2), q=torch.ones(8, 2), backend=backend
    )
    assert out.dot is not None
    assert torch.isfinite(out.dh).all()
    assert torch.isfinite(out.dot).all()
    assert not out.dh[1].any()


def test_scales_beyond_float32_and_negative_ranks_are_refused() -> None:
    h, head, labels = torch.randn(4, 8), torch.randn(9, 8), torch.arange(4)
    with pytest.raises(InputError, match="softcap must be positive and finite in float32"):
        linear_cross_entropy(h, head, labels, softcap=1e39)
    with pytest.raises(InputError, match="scale must be finite in float32"):
        linear_cross_entropy(h, head, labels, scale=1e39)
    a, g, _, cu = packed([3, 5], 8, 6, torch.float32)
    p, q = torch.randn(6, 2), torch.randn(8, 2)
    with pytest.raises(InputError, match="ranks must sum"):
        ghost_dot_lowrank(a, g, p, q, cu, ranks=[3, -1])
    with pytest.raises(InputError, match="p must be a matrix"):
        ghost_dot_lowrank(a, g, p[:, 0], q, cu)
    with pytest.raises(InputError, match="g must be a matrix"):
        ghost_dot_lowrank(a, g[0], p, q, cu)
