"""Attention over packed rows against autograd on the plain formula, in float64 on the same rounded inputs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch

from gradshield_fast.errors import BackendUnavailable, InputError
from gradshield_fast.ops import dispatch, varlen_attention
from tests.ops.cases import EPS_FP32, backends, boundaries, strided

BACKENDS = backends("varlen_attention")
LENGTHS = [[1], [2, 15, 16, 17], [31, 0, 32, 33], [100, 1, 37], [255, 257], [256], [0, 0], []]


class Case(NamedTuple):
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    cu: torch.Tensor


class Gradients(NamedTuple):
    out: torch.Tensor
    dq: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def case(lens: list[int], heads: int, kv_heads: int, d: int, dtype: torch.dtype, *, seed: int = 0) -> Case:
    """Random inputs, as slices of wider buffers that hold NaN elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    q, k, v, dout = (strided(generator, dtype, sum(lens), h, d) for h in (heads, kv_heads, kv_heads, heads))
    return Case(q, k, v, dout, boundaries(lens))


def run(c: Case, backend: str, **options: Any) -> Gradients:
    """The op and its gradients."""
    q, k, v = (x.detach().requires_grad_() for x in c[:3])
    out = varlen_attention(q, k, v, c.cu, backend=backend, **options)
    return Gradients(out.detach(), *torch.autograd.grad(out, (q, k, v), c.dout))


def formula(
    c: Case, *, scale: float | None = None, window: int | None = None, softcap: float | None = None
) -> Gradients:
    """The same by autograd on whole matrices of scores, in the inputs' dtype."""
    q, k, v = (x.detach().requires_grad_() for x in c[:3])
    group, outs = q.shape[1] // k.shape[1], [q[:0] + k[:0].sum() + v[:0].sum()]
    for start, end in pairwise(c.cu.tolist()):
        rows = [q[start:end], *(x[start:end].repeat_interleave(group, 1) for x in (k, v))]
        queries, keys, values = (x.transpose(0, 1) for x in rows)
        z = queries @ keys.mT * (q.shape[2] ** -0.5 if scale is None else scale)
        z = z if softcap is None else softcap * torch.tanh(z / softcap)
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (back >= 0) & (back < (window or end - start + 1))
        outs.append((z.masked_fill(~seen, -math.inf).softmax(-1) @ values).transpose(0, 1))
    out = torch.cat(outs)
    return Gradients(out.detach(), *torch.autograd.grad(out, (q, k, v), c.dout))


def truth(c: Case, **options: Any) -> Gradients:
    """In float64."""
    return formula(Case(c.q.double(), c.k.double(), c.v.double(), c.dout.double(), c.cu), **options)


def rounded_softmax(c: Case, exact: Gradients, **options: Any) -> Gradients:
    """What rounding P, dS and the results once to the inputs' dtype may cost: half a unit of the sums of magnitudes."""
    magnitudes = Case(c.q, c.k, c.v.abs(), c.dout.abs(), c.cu)
    sizes = truth(magnitudes, **options)
    eps = torch.finfo(c.q.dtype).eps
    d = c.q.shape[2]
    # dS = P (dP - D): both parts are at most the largest |dout| . |v| of the row, whatever cancels between them
    dots = (
        (c.dout.double().abs().amax((0, 1)) * c.v.double().abs().amax((0, 1))).sum() if c.q.numel() else torch.zeros(())
    )
    reach = [dots * x.double().abs().amax() * d**-0.5 if x.numel() else dots for x in (c.k, c.q)]
    return Gradients(
        eps * (exact.out.abs() + sizes.out),
        eps * (exact.dq.abs() + reach[0]),
        eps * (exact.dk.abs() + reach[1]),
        eps * (exact.dv.abs() + sizes.dv.abs()),
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (40, None), (None, 2.0), (200, 1.0)])
@pytest.mark.parametrize("lens", LENGTHS, ids=str)
def test_matches_autograd(lens: list[int], window: int | None, softcap: float | None, backend: str) -> None:
    c = case(lens, 6, 2, 32, torch.bfloat16)
    exact = truth(c, window=window, softcap=softcap)
    allowed = rounded_softmax(c, exact, window=window, softcap=softcap)
    got = run(c, backend, window=window, softcap=softcap)
    for name in Gradients._fields:
        x = getattr(got, name)
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert ((x - getattr(exact, name)).abs() <= getattr(allowed, name)).all(), name


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(4, 4, 64), (8, 1, 80), (3, 1, 96), (4, 1, 128), (1, 1, 40)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_less_exact_than_torch(heads: int, kv_heads: int, d: int, backend: str) -> None:
    lens = [200, 65, 130]
    c = case(lens, heads, kv_heads, d, torch.bfloat16)
    exact, got = truth(c), run(c, backend)
    q, k, v = (x.detach().clone().requires_grad_() for x in c[:3])
    attend = torch.nn.functional.scaled_dot_product_attention
    rows = [[x[i:j].transpose(0, 1)[None] for x in (q, k, v)] for i, j in pairwise(c.cu.tolist())]
    rival = torch.cat([attend(r[0], r[1], r[2], is_causal=True, enable_gqa=True)[0].transpose(0, 1) for r in rows])
    theirs = Gradients(rival.detach(), *torch.autograd.grad(rival, (q, k, v), c.dout))
    for name in Gradients._fields:
        ours, other = ((getattr(x, name) - getattr(exact, name)).abs() for x in (got, theirs))
        assert ours.max() <= 2 * other.max(), name
        assert ours.square().mean().sqrt() <= 2 * other.square().mean().sqrt(), name


