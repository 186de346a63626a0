"""The fused head and loss against autograd on the plain formula, in float64 on the same rounded inputs.

The bound has one more part than the other ops': an error in a logit, at most 8 eps of |h| . |W[v]| and of its own
size, moves its probability by as much in relative terms, whatever computes it.
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradshield_fast.errors import InputError
from gradshield_fast.ops import linear_cross_entropy
from tests.ops.cases import BOUND, DTYPES, backends, strided

BACKENDS = backends("linear_cross_entropy")
EPS_BF16 = torch.finfo(torch.bfloat16).eps


class Case(NamedTuple):
    h: torch.Tensor
    weight: torch.Tensor
    labels: torch.Tensor
    token_weight: torch.Tensor
    scale: float
    softcap: float | None


def case(
    tokens: int, vocabulary: int, d: int, dtype: torch.dtype, *, scale: float = 1.0, softcap: float | None = None
) -> Case:
    """Random inputs, a third of the labels masked, logits of the size that real heads give."""
    generator = torch.Generator().manual_seed(tokens + vocabulary)
    h, weight = strided(generator, dtype, tokens, d), strided(generator, dtype, vocabulary, d)
    h *= 2 / d**0.5
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    labels[::3] = -100
    return Case(h, weight, labels, torch.rand(tokens, generator=generator), scale, softcap)


def truth(c: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float64 losses, g = dL/dy, and the bounds on the error of loss and of g that 8 eps in the logits allow."""
    h, weight = c.h.double(), c.weight.double()
    y = (h @ weight.T).requires_grad_()
    z = c.scale * y
    z = z if c.softcap is None else c.softcap * torch.tanh(z / c.softcap)
    loss = torch.nn.functional.cross_entropy(z, c.labels, reduction="none", ignore_index=-100)
    (g,) = torch.autograd.grad((loss * c.token_weight.double()).sum(), y)
    size = abs(c.scale) * (h.abs() @ weight.abs().T)
    prob = z.detach().softmax(1)
    drift = size + (prob * size).sum(1, keepdim=True)
    own = size.gather(1, c.labels.clamp_min(0)[:, None])[:, 0]
    live = c.labels >= 0
    loss_bound = BOUND * torch.where(live, own + (prob * size).sum(1) + loss.detach(), 0.0)
    # a probability moves with its logit; the label's g moves with all the others' together
    moved = prob * drift
    label = torch.nn.functional.one_hot(c.labels.clamp_min(0), prob.shape[1]).bool()
    moved = torch.where(label, (moved * ~label).sum(1, keepdim=True) + prob * (1 - prob) * drift, moved)
    slope = abs(c.scale) * (1 + (0 if c.softcap is None else 2) * size / (c.softcap or 1))
    weights = torch.where(live, c.token_weight.double(), 0.0)[:, None]
    g_bound = BOUND * (g.abs() + moved * slope * weights)
    return loss.detach(), g, loss_bound, g_bound


