"""What the Triton interpreter shows of the kernels; `test_interpreter.py` runs this file in a process of its own.

Results are compared with float64 on the same rounded inputs. Every `torch.empty` is filled with NaN, so that an entry
that no program writes shows; so are the margins of the inputs (`tests.ops.cases.strided`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradshield_fast.ops import (
    embedding_dot,
    ghost_dot,
    ghost_dot_lowrank,
    ghost_gram,
    ghost_inner,
    ghost_norm_sq,
    ghost_project,
    linear_cross_entropy,
    scale_dot,
    triton_support,
)
from gradshield_fast.ops.ghost_gram import kernel_triton as gram
from gradshield_fast.ops.ghost_norm_sq import kernel_triton as norm
from gradshield_fast.ops.ghost_project import kernel_triton as project
from gradshield_fast.ops.linear_cross_entropy import kernel_triton as head
from gradshield_fast.ops.triton_support import jit, tl
from gradshield_fast.ops.triton_tiles import split
from tests.kernels.native.calls import Size, calls
from tests.ops.cases import BOUND, DTYPES, boundaries, far, packed, per_example, stack, strided

LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=5)
WIDTH = st.integers(1, 70)
KIND = st.sampled_from(DTYPES)
FEW = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill new tensors with NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *shape, **options: empty(*shape, **options).fill_(float("nan")))


def close(out: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor) -> None:
    """Hold a result against the promise of every op."""
    assert out.dtype == torch.float32
    assert out.shape == truth.shape
    assert ((out - truth).abs() <= BOUND * scale).all()


def twice(call: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Run something twice and require the same bits."""
    out = call()
    assert torch.equal(out, call())
    return out


def test_this_is_the_interpreter() -> None:
    assert triton_support.INTERPRETED


@FEW
@given(lens=LENGTHS, d_in=WIDTH, d_out=WIDTH, k=st.integers(1, 3), kind=KIND, r_kind=KIND, transposed=st.booleans())
def test_ghost_dot(
    lens: list[int], d_in: int, d_out: int, k: int, kind: torch.dtype, r_kind: torch.dtype, transposed: bool
) -> None:
    a, g, r, cu = packed(lens, d_in, d_out, kind, directions=k)
    r = r.to(r_kind)
    r = r.mT.contiguous().mT if transposed else r
    gradients, magnitudes = per_example(a, g, cu)
    truth = stack([(r.double() * x).sum((1, 2)) for x in gradients])
    scale = stack([(r.double().abs() * x).sum((1, 2)) for x in magnitudes])
    close(twice(lambda: ghost_dot(a, g, r, cu, backend="triton")), truth, scale)


@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_ghost_dot_over_several_tiles(kind: torch.dtype) -> None:
    a, g, r, cu = packed([130, 0, 70], 150, 140, kind, directions=3)
    gradients, magnitudes = per_example(a, g, cu)
    truth = stack([(r.double() * x).sum((1, 2)) for x in gradients])
    scale = stack([(r.double().abs() * x).sum((1, 2)) for x in magnitudes])
    close(ghost_dot(a, g, r, cu, backend="triton"), truth, scale)


