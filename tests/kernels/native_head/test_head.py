"""The CPU kernel of the fused head where the op's own tests do not reach: long vocabularies, hard logits, odd strides.

Truth is float64 on the same rounded inputs. Where many words share the sum, the bound is the op's; the tests of two
terms say what is left out of it.
"""

from __future__ import annotations

import pytest
import torch

from gradshield_fast.ops import linear_cross_entropy
from gradshield_fast.ops.linear_cross_entropy import kernel_native
from tests.ops.cases import BOUND, DTYPES, far, strided
from tests.ops.test_linear_cross_entropy import Case, case, truth

REASON = kernel_native.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"native: {REASON}")


@pytest.fixture(autouse=True, params=[3, 2, 1], ids=["amx", "bf16", "avx512"])
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run every test on each kernel that this CPU can run."""
    if kernel_native.level() < request.param:
        pytest.skip("native: this CPU lacks the instructions")
    monkeypatch.setattr(kernel_native, "UPTO", request.param)


def worst(c: Case, rank: int = 3, dense: bool = False) -> float:
    """The largest error, in units of the op's bound, of losses, dL/dh and position terms."""
    loss, g, loss_bound, g_bound = truth(c)
    weight, h = c.weight.double(), c.h.double()
    vocabulary, d = weight.shape
    generator = torch.Generator().manual_seed(5)
    p, q = strided(generator, torch.float32, vocabulary, rank), strided(generator, torch.float32, d, rank)
    out = linear_cross_entropy(*c[:4], scale=c.scale, softcap=c.softcap, p=p, q=q, backend="native")
    assert out.dot is not None
    tiny = 1e-300

    def share(error: torch.Tensor, bound: torch.Tensor) -> float:
        assert not error.isnan().any()
        assert not error[bound == 0].any()
        return float((error / (bound + tiny)).max()) if error.numel() else 0.0

    pull = q.double().abs() @ p.double().abs().T
    reach = h.abs() @ pull
    dot = ((g @ p.double()) * (h @ q.double())).sum(1)
    shares = [
        share((out.loss - loss).abs(), loss_bound),
        share((out.dh - g @ weight).abs(), BOUND * (g.abs() @ weight.abs()) + g_bound @ weight.abs()),
        share((out.dot[:, 0] - dot).abs(), BOUND * (g.abs() * reach).sum(1) + (g_bound * reach).sum(1)),
    ]
    if dense:
        r = strided(generator, torch.float32, 1, vocabulary, d)
        again = linear_cross_entropy(*c[:4], scale=c.scale, softcap=c.softcap, r=r, backend="native")
        assert again.dot is not None
        reach = h.abs() @ r[0].double().abs().T
        dot = (g * (h @ r[0].double().T)).sum(1)
        bound = BOUND * (g.abs() * reach).sum(1) + (g_bound * reach).sum(1)
        shares.append(share((again.dot[:, 0] - dot).abs(), bound))
    return max(shares)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [0.0, 1.0, 8.0])
def test_many_chunks_and_groups(dtype: torch.dtype, spread: float) -> None:
    c = case(530, 4100, 40, dtype)
    c.h.mul_(spread)
    assert worst(c, dense=True) < 1


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["h", "weight"])
def test_more_than_two_to_the_31_elements_by_strides(name: str, axis: int) -> None:
    c = case(40, 70, 40, torch.bfloat16)
    assert worst(c._replace(**{name: far(getattr(c, name), axis)}), dense=True) < 1


