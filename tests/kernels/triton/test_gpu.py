"""Every Triton kernel on a GPU: the promise of the ops at sizes where the matrix units' rounding would show."""

from __future__ import annotations

import pytest
import torch

from gradshield_fast.ops import (
    embedding_dot,
    ghost_dot,
    ghost_dot_lowrank,
    ghost_gram,
    ghost_inner,
    ghost_project,
    linear_cross_entropy,
    scale_dot,
)
from tests.ops.cases import BOUND, DTYPES, boundaries

pytest.importorskip("triton", reason="Triton is not installed")

from gradshield_fast.ops.triton_tuning import about, runnable
from tests.kernels.triton import interpreted_tilings as every

pytestmark = pytest.mark.gpu

LENS = [700, 0, 1, 323, 64]
WIDTHS = [(576, 1536), (4096, 1000), (77, 130)]


def random(seed: int, kind: torch.dtype, *shape: int, positive: bool = False) -> torch.Tensor:
    """Values on the GPU, a slice of a wider buffer; all of one sign where a biased rounding is to show."""
    generator = torch.Generator().manual_seed(seed)
    buffer = torch.full((*shape[:-1], shape[-1] + 8), float("nan"), dtype=kind)
    values = torch.rand(shape, generator=generator) if positive else torch.randn(shape, generator=generator)
    buffer[..., : shape[-1]] = values.to(kind)
    return buffer.cuda()[..., : shape[-1]]


def close(out: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor) -> None:
    """Hold a result against the promise of every op."""
    assert out.dtype == torch.float32
    worst = ((out.double() - truth).abs() / (BOUND * scale).clamp_min(1e-300)).max()
    assert worst <= 1, f"error over bound: {float(worst):.2f}"