@FEW
@given(tokens=st.integers(0, 90), d_in=WIDTH, d_out=WIDTH, rank=st.integers(1, 80), kind=KIND, p_kind=KIND)
def test_lowrank(tokens: int, d_in: int, d_out: int, rank: int, kind: torch.dtype, p_kind: torch.dtype) -> None:
    a, g, _, _ = packed([tokens], d_in, d_out, kind)
    generator = torch.Generator().manual_seed(rank)
    p, q = strided(generator, p_kind, d_out, rank), strided(generator, p_kind, d_in, rank)
    ranks = [rank // 2, rank - rank // 2]
    parts = list(zip(p.double().split(ranks, 1), q.double().split(ranks, 1), strict=True))
    a2, g2 = a.double(), g.double()
    truth = torch.stack([((a2 @ y) * (g2 @ x)).sum(1) for x, y in parts], 1)
    scale = torch.stack([((a2.abs() @ y.abs()) * (g2.abs() @ x.abs())).sum(1) for x, y in parts], 1)
    close(twice(lambda: ghost_dot_lowrank(a, g, p, q, ranks=ranks, backend="triton")), truth, scale)


@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_lowrank_cuts_a_long_depth(kind: torch.dtype) -> None:
    a, g, _, _ = packed([3], 2100, 1500, kind)
    p, q = torch.randn(1500, 5), torch.randn(2100, 5).mT.contiguous().mT
    truth = ((a.double() @ q.double()) * (g.double() @ p.double())).sum(1)
    scale = ((a.double().abs() @ q.double().abs()) * (g.double().abs() @ p.double().abs())).sum(1)
    close(ghost_dot_lowrank(a, g, p, q, backend="triton"), truth, scale)


@FEW
@given(tokens=st.integers(0, 9), width=st.integers(1, 300), k=st.integers(1, 6), kind=KIND, r_kind=KIND)
def test_embedding_and_scale(tokens: int, width: int, k: int, kind: torch.dtype, r_kind: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    g, x = strided(generator, kind, tokens, width), strided(generator, kind, tokens, width)
    table, r = strided(generator, r_kind, k, 7, width), strided(generator, r_kind, k, width)
    ids = torch.randint(7, (tokens,), generator=generator)
    terms = table.double()[:, ids].transpose(0, 1) * g.double()[:, None]
    close(embedding_dot(ids, g, table, backend="triton"), terms.sum(2), terms.abs().sum(2))
    terms = (g.double() * x.double())[:, None] * r.double()
    close(scale_dot(x, g, r, backend="triton"), terms.sum(2), terms.abs().sum(2))
    terms = g.double()[:, None] * r.double()
    close(scale_dot(None, g, r, backend="triton"), terms.sum(2), terms.abs().sum(2))


def test_an_id_outside_the_table_is_not_silent() -> None:
    g, table = torch.randn(3, 8), torch.randn(1, 7, 8)
    module = embedding_dot.__globals__["kernel_triton"]
    out = module.embedding_dot(torch.tensor([0, 7, -1]), g, table)
    assert out.isnan().flatten().tolist() == [False, True, True]


@FEW
@given(lens=LENGTHS, d_in=WIDTH, d_out=WIDTH, kind=KIND, other=KIND, same=st.booleans())
def test_ghost_inner(lens: list[int], d_in: int, d_out: int, kind: torch.dtype, other: torch.dtype, same: bool) -> None:
    a1, g1, _, cu = packed(lens, d_in, d_out, kind)
    a2, g2, _, _ = (a1, g1, None, None) if same else packed(lens, d_in, d_out, other, seed=1)
    (left, left_size), (right, right_size) = per_example(a1, g1, cu), per_example(a2, g2, cu)
    truth = stack([(x * y).sum() for x, y in zip(left, right, strict=True)])
    scale = stack([(x * y).sum() for x, y in zip(left_size, right_size, strict=True)])
    close(twice(lambda: ghost_inner(g1, a1, g2, a2, cu, backend="triton")), truth, scale)


def test_both_orders_of_the_sum_in_one_batch() -> None:
    a, g, _, cu = packed([3, 150, 0, 12, 13, 40], 20, 9, torch.bfloat16)
    gradients, magnitudes = per_example(a, g, cu)
    truth, scale = stack([x.square().sum() for x in gradients]), stack([x.square().sum() for x in magnitudes])
    close(ghost_norm_sq(a, g, cu, backend="triton"), truth, scale)


@pytest.mark.parametrize("kind", DTYPES, ids=str)
def test_ids_stand_for_one_hot_rows(kind: torch.dtype) -> None:
    lens = [70, 0, 5, 33]
    cu, generator = boundaries(lens), torch.Generator().manual_seed(0)
    ids = torch.randint(11, (sum(lens),), generator=generator)
    e, a = strided(generator, kind, sum(lens), 6), strided(generator, torch.float32, sum(lens), 6)
    g = strided(generator, kind, sum(lens), 11)
    one_hot = torch.nn.functional.one_hot(ids, 11)
    (table, table_size), (weight, weight_size) = per_example(e, one_hot, cu), per_example(a, g, cu)
    truth = stack([(x * y).sum() for x, y in zip(table, weight, strict=True)])
    scale = stack([(x * y).sum() for x, y in zip(table_size, weight_size, strict=True)])
    close(ghost_inner(ids, e, g, a, cu, backend="triton"), truth, scale)
    close(ghost_inner(g, a, ids, e, cu, backend="triton"), truth, scale)
    close(ghost_inner(a, g, e, ids.int(), cu, backend="triton"), truth, scale)
    norm_sq = stack([x.square().sum() for x in table])
    close(ghost_norm_sq(ids, e, cu, backend="triton"), norm_sq, stack([x.square().sum() for x in table_size]))


@FEW
@given(lens=LENGTHS, others=LENGTHS, d_in=WIDTH, d_out=WIDTH, kind=KIND, other=KIND)
def test_ghost_gram(
    lens: list[int], others: list[int], d_in: int, d_out: int, kind: torch.dtype, other: torch.dtype
) -> None:
    a1, g1, _, cu1 = packed(lens, d_in, d_out, kind)
    a2, g2, _, cu2 = packed(others, d_in, d_out, other, seed=1)
    (left, left_size), (right, right_size) = per_example(a1, g1, cu1), per_example(a2, g2, cu2)
    truth = torch.einsum("nij,mij->nm", torch.stack(left), torch.stack(right))
    scale = torch.einsum("nij,mij->nm", torch.stack(left_size), torch.stack(right_size))
    close(twice(lambda: ghost_gram(a1, g1, cu1, a2, g2, cu2, backend="triton")), truth, scale)


@FEW
@given(lens=LENGTHS, d_in=WIDTH, d_out=WIDTH, k_in=st.integers(1, 40), k_out=st.integers(1, 40), kind=KIND)
def test_ghost_project(lens: list[int], d_in: int, d_out: int, k_in: int, k_out: int, kind: torch.dtype) -> None:
    a, g, _, cu = packed(lens, d_in, d_out, kind)
    generator = torch.Generator().manual_seed(3)
    p_in, p_out = strided(generator, torch.float32, d_in, k_in), strided(generator, torch.float32, d_out, k_out)
    gradients, magnitudes = per_example(a, g, cu)
    truth = stack([p_out.double().T @ x @ p_in.double() for x in gradients])
    scale = stack([p_out.double().abs().T @ x @ p_in.double().abs() for x in magnitudes])
    close(twice(lambda: ghost_project(a, g, p_in, p_out, cu, backend="triton")), truth, scale)


def test_a_long_example_is_cut_where_it_is_projected() -> None:
    a, g, _, cu = packed([1, 700], 6, 5, torch.float32)
    p_in, p_out = torch.randn(6, 3), torch.randn(5, 2)
    gradients, magnitudes = per_example(a, g, cu)
    truth = stack([p_out.double().T @ x @ p_in.double() for x in gradients])
    scale = stack([p_out.double().abs().T @ x @ p_in.double().abs() for x in magnitudes])
    close(ghost_project(a, g, p_in, p_out, cu, backend="triton"), truth, scale)


@pytest.mark.parametrize(("kind", "softcap"), [(torch.float32, None), (torch.bfloat16, 4.0)], ids=str)
def test_the_head_in_parts_is_the_head_in_one(
    kind: torch.dtype, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words beyond one part of the workspace, tokens beyond one block, several directions of each form."""
    generator = torch.Generator().manual_seed(1)
    h, weight = strided(generator, kind, 70, 20), strided(generator, kind, 1040, 20)
    labels = torch.randint(1040, (70,), generator=generator)
    labels[::4] = -100
    r = strided(generator, torch.float32, 2, 1040, 20)
    p, q = strided(generator, torch.float32, 1040, 5), strided(generator, torch.float32, 20, 5)

    def run(backend: str, double: bool, /, **direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
        floats = (lambda x: x.double()) if double else (lambda x: x)
        out = linear_cross_entropy(
            floats(h), floats(weight), labels, softcap=softcap, scale=0.7, backend=backend,
            **{name: floats(x) for name, x in direction.items()},
        )  # fmt: skip
        assert out.dot is not None
        return out.loss, out.dh, out.dot

    for direction in ({"r": r}, {"p": p, "q": q}):
        truth = run("reference", True, **direction)
        monkeypatch.setattr(head, "WORKSPACE", 1 << 26)
        one = run("triton", False, **direction)
        monkeypatch.setattr(head, "WORKSPACE", 1)
        assert head.part_of(70, 1040) == 1024
        for parts in (one, run("triton", False, **direction)):
            for x, y in zip(parts, truth, strict=True):
                torch.testing.assert_close(x.double(), y, rtol=2e-5, atol=2e-6 * float(y.abs().max()))
        for x, y in zip(one, run("triton", False, **direction), strict=True):
            assert not x.isnan().any()
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5 * float(y.abs().max()))


def test_a_label_outside_the_vocabulary_is_not_silent() -> None:
    h, weight = torch.randn(2, 8), torch.randn(5, 8)
    loss, _, _ = head.linear_cross_entropy(h, weight, torch.tensor([4, 5]), None, 1.0, None, None, None, None, None)
    assert loss.isnan().tolist() == [False, True]


def test_boundaries_that_leave_the_tokens_are_not_followed() -> None:
    a, g, _, _ = packed([8, 8], 20, 12, torch.bfloat16)
    wrong, right = torch.tensor([-5, 10, 4, 99], dtype=torch.int32), torch.tensor([0, 10, 10, 16], dtype=torch.int32)
    p, q = torch.randn(12, 3), torch.randn(20, 3)
    for call in (
        lambda cu: norm.ghost_inner(g, a, g, a, cu),
        lambda cu: gram.ghost_gram(a, g, right, a, g, cu),
        lambda cu: project.ghost_project(a, g, q, p, cu),
    ):
        assert torch.equal(call(wrong), call(right))


def test_one_example_that_is_not_a_number_leaves_the_others_alone() -> None:
    a, g, r, cu = packed([20, 30, 25], 12, 9, torch.float32)
    p, q = torch.randn(9, 3), torch.randn(12, 3)
    clean = [f(a, g, r, p, q, cu) for f in _OPS]
    a[25], g[26] = float("nan"), float("nan")
    for before, f in zip(clean, _OPS, strict=True):
        after = f(a, g, r, p, q, cu)
        assert torch.equal(after[[0, 2]], before[[0, 2]])
        assert after[1].isnan().any()


_OPS: list[Callable[..., torch.Tensor]] = [
    lambda a, g, r, p, q, cu: ghost_dot(a, g, r, cu, backend="triton"),
    lambda a, g, r, p, q, cu: ghost_dot_lowrank(a, g, p, q, cu, backend="triton"),
    lambda a, g, r, p, q, cu: ghost_inner(g, a, g, a, cu, backend="triton"),
    lambda a, g, r, p, q, cu: ghost_project(a, g, q, p, cu, backend="triton"),
    lambda a, g, r, p, q, cu: ghost_gram(a, g, cu, a[:20], g[:20], cu[:2], backend="triton"),
]


@pytest.mark.parametrize("plant", ["dropped token", "scaled", "direction in bfloat16", "neighbour's token"])
def test_the_bound_catches_planted_errors(plant: str) -> None:
    a, g, r, cu = packed([16, 9], 32, 16, torch.bfloat16)
    gradients, magnitudes = per_example(a, g, cu)
    truth = stack([(r.double() * x).sum((1, 2)) for x in gradients])
    scale = stack([(r.double().abs() * x).sum((1, 2)) for x in magnitudes])
    if plant == "dropped token":
        g = g.clone()
        g[3] = 0
    elif plant == "scaled":
        r = r * 1.001
    elif plant == "direction in bfloat16":
        r = r.bfloat16()
    else:
        cu = torch.tensor([0, 17, 25], dtype=torch.int32)
    assert not ((ghost_dot(a, g, r, cu, backend="triton") - truth).abs() <= BOUND * scale).all()


@jit()
def _terms_kernel(x, out, SIZE: tl.constexpr, INTERPRETED: tl.constexpr):
    o = tl.arange(0, SIZE)
    b_0, b_1, b_2 = split(tl.load(x + o))
    tl.store(out + o, b_0.to(tl.float32))
    tl.store(out + SIZE + o, b_1.to(tl.float32))
    tl.store(out + 2 * SIZE + o, b_2.to(tl.float32))


def test_the_terms_of_a_split_are_exact() -> None:
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-100, 120, (1024,), generator=generator)
    x = torch.randn(1024, generator=generator) * 2.0**exponents
    x[:4] = torch.tensor([0.0, 1.0 + 2.0**-23, 1.0 - 2.0**-24, -(2.0**-108)])
    tiling = triton_support.Tiling({}, warps=4, stages=1, shared=0, registers=0)
    for values, terms in ((x, 3), (x.clamp(-6e4, 6e4).half(), 2), (x.bfloat16(), 1)):
        out = torch.empty(3, 1024)
        triton_support.launch(_terms_kernel, (1,), tiling, values, out, SIZE=1024)
        assert torch.equal(out.double().sum(0), values.double())
        assert not out[terms:].any()


def test_more_than_two_to_the_31_elements_by_strides() -> None:
    for call in calls(Size([3, 20], 20, 12, 3), torch.bfloat16):
        call = call._replace(fast=importlib.import_module(f"{call.slow.__package__}.kernel_triton"))
        for i, x in enumerate(call.inputs):
            for axis in range(x.ndim if x is not None and x.is_floating_point() else 0):
                assert x is not None
                moved = call._replace(inputs=(*call.inputs[:i], far(x, axis), *call.inputs[i + 1 :]))
                close(moved.run(), call.truth(), call.scale())


def test_pairs_need_no_room_for_their_products() -> None:
    """Token terms are all that is kept: parts x tokens, never tokens x tokens."""
    a, g, _, cu = packed([90], 8, 6, torch.float32)
    sizes = []
    empty = torch.empty
    torch.empty = lambda *shape, **options: sizes.append(torch.Size(shape).numel()) or empty(*shape, **options)
    try:
        norm.pair_terms((g, a, g, a), torch.zeros(90, 1).int(), torch.full((90, 1), 90).int())
    finally:
        torch.empty = empty
    assert cu[-1] == 90
    assert max(sizes) <= 16 * 90