@pytest.mark.parametrize("words", ["random", "zero", "equal", "one-hot", "positive"])
@pytest.mark.parametrize(("tokens", "vocabulary", "d"), [(33, 3000, 64), (20, 2100, 700)])
def test_weights_with_structure(words: str, tokens: int, vocabulary: int, d: int) -> None:
    c = case(tokens, vocabulary, d, torch.bfloat16)
    if words == "zero":
        c.weight.zero_()
    elif words == "equal":
        c.weight[1:] = c.weight[0].clone()
        c.weight[5] = 0
    elif words == "one-hot":
        c.weight.copy_(torch.eye(d).repeat(vocabulary // d + 1, 1)[:vocabulary] * 4)
    elif words == "positive":
        c.weight.abs_()
        c.h.abs_().mul_(0.1)
    assert worst(c, dense=True) < 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_reference_logit_follows_the_largest(dtype: torch.dtype, order: str) -> None:
    vocabulary = 5000
    z = torch.linspace(-300, 300, vocabulary)
    z = z if order == "rising" else z.flip(0) if order == "falling" else z[torch.randperm(vocabulary)]
    c = case(40, vocabulary, 16, dtype)
    c.h[:, 0] = 1
    c.weight[:, 0] = z.to(dtype)
    c.labels[1::3] = int(z.argmax())
    assert worst(c, dense=True) < 1


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_peaked_logits(softcap: float | None) -> None:
    c = case(100, 6000, 256, torch.bfloat16, softcap=softcap)
    height = torch.linspace(0, 40, 100)[:, None] / 256
    known = c.labels.clamp_min(0)
    c.h.add_((height * c.weight[known].float()).to(c.h.dtype))
    c.h.add_((0.9 * height * c.weight[(known + 77) % 6000].float()).to(c.h.dtype))
    assert worst(c, dense=True) < 1


@pytest.mark.parametrize("scale", [0.0, -1.0, 3.0])
def test_scales(scale: float) -> None:
    assert worst(case(37, 500, 24, torch.bfloat16, scale=scale)) < 1


@pytest.mark.parametrize("rank", [1, 16, 17, 33, 64])
def test_ranks_beside_a_tile(rank: int) -> None:
    assert worst(case(50, 700, 33, torch.bfloat16), rank=rank) < 1


def test_any_strides_give_the_same_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(45, 70, generator=generator).bfloat16()
    weight, labels = torch.randn(900, 70, generator=generator).bfloat16(), torch.arange(45)
    r = torch.randn(2, 900, 70, generator=generator)
    plain = linear_cross_entropy(h, weight, labels, r=r, backend="native")
    h_t, weight_t = h.T.contiguous().T, weight.T.contiguous().T
    odd = linear_cross_entropy(
        h_t, weight_t, labels, r=r.transpose(1, 2).contiguous().transpose(1, 2), backend="native"
    )
    every_other = torch.full((90, 140), float("nan")).bfloat16()
    every_other[::2, ::2] = h
    wide = linear_cross_entropy(every_other[::2, ::2], weight, labels, r=r, backend="native")
    once = linear_cross_entropy(h[:1].expand(45, -1), weight, labels, r=r, backend="native")
    twice = linear_cross_entropy(h[:1].repeat(45, 1), weight, labels, r=r, backend="native")
    for x, y in ((plain, odd), (plain, wide), (once, twice)):
        assert all(torch.equal(i, j) for i, j in zip(x, y, strict=True) if i is not None and j is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    c = case(600, 5000, 48, dtype)
    p, q = torch.randn(5000, 5), torch.randn(48, 5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            results.append(linear_cross_entropy(*c[:4], p=p, q=q, backend="native"))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(i, j) for i, j in zip(results[0], other, strict=True))


def test_a_broken_token_stays_alone() -> None:
    c = case(40, 300, 24, torch.bfloat16)
    clean = linear_cross_entropy(*c[:4], backend="native")
    c.h[7] = float("nan")
    c.h[8, 3] = float("inf")
    out = linear_cross_entropy(*c[:4], backend="native")
    sound = torch.tensor([i not in (7, 8) for i in range(40)])
    assert out.loss[7].isnan()
    torch.testing.assert_close(out.loss[sound], clean.loss[sound], rtol=1e-6, atol=0)
    torch.testing.assert_close(out.dh[sound], clean.dh[sound], rtol=1e-5, atol=1e-6)


def test_masked_positions_give_nothing_and_are_not_computed() -> None:
    c = case(10, 50, 8, torch.bfloat16)
    c.h[c.labels < 0] = float("nan")
    out = linear_cross_entropy(*c[:4], p=torch.randn(50, 2), q=torch.randn(8, 2), backend="native")
    assert not out.dh.isnan().any()
    assert not out.loss[c.labels < 0].any()
    every = linear_cross_entropy(c.h, c.weight, torch.full((10,), -100), backend="native")
    assert not every.loss.any()
    assert not every.dh.any()


def test_why_not_says_what_it_cannot_do() -> None:
    x = torch.zeros(2, 3)
    assert kernel_native.why_not(x, x, None, None, None) is None
    assert kernel_native.why_not(x.double(), x, None, None, None) == "float64 runs on the reference"
    assert kernel_native.why_not(x.to("meta"), x) == "needs a CPU, the inputs are on meta"


def test_auto_leaves_float32_to_the_reference_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(2, 3)
    assert kernel_native.not_for_auto(x.bfloat16(), x.bfloat16()) is None
    monkeypatch.setattr(kernel_native, "level", lambda: 1)
    assert "slower than the reference" in str(kernel_native.not_for_auto(x, x))
    assert kernel_native.not_for_auto(x.bfloat16(), x.bfloat16(), None, x, x) is None