def rows(x: torch.Tensor) -> torch.Tensor:
    """Sum position terms over the packed examples, in float64."""
    return torch.stack([part.sum(0) for part in x.split(LENS)])


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("r_kind", DTYPES, ids=str)
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), WIDTHS)
def test_dense_and_low_rank(d_in: int, d_out: int, positive: bool, r_kind: torch.dtype, kind: torch.dtype) -> None:
    tokens = sum(LENS)
    cu = boundaries(LENS).cuda()
    a, g = random(0, kind, tokens, d_in, positive=positive), random(1, kind, tokens, d_out, positive=positive)
    r = random(2, r_kind, 2, d_out, d_in, positive=positive)
    a2, g2, r2 = a.double(), g.double(), r.double()
    truth = torch.stack([((a2 @ x.T) * g2).sum(1) for x in r2], 1)
    scale = torch.stack([((a2.abs() @ x.abs().T) * g2.abs()).sum(1) for x in r2], 1)
    out = ghost_dot(a, g, r, backend="triton")
    close(out, truth, scale)
    assert torch.equal(out, ghost_dot(a, g, r, backend="triton"))
    close(ghost_dot(a, g, r, cu, backend="triton"), rows(truth), rows(scale))
    for rank in (3, 16, 70):
        p, q = random(3, r_kind, d_out, rank, positive=positive), random(4, r_kind, d_in, rank, positive=positive)
        truth = ((a2 @ q.double()) * (g2 @ p.double())).sum(1)
        scale = ((a2.abs() @ q.double().abs()) * (g2.abs() @ p.double().abs())).sum(1)
        close(ghost_dot_lowrank(a, g, p, q, backend="triton"), truth, scale)
    p, q = random(3, r_kind, d_out, 9, positive=positive), random(4, r_kind, d_in, 20, positive=positive)
    left, right, size = g2 @ p.double(), a2 @ q.double(), (g2.abs() @ p.double().abs(), a2.abs() @ q.double().abs())
    truth = torch.stack([x.T @ y for x, y in zip(left.split(LENS), right.split(LENS), strict=True)])
    scale = torch.stack([x.T @ y for x, y in zip(size[0].split(LENS), size[1].split(LENS), strict=True)])
    close(ghost_project(a, g, q, p, cu, backend="triton"), truth, scale)


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize(("d_in", "d_out"), [(576, 192), (48, 40)])
def test_norms_and_gram(d_in: int, d_out: int, positive: bool, other: torch.dtype, kind: torch.dtype) -> None:
    tokens, cu = sum(LENS), boundaries(LENS).cuda()
    a, g = random(0, kind, tokens, d_in, positive=positive), random(1, kind, tokens, d_out, positive=positive)
    b, h = random(2, other, tokens, d_in, positive=positive), random(3, other, tokens, d_out, positive=positive)

    def gradients(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        parts = zip(y.split(LENS), x.split(LENS), strict=True)
        return torch.stack([v.T @ u for v, u in parts]).flatten(1)

    first, second = gradients(a.double(), g.double()), gradients(b.double(), h.double())
    sizes = gradients(a.double().abs(), g.double().abs()), gradients(b.double().abs(), h.double().abs())
    close(ghost_inner(g, a, g, a, cu, backend="triton"), (first * first).sum(1), (sizes[0] * sizes[0]).sum(1))
    close(ghost_inner(g, a, h, b, cu, backend="triton"), (first * second).sum(1), (sizes[0] * sizes[1]).sum(1))
    close(ghost_gram(a, g, cu, b, h, cu, backend="triton"), first @ second.T, sizes[0] @ sizes[1].T)


@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_rows(kind: torch.dtype) -> None:
    g, x, r = random(0, kind, 1000, 4097), random(1, kind, 1000, 4097), random(2, torch.float32, 5, 4097)
    table, ids = random(3, torch.float32, 5, 300, 4097), torch.randint(300, (1000,)).cuda()
    terms = (g.double() * x.double())[:, None] * r.double()
    close(scale_dot(x, g, r, backend="triton"), terms.sum(2), terms.abs().sum(2))
    terms = table.double()[:, ids].transpose(0, 1) * g.double()[:, None]
    close(embedding_dot(ids, g, table, backend="triton"), terms.sum(2), terms.abs().sum(2))


@pytest.mark.parametrize("kind", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_head(softcap: float | None, kind: torch.dtype) -> None:
    h, weight = random(0, kind, 300, 576) * 0.1, random(1, kind, 20000, 576)
    labels = torch.randint(20000, (300,)).cuda()
    r = random(2, torch.float32, 2, 20000, 576)
    out = linear_cross_entropy(h, weight, labels, softcap=softcap, r=r, backend="triton")
    truth = linear_cross_entropy(
        h.double(), weight.double(), labels, softcap=softcap, r=r.double(), backend="reference"
    )
    assert out.dot is not None
    assert truth.dot is not None
    # the room's own test holds the bound per entry; here a wrong tile would be far outside
    for x, y in ((out.loss, truth.loss), (out.dh, truth.dh), (out.dot, truth.dot)):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


def test_more_than_two_to_the_31_elements() -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < 16 << 30:
        pytest.skip("needs 16 GB of free GPU memory")
    tokens, width = (1 << 21) + 3, 1056
    a = torch.zeros(tokens, width, dtype=torch.bfloat16, device="cuda")
    a[-1] = 1
    g = torch.ones(tokens, 16, dtype=torch.bfloat16, device="cuda")
    r = torch.ones(16, width, device="cuda")
    assert a.numel() > 1 << 31
    dense = ghost_dot(a, g, r, backend="triton")
    low = ghost_dot_lowrank(
        a, g, torch.ones(16, 1, device="cuda"), torch.ones(width, 1, device="cuda"), backend="triton"
    )
    for out in (dense, low):
        assert float(out[-1]) == 16 * width
        assert not out[:-1].any()


@pytest.mark.parametrize("name", every.CASES)
def test_every_tiling_is_right_and_a_group_has_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the compiled code promises of a group (`order.py`), seen in the results."""
    given, calls = every.CASES[name]
    on_gpu = [[v.cuda() if isinstance(v, torch.Tensor) else v for v in call[2]] for call in calls]
    for group in runnable(given, about(torch.device("cuda", 0)), descriptors=True):
        first: list[torch.Tensor] = []
        for tiling in group:
            every.force(monkeypatch, given, tiling)
            outs = [call[0](*inputs).cpu() for call, inputs in zip(calls, on_gpu, strict=True)]
            for out, call in zip(outs, calls, strict=True):
                every.within(name, out, call)
            first = first or outs
            assert all(map(torch.equal, outs, first)), tiling.label
