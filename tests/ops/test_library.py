"""Every op is one that torch knows: registered right, with shapes that hold, and whole under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gradshield_fast import ops
from gradshield_fast.errors import InputError
from gradshield_fast.ops.ghost_dot_lowrank.api import membership
from gradshield_fast.ops.library import NAMESPACE
from tests.ops.cases import packed

A, G, R, CU = packed([3, 0, 9], 8, 6, torch.bfloat16)
P, Q, MEMBER = torch.randn(6, 3), torch.randn(8, 3), membership([1, 2], torch.zeros(1))
IDS, TABLE = torch.arange(12) % 5, torch.randn(2, 5, 6)
H, HEAD, LABELS = torch.randn(12, 8), torch.randn(5, 8), torch.arange(12) % 5
NODES: dict[str, tuple[Any, ...]] = {
    "ghost_dot_terms": (A, G, R, "auto"),
    "lowrank_project": (A, Q, "auto"),
    "lowrank_contract": (A.float() @ Q, G, P, MEMBER, "auto"),
    "ghost_inner": (G, A, G, A, CU, "auto"),
    "ghost_gram": (A, G, CU, A[:3], G[:3], CU[:2], "auto"),
    "ghost_project": (A, G, Q, P, CU, "auto"),
    "embedding_dot_terms": (IDS, G, TABLE, "auto"),
    "scale_dot_terms": (None, G, torch.randn(2, 6), "auto"),
    "segment_sum": (G.float(), CU, "somewhere"),
    "linear_cross_entropy": (H, HEAD, LABELS, None, 1.0, 5.0, None, torch.randn(5, 3), Q, MEMBER, True, "auto"),
}


@pytest.mark.parametrize("name", NODES)
def test_is_registered_right(name: str) -> None:
    torch.library.opcheck(getattr(getattr(torch.ops, NAMESPACE), name).default, NODES[name])


def test_the_head_has_no_directions_where_none_are_given() -> None:
    head = torch.ops.gradshield_fast.linear_cross_entropy.default
    inputs = (H, HEAD, LABELS, None, 1.0, None, None, None, None, None, True, "auto")
    torch.library.opcheck(head, inputs)
    assert head(*inputs)[2].shape == (12, 0)


HEADS = torch.randn(12, 2, 8)
CALLS: dict[str, Callable[[], Any]] = {
    "ghost_dot": lambda: ops.ghost_dot(A, G, R, CU),
    "ghost_dot_lowrank": lambda: ops.ghost_dot_lowrank(A, G, P, Q, CU, ranks=[1, 2]),
    "ghost_norm_sq": lambda: ops.ghost_norm_sq(A, G, CU),
    "ghost_gram": lambda: ops.ghost_gram(A, G, CU, A, G, CU),
    "ghost_project": lambda: ops.ghost_project(A, G, Q, P, CU),
    "embedding_dot": lambda: ops.embedding_dot(IDS, G, TABLE, CU),
    "scale_dot": lambda: ops.scale_dot(G, G, torch.randn(2, 6), CU) * 0,
    "linear_cross_entropy": lambda: ops.linear_cross_entropy(H, HEAD, LABELS, p=torch.ones(5, 3), q=Q),
    "varlen_attention": lambda: ops.varlen_attention(HEADS, HEADS, HEADS, CU),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiles_whole_and_to_the_same_values(name: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(CALLS[name], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(), CALLS[name](), rtol=0, atol=0)


def test_every_op_is_covered() -> None:
    assert set(CALLS) == set(ops.available())


def test_values_are_checked_when_a_compiled_call_runs() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda ids: ops.embedding_dot(ids, G, TABLE, CU), fullgraph=True, backend="aot_eager")
    with pytest.raises(InputError, match=r"embedding_dot: ids must lie in 0..4 \(the table's rows\), got 0..9"):
        compiled(torch.arange(12) % 10)
    with pytest.raises(InputError, match="ghost_dot: cu_seqlens must end at the number of tokens: got 12, but"):
        ops.ghost_dot(A[:11], G[:11], R, CU)
