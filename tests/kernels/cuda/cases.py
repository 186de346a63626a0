"""The five ops as (run, truth, size) on one packed case: the kernels' answer, float64 truth, and sum |terms|."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from gradshield_fast.ops.embedding_dot import kernel_cuda as embedding_cuda
from gradshield_fast.ops.embedding_dot import reference as embedding_reference
from gradshield_fast.ops.ghost_dot import kernel_cuda as dot_cuda
from gradshield_fast.ops.ghost_dot import reference as dot_reference
from gradshield_fast.ops.ghost_dot_lowrank import kernel_cuda as lowrank_cuda
from gradshield_fast.ops.ghost_dot_lowrank import reference as lowrank_reference
from gradshield_fast.ops.ghost_norm_sq import kernel_cuda as norm_cuda
from gradshield_fast.ops.ghost_norm_sq import reference as norm_reference
from gradshield_fast.ops.ghost_project import kernel_cuda as project_cuda
from gradshield_fast.ops.ghost_project import reference as project_reference
from tests.ops.cases import BOUND, boundaries

LAYOUTS = ("contiguous", "sliced", "transposed")
"""contiguous rows take 16-byte copies; slices of a NaN-filled buffer at an odd offset, and transposed views, do not."""


@dataclass
class Case:
    """Packed inputs; g may have another dtype than a."""

    a: torch.Tensor
    g: torch.Tensor
    r: torch.Tensor
    q: torch.Tensor
    p: torch.Tensor
    member: torch.Tensor
    ids: torch.Tensor
    cu: torch.Tensor

    def to(self, device: str) -> Case:
        """The same case elsewhere, strides and the NaN between rows included."""
        return Case(**{name: _move(x, device) for name, x in vars(self).items()})


def _move(x: torch.Tensor, device: str) -> torch.Tensor:
    """A view's whole buffer moves, so that its strides stay."""
    buffer = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return buffer.as_strided(x.shape, x.stride(), x.storage_offset())


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The values of x, laid out in one of `LAYOUTS`."""
    if layout == "contiguous":
        return x.contiguous()
    if layout == "transposed":
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"), dtype=x.dtype)
    view = buffer[..., 3 : 3 + x.shape[-1]]
    view.copy_(x)
    return view


def case(
    lens: list[int],
    d_in: int,
    d_out: int,
    *,
    dtype_a: torch.dtype = torch.bfloat16,
    dtype_g: torch.dtype | None = None,
    dtype_r: torch.dtype = torch.float32,
    layout: str = "contiguous",
    directions: int = 2,
    ranks: int = 7,
    positive: bool = False,
    seed: int = 0,
) -> Case:
    """One packed case; `positive` makes every term positive, where rounding that cuts adds up fastest."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(lens)

    def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
        x = torch.randn(shape, generator=generator)
        return arrange((x.abs() + 0.5 if positive else x).to(dtype), layout)

    member = torch.zeros(ranks, directions)
    member[torch.arange(ranks), torch.arange(ranks) % directions] = 1
    return Case(
        a=values(dtype_a, tokens, d_in),
        g=values(dtype_g or dtype_a, tokens, d_out),
        r=values(dtype_r, directions, d_out, d_in),
        q=values(torch.float32, d_in, ranks),
        p=values(torch.float32, d_out, ranks),
        member=member,
        ids=torch.randint(max(d_out, 1), (tokens,), generator=generator),
        cu=boundaries(lens),
    )


Formula = Callable[..., torch.Tensor]


def _ghost_dot(room: Formula, c: Case) -> torch.Tensor:
    return room(c.a, c.g, c.r)


def _project(room: Formula, c: Case) -> torch.Tensor:
    return room(c.a, c.q)


def _contract(room: Formula, c: Case) -> torch.Tensor:
    # z is an input of its own here, so that the bound is the kernel's and not that of both halves
    z = c.a[:, :1].to(c.q.dtype) * torch.linspace(0.5, 2, c.q.shape[1], dtype=c.q.dtype, device=c.a.device)
    return room(z, c.g, c.p, c.member)


def _embedding(room: Formula, c: Case) -> torch.Tensor:
    return room(c.ids, c.a, c.r)


def _norm(room: Formula, c: Case) -> torch.Tensor:
    return room(c.g, c.a, c.g, c.a, c.cu)


def _cross(room: Formula, c: Case) -> torch.Tensor:
    return room(c.g, c.a, c.g.flip(0), c.a.roll(1, 0), c.cu)


def _two_sided(room: Formula, c: Case) -> torch.Tensor:
    return room(c.a, c.g, c.q, c.p[:, :3], c.cu)


OPS: dict[str, tuple[Callable[[Formula, Case], torch.Tensor], Formula, Formula]] = {
    "ghost_dot": (_ghost_dot, dot_cuda.ghost_dot, dot_reference.ghost_dot),
    "lowrank_project": (_project, lowrank_cuda.lowrank_project, lowrank_reference.lowrank_project),
    "lowrank_contract": (_contract, lowrank_cuda.lowrank_contract, lowrank_reference.lowrank_contract),
    "embedding_dot": (_embedding, embedding_cuda.embedding_dot, embedding_reference.embedding_dot),
    "ghost_norm_sq": (_norm, norm_cuda.ghost_inner, norm_reference.ghost_inner),
    "ghost_inner": (_cross, norm_cuda.ghost_inner, norm_reference.ghost_inner),
    "ghost_project": (_two_sided, project_cuda.ghost_project, project_reference.ghost_project),
}


def _mapped(c: Case, change: Callable[[torch.Tensor], torch.Tensor]) -> Case:
    return Case(**{name: change(x) if x.is_floating_point() else x for name, x in vars(c).items()})


def run(op: str, c: Case) -> torch.Tensor:
    """The kernels' answer."""
    call, kernel, _ = OPS[op]
    return call(kernel, c)


def error_in_bounds(op: str, c: Case, out: torch.Tensor) -> float:
    """The worst |out - truth| / (8 eps sum |terms|); above 1 breaks the promise, NaN becomes infinity."""
    call, _, formula = OPS[op]
    truth = call(formula, _mapped(c, torch.Tensor.double))
    size = call(formula, _mapped(c, lambda x: x.double().abs()))
    assert out.shape == truth.shape
    assert out.dtype == torch.float32
    if out.numel() == 0:
        return 0.0
    error = (out.double() - truth).abs()
    ratio = torch.where(error == 0, 0.0, error / (BOUND * size))
    return float(ratio.nan_to_num(nan=float("inf")).max())