def test_float32_and_float64_run_on_the_reference_as_exactly() -> None:
    for dtype, bound in ((torch.float32, 64 * EPS_FP32), (torch.float64, 1e-13)):
        c = case([40, 0, 9], 4, 2, 24, dtype)
        for options in ({}, {"window": 5, "softcap": 3.0, "scale": -0.3}):
            for got, exact in zip(run(c, "auto", **options), truth(c, **options), strict=True):
                assert (got - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_does_not_see_its_neighbours(backend: str) -> None:
    lens = [33, 70, 20]
    c = case(lens, 4, 2, 48, torch.bfloat16)
    middle = slice(33, 103)
    q, k, v, dout = (x[middle] for x in c[:4])
    alone = run(Case(q, k, v, dout, boundaries([70])), backend)
    for x in c[:4]:
        x[:33] = float("nan")
        x[103:] = float("inf")
    together = run(c, backend)
    for x, y in zip(alone, together, strict=True):
        assert torch.equal(x, y[middle])


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides(backend: str) -> None:
    tokens, heads, kv_heads, d = 50, 4, 2, 32
    wide = torch.randn(tokens, (heads + 2 * kv_heads) * d).bfloat16()
    q, k, v = (x.unflatten(1, (-1, d)) for x in wide.split([heads * d, kv_heads * d, kv_heads * d], 1))
    cu, dout = boundaries([20, 30]), torch.randn(heads, tokens, d).bfloat16().transpose(0, 1)
    plain = Case(q.contiguous(), k.contiguous(), v.contiguous(), dout.contiguous(), cu)
    turned = Case(
        q.transpose(0, 1).contiguous().transpose(0, 1), k, v.permute(2, 0, 1).contiguous().permute(1, 2, 0), dout, cu
    )
    expected = run(plain, backend)
    for c in (Case(q, k, v, dout, cu), turned):
        for x, y in zip(run(c, backend), expected, strict=True):
            assert torch.equal(x, y)
    # a gradient that is one number everywhere has no strides at all
    ones = torch.ones((), dtype=torch.bfloat16).expand(tokens, heads, d)
    for x, y in zip(
        run(plain._replace(dout=ones), backend), run(plain._replace(dout=ones.contiguous()), backend), strict=True
    ):
        assert torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_some_inputs_ask_for_a_gradient(backend: str) -> None:
    c = case([20, 13], 2, 1, 32, torch.bfloat16)
    k = c.k.detach().requires_grad_()
    out = varlen_attention(c.q, k, c.v, c.cu, backend=backend)
    (dk,) = torch.autograd.grad(out, k, c.dout)
    assert torch.equal(dk, run(c, backend).dk)
    assert not varlen_attention(c.q, c.k, c.v, c.cu, backend=backend).requires_grad


OPS = torch.ops.gradshield_fast
CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_registered_right(backend: str) -> None:
    c = case([20, 13], 2, 1, 32, torch.bfloat16)
    inputs = [x.detach().contiguous().requires_grad_() for x in c[:3]]
    options = (0.2, 7, 3.0, backend)
    torch.library.opcheck(OPS.varlen_attention.default, (*inputs, c.cu, *options), test_utils=CHECKS)
    out, lse = OPS.varlen_attention(*c[:3], c.cu, *options)
    torch.library.opcheck(OPS.varlen_attention_backward.default, (c.dout, *c[:3], out, lse, c.cu, *options))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_whole_with_its_gradients(dynamic: bool, backend: str) -> None:
    torch._dynamo.reset()

    def step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
        return varlen_attention(q * 2, k, v, cu, window=30, backend=backend).float().square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lens in ([20, 13], [40, 5, 9]):
        c = case(lens, 4, 2, 32, torch.bfloat16)
        q, k, v = (x.detach().contiguous().requires_grad_() for x in c[:3])
        got, expected = (torch.autograd.grad(f(q, k, v, c.cu), (q, k, v)) for f in (compiled, step))
        for x, y in zip(got, expected, strict=True):
            assert torch.equal(x, y)


def test_the_backend_that_is_named_runs_both_passes() -> None:
    c = case([20, 13], 2, 1, 32, torch.bfloat16)
    with dispatch.record() as seen:
        run(c, "reference")
    assert seen == {"varlen_attention": {"reference"}}
    with pytest.raises(BackendUnavailable, match=r"'native' cannot run these inputs: .*(float64|native ext)"):
        run(case([4], 2, 1, 32, torch.float64), "native")
    assert dispatch.why_not("varlen_attention", "native", torch.zeros(1, 1, 8, dtype=torch.float64)) is not None


def test_bad_calls_name_the_op_and_what_came() -> None:
    q, k, v, _, cu = case([5, 4], 4, 2, 16, torch.bfloat16)
    with pytest.raises(
        InputError, match=r"varlen_attention: q, k and v must have one dtype, got torch.bfloat16 and torch\.f"
    ):
        varlen_attention(q, k.float(), v, cu)
    with pytest.raises(InputError, match=r"varlen_attention: q must be \[tokens, heads, d\], got shape \(9, 64\)"):
        varlen_attention(q.flatten(1), k, v, cu)
    with pytest.raises(InputError, match="kv_heads a divisor of the 4 heads of q"):
        varlen_attention(q, k[:, :1].expand(-1, 3, -1), v[:, :1].expand(-1, 3, -1), cu)
    with pytest.raises(InputError, match="k and v must be"):
        varlen_attention(q, k, v[..., :8], cu)
    with pytest.raises(InputError, match="q has 9 tokens, but k has 8"):
        varlen_attention(q, k[:8], v, cu)
    with pytest.raises(InputError, match="cu_seqlens must end at the number of tokens: got 8"):
        varlen_attention(q, k, v, boundaries([5, 3]))
    with pytest.raises(InputError, match="window must be at least 1"):
        varlen_attention(q, k, v, cu, window=0)
    with pytest.raises(InputError, match="softcap must be positive"):
        varlen_attention(q, k, v, cu, softcap=-1.0)
    with pytest.raises(InputError, match="scale must be finite"):
        varlen_attention(q, k, v, cu, scale=math.inf)
    with pytest.raises(InputError, match="backend must be one of"):
        varlen_attention(q, k, v, cu, backend="flash")


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 40])
def test_on_a_gpu(window: int | None) -> None:
    c = case([100, 0, 1, 257], 6, 2, 64, torch.bfloat16)
    exact = truth(c, window=window)
    allowed = rounded_softmax(c, exact, window=window)
    there = Case(c.q.cuda(), c.k.cuda(), c.v.cuda(), c.dout.cuda(), c.cu.cuda())
    for backend in ("native", "reference"):
        if dispatch.why_not("varlen_attention", backend, *there[:3]) is not None:
            continue
        first = run(there, backend, window=window)
        for name, x, again in zip(Gradients._fields, first, run(there, backend, window=window), strict=True):
            assert torch.equal(x, again), name
            assert ((x.cpu() - getattr(exact, name)).abs() <= getattr(allowed, name)).all(), name
