"""Every tiling of every kernel in the interpreter, against float64; `test_interpreter.py` runs this file.

Products and sums of one tile are made in float64 and rounded once, so that what is left of a result's last bits comes
from how blocks, parts and programs cut the sums: all tilings of a group must give the same bits. How the threads of a
program share a sum is not seen here, but in the compiled code (`order.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime import interpreter

from gradshield_fast.ops import triton_tuning
from gradshield_fast.ops.embedding_dot import kernel_triton as embedding
from gradshield_fast.ops.embedding_dot import reference as embedding_reference
from gradshield_fast.ops.ghost_dot import kernel_triton as dense
from gradshield_fast.ops.ghost_dot import reference as dense_reference
from gradshield_fast.ops.ghost_dot_lowrank import kernel_triton as lowrank
from gradshield_fast.ops.ghost_dot_lowrank import reference as lowrank_reference
from gradshield_fast.ops.ghost_norm_sq import kernel_triton as norm
from gradshield_fast.ops.ghost_norm_sq import reference as norm_reference
from gradshield_fast.ops.ghost_project import kernel_triton as project
from gradshield_fast.ops.ghost_project import reference as project_reference
from gradshield_fast.ops.linear_cross_entropy import kernel_triton as head
from gradshield_fast.ops.linear_cross_entropy import reference as head_reference
from gradshield_fast.ops.scale_dot import kernel_triton as scale
from gradshield_fast.ops.scale_dot import reference as scale_reference
from gradshield_fast.ops.triton_support import Tiling
from gradshield_fast.ops.triton_tuning import Tilings
from tests.ops.cases import BOUND, boundaries

BF16, F32 = torch.bfloat16, torch.float32
Tensors = tuple[Any, ...]
Call = tuple[Callable[..., Any], Callable[..., Any], Tensors]


def x(*shape: int, kind: torch.dtype = F32) -> torch.Tensor:
    """Values in a tensor that tensor descriptors can stand for."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(kind)


def dot(a: torch.dtype, r: torch.dtype, tokens: int = 150) -> Call:
    inputs = x(tokens, 264, kind=a), x(tokens, 136, kind=a), x(2, 136, 264, kind=r)
    return dense.ghost_dot, dense_reference.ghost_dot, inputs


def thin(a: torch.dtype, ranks: int) -> list[Call]:
    member = torch.eye(2).repeat(ranks, 1)[:ranks]
    return [
        (lowrank.lowrank_project, lowrank_reference.lowrank_project, (x(150, 520, kind=a), x(520, ranks))),
        (
            lowrank.lowrank_contract,
            lowrank_reference.lowrank_contract,
            (x(150, ranks), x(150, 520, kind=a), x(520, ranks), member),
        ),
    ]


def inner(kind: torch.dtype, other: torch.dtype, lens: list[int], d_in: int, d_out: int) -> Call:
    tokens = sum(lens)
    first = x(tokens, d_out, kind=kind), x(tokens, d_in, kind=kind)
    second = first if other == kind else (x(tokens, d_out, kind=other), x(tokens, d_in, kind=other))
    return norm.ghost_inner, norm_reference.ghost_inner, (*first, *second, boundaries(lens))


def loss(h: torch.dtype, weight: torch.dtype) -> Call:
    labels = torch.arange(150) % 136
    inputs = x(150, 264, kind=h), x(136, 264, kind=weight) * 0.1, labels, None, 0.7, 5.0, None, None, None, None

    def stacked(call: Callable[..., Any]) -> Callable[..., torch.Tensor]:
        return lambda *args: torch.cat([out[:, None] if out.ndim == 1 else out for out in call(*args)[:2]], 1)

    call, truth = stacked(head.linear_cross_entropy), stacked(head_reference.linear_cross_entropy)
    return call, truth, inputs