SHAPES = [(1, 7, 16), (37, 50, 24), (70, 301, 65), (0, 9, 8), (33, 1, 8)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.25, None), (1.0, 5.0), (-2.0, 3.0)])
@pytest.mark.parametrize(("tokens", "vocabulary", "d"), SHAPES)
def test_matches_autograd(
    tokens: int, vocabulary: int, d: int, scale: float, softcap: float | None, dtype: torch.dtype, backend: str
) -> None:
    c = case(tokens, vocabulary, d, dtype, scale=scale, softcap=softcap)
    loss, g, loss_bound, g_bound = truth(c)
    generator = torch.Generator().manual_seed(5)
    weight, h = c.weight.double(), c.h.double()
    r = strided(generator, torch.float32, 2, vocabulary, d)
    p, q = strided(generator, torch.float32, vocabulary, 5), strided(generator, torch.float32, d, 5)

    out = linear_cross_entropy(*c[:4], scale=scale, softcap=softcap, r=r, backend=backend)
    assert (out.loss.dtype, out.dh.dtype) == (torch.float32, torch.float32)
    assert ((out.loss - loss).abs() <= loss_bound).all()
    assert ((out.dh - g @ weight).abs() <= BOUND * (g.abs() @ weight.abs()) + g_bound @ weight.abs()).all()
    assert out.dot is not None
    for k in range(2):
        dot = (g * (h @ r[k].double().T)).sum(1)
        reach = h.abs() @ r[k].double().abs().T
        assert ((out.dot[:, k] - dot).abs() <= BOUND * (g.abs() * reach).sum(1) + (g_bound * reach).sum(1)).all()

    low = linear_cross_entropy(*c[:4], scale=scale, softcap=softcap, p=p, q=q, ranks=[3, 2], backend=backend)
    assert low.dot is not None
    for k, part in enumerate((slice(0, 3), slice(3, 5))):
        dot = ((g @ p[:, part].double()) * (h @ q[:, part].double())).sum(1)
        reach = h.abs() @ q[:, part].double().abs() @ p[:, part].double().abs().T
        assert ((low.dot[:, k] - dot).abs() <= BOUND * (g.abs() * reach).sum(1) + (g_bound * reach).sum(1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sure_model_keeps_its_small_gradient(backend: str) -> None:
    h, weight = torch.zeros(2, 4), torch.zeros(50, 4)
    h[:, 0], weight[7, 0] = 1.0, 30.0
    out = linear_cross_entropy(h, weight, torch.tensor([7, 7]), backend=backend)
    expected = 49 * torch.exp(torch.tensor(-30.0, dtype=torch.float64))  # 4.6e-12, where softmax - 1 gives 0
    torch.testing.assert_close(out.loss.double(), expected.expand(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.dh[:, 0].double(), (-30 * expected).expand(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(1, 40),
    vocabulary=st.integers(1, 200),
    d=st.integers(1, 70),
    kinds=st.sampled_from([(torch.bfloat16, torch.bfloat16), (torch.float16,) * 2, (torch.bfloat16, torch.float16)]),
    softcap=st.sampled_from([None, 5.0]),
    spread=st.sampled_from([0.0, 0.1, 1.0, 8.0, 30.0]),
)
def test_rounded_stays_within_its_bound(
    tokens: int,
    vocabulary: int,
    d: int,
    kinds: tuple[torch.dtype, torch.dtype],
    softcap: float | None,
    spread: float,
    backend: str,
) -> None:
    """Beside the exact bound, eps(bfloat16) of each term's size, as the docstring says; none of it for the loss."""
    c = case(tokens, vocabulary, d, torch.float32, softcap=softcap)
    c = c._replace(h=(c.h * spread).to(kinds[0]), weight=c.weight.to(kinds[1]))
    loss, g, loss_bound, g_bound = truth(c)
    # 1e-9: where a model is all but sure, rounded gradients lose their relative accuracy, as the docstring says
    off = g_bound + (BOUND + EPS_BF16) * g.abs() + 1e-9 * c.token_weight.double().abs()[:, None]
    generator = torch.Generator().manual_seed(5)
    weight, h = c.weight.double(), c.h.double()
    p, q = strided(generator, torch.float32, vocabulary, 3), strided(generator, torch.float32, d, 3)
    r = strided(generator, torch.float32, 1, vocabulary, d)
    low = linear_cross_entropy(*c[:4], softcap=softcap, p=p, q=q, exact=False, backend=backend)
    assert ((low.loss - loss).abs() <= loss_bound).all()
    assert ((low.dh - g @ weight).abs() <= off @ weight.abs()).all()
    assert low.dot is not None
    reach = h.abs() @ q.double().abs() @ p.double().abs().T
    dot = ((g @ p.double()) * (h @ q.double())).sum(1)
    assert ((low.dot[:, 0] - dot).abs() <= (off * reach).sum(1)).all()
    dense = linear_cross_entropy(*c[:4], softcap=softcap, r=r, exact=False, backend=backend)
    assert dense.dot is not None
    dot, reach = (g * (h @ r[0].double().T)).sum(1), h.abs() @ r[0].double().abs().T
    assert ((dense.dot[:, 0] - dot).abs() <= (off * reach).sum(1)).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("h", "weight"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_not_exact_changes_nothing_beside_float32(h: torch.dtype, weight: torch.dtype, backend: str) -> None:
    c = case(37, 120, 24, torch.float32)
    c = c._replace(h=c.h.to(h), weight=c.weight.to(weight))
    p, q = torch.randn(120, 3), torch.randn(24, 3)
    one, other = (linear_cross_entropy(*c[:4], p=p, q=q, exact=exact, backend=backend) for exact in (True, False))
    assert one.dot is not None
    assert other.dot is not None
    assert torch.equal(one.dh, other.dh)
    assert torch.equal(one.dot, other.dot)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sure_model_keeps_its_small_gradient_when_rounded(dtype: torch.dtype, backend: str) -> None:
    """The label's g is 2e-9 and the others' are fifty times less: float16 would flush both."""
    h, weight = torch.zeros(2, 4, dtype=dtype), torch.zeros(50, 4, dtype=dtype)
    h[:, 0], weight[7, 0], weight[8, 1] = 1.0, 24.0, 1.0
    out = linear_cross_entropy(h, weight, torch.tensor([7, 7]), exact=False, backend=backend)
    other = torch.exp(torch.tensor(-24.0, dtype=torch.float64))
    torch.testing.assert_close(out.loss.double(), (49 * other).expand(2), rtol=1e-5, atol=0)
    torch.testing.assert_close(out.dh[:, 0].double(), (-24 * 49 * other).expand(2), rtol=EPS_BF16, atol=0)
    torch.testing.assert_close(out.dh[:, 1].double(), other.expand(2), rtol=EPS_BF16, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_huge_logits_do_not_overflow(backend: str) -> None:
    h = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    weight = torch.tensor([[3e4, 0.0], [0.0, 1.0], [-3e4, 0.0]])
    out = linear_cross_entropy(h, weight, torch.tensor([2, 2]), backend=backend)
    assert out.loss.tolist() == [6e4, 0.0]
    assert out.dh.tolist() == [[6e4, 0.0], [0.0, 0.0]]


def test_masked_positions_give_nothing() -> None:
    c = case(6, 9, 8, torch.float32)
    out = linear_cross_entropy(*c[:4])
    masked = c.labels < 0
    assert bool(masked.any())
    assert not out.loss[masked].any()
    assert not out.dh[masked].any()


def test_bad_calls_name_the_op_and_what_came() -> None:
    c = case(6, 9, 8, torch.float32)
    with pytest.raises(InputError, match=r"linear_cross_entropy: labels must be -100 or lie in 0..8, got -100..9"):
        linear_cross_entropy(c.h, c.weight, torch.tensor([9, 0, 0, 0, 0, -100]))
    with pytest.raises(InputError, match="labels must be -100"):
        linear_cross_entropy(c.h, c.weight, torch.tensor([-1, 0, 0, 0, 0, 0]))
    with pytest.raises(InputError, match="weight must have d=8 columns"):
        linear_cross_entropy(c.h, c.weight[:, :7], c.labels)
    with pytest.raises(InputError, match="got a mixture"):
        linear_cross_entropy(c.h, c.weight, c.labels, p=torch.randn(9, 2))
    with pytest.raises(InputError, match="softcap must be positive"):
        linear_cross_entropy(c.h, c.weight, c.labels, softcap=0.0)
    with pytest.raises(InputError, match="scale must be finite"):
        linear_cross_entropy(c.h, c.weight, c.labels, scale=float("nan"))
    with pytest.raises(InputError, match="token_weight must be a float vector of 6 tokens"):
        linear_cross_entropy(c.h, c.weight, c.labels, torch.ones(5))
    with pytest.raises(InputError, match="ranks must sum to the 2 columns of p"):
        linear_cross_entropy(c.h, c.weight, c.labels, p=torch.randn(9, 2), q=torch.randn(8, 2), ranks=[1])