CASES: dict[str, tuple[Tilings, list[Call]]] = {
    "ghost_dot same": (dense.OF_SAME, [dot(BF16, BF16)]),
    "ghost_dot mixed": (dense.OF_MIXED, [dot(BF16, F32)]),
    "ghost_dot small": (dense.OF_SMALL, [dot(BF16, F32, 40)]),
    "ghost_dot wide": (dense.OF_WIDE, [dot(F32, F32)]),
    "lowrank narrow": (lowrank.OF_NARROW, thin(BF16, 40)),
    "lowrank few ranks": (lowrank.OF_FEW_RANKS, thin(BF16, 7)),
    "lowrank wide": (lowrank.OF_WIDE, thin(F32, 7)),
    "embedding_dot": (
        embedding.OF_ROWS,
        [
            (
                embedding.embedding_dot,
                embedding_reference.embedding_dot,
                (torch.arange(21) % 5, x(21, 600), x(2, 5, 600)),
            )
        ],
    ),
    "scale_dot": (scale.OF_ROWS, [(scale.scale_dot, scale_reference.scale_dot, (x(21, 600), x(21, 600), x(2, 600)))]),
    "pairs": (norm.OF_PAIRS, [inner(BF16, BF16, [70, 0, 30], 200, 200)]),
    "pairs mixed": (norm.OF_PAIRS_MIXED, [inner(BF16, F32, [70, 0, 30], 200, 200)]),
    "pairs wide": (norm.OF_PAIRS_WIDE, [inner(F32, F32, [70, 0, 30], 200, 200)]),
    "outer": (norm.OF_OUTER, [inner(F32, F32, [170, 0, 9], 20, 70), inner(BF16, F32, [170, 0, 9], 20, 70)]),
    "segments": (
        project.OF_SEGMENT,
        [
            (
                project.ghost_project,
                project_reference.ghost_project,
                (x(400, 30), x(400, 20), x(30, 40), x(20, 5), boundaries([9, 0, 391])),
            )
        ],
    ),
    "logits": (head.OF_LOGITS, [loss(BF16, BF16)]),
    "logits mixed": (head.OF_LOGITS_MIX, [loss(BF16, F32)]),
    "logits wide": (head.OF_LOGITS_WIDE, [loss(F32, F32)]),
    "pull": (head.OF_PULL, [loss(BF16, BF16)]),
    "pull wide": (head.OF_PULL_WIDE, [loss(F32, F32)]),
}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round a tile's products and sums once."""

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, imprecise: Any) -> Any:
        out = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return interpreter.TensorHandle(out.astype(d.data.dtype), d.dtype.scalar)

    def total(self: Any, given: Any) -> Any:
        data = given.handle.data
        out = np.sum(data.astype(np.float64), axis=self.axis, keepdims=self.keep_dims).astype(data.dtype)
        return self.to_tensor(out, given.dtype)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)
    monkeypatch.setattr(interpreter.ReduceOps, "sum", total)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))


def force(monkeypatch: pytest.MonkeyPatch, wanted: Tilings, tiling: Tiling) -> list[Tiling]:
    """Let a tiling be taken wherever its kernel may be tuned; what was taken."""
    taken: list[Tiling] = []

    def choose(kernel: str, given: Tilings, inputs: Any, call: Any, *, descriptors: bool = False) -> Tiling:
        if given is not wanted:
            return given.first
        assert descriptors or not tiling.descriptors, f"{kernel}: these inputs cannot be described"
        taken.append(tiling)
        return tiling

    monkeypatch.setattr(triton_tuning, "choose", choose)
    monkeypatch.setattr(head, "choose", choose)
    return taken


def within(name: str, out: torch.Tensor, call: Call) -> None:
    """Hold a result against float64; the head's bound has a test of its own, term by term."""
    _, reference, inputs = call
    wide = [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs]
    truth = reference(*wide)
    if name.startswith(("logits", "pull")):
        torch.testing.assert_close(out.double(), truth, rtol=2e-5, atol=2e-6 * float(truth.abs().max()))
        return
    size = reference(*[v.abs() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in wide])
    allowed = 3 if name.startswith(("pairs", "outer")) else 1
    assert ((out - truth).abs() <= allowed * BOUND * size).all()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("name", CASES)
def test_every_tiling_is_right_and_a_group_has_one_result(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given, calls = CASES[name]
    results: list[tuple[int, str, list[torch.Tensor]]] = []
    for at, group in enumerate(given.groups):
        for tiling in group:
            taken = force(monkeypatch, given, tiling)
            outs = [call[0](*call[2]) for call in calls]
            assert taken, "these inputs do not reach the tilings"
            for out, call in zip(outs, calls, strict=True):
                within(name, out, call)
            results.append((at, tiling.label, outs))
    firsts = {at: outs for at, _, outs in reversed(results)}
    for at, label, outs in results:
        alike = [other for other in firsts if all(map(torch.equal, outs, firsts[other]))]
        print(f"{name}, {label}: group {at}, the same bits here as groups {alike}")
        assert at in alike, label


def test_every_tiling_has_a_case() -> None:
    tried = {id(given) for given, _ in CASES.values()}
    for room in (dense, lowrank, embedding, scale, norm, project, head):
        assert all(id(given) in tried for given in room.TILINGS), room.__name__


@pytest.mark.usefixtures("exact")
def test_blocks_of_another_depth_do_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the test above would show nothing."""
    call, _, inputs = dot(BF16, BF16)
    outs = []
    for tiling in (dense.SAME, dense.SAME.but({"BLOCK_I": 128}), dense.SAME.but({"BLOCK_O": 64})):
        force(monkeypatch, dense.OF_SAME, tiling)
        outs.append(call(*inputs))
    assert not torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
