"""Every argument of every op, in every wrong form: an InputError that begins with the op's name, from each backend."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from gradshield_fast import ops
from gradshield_fast.errors import InputError
from gradshield_fast.ops.ghost_dot_lowrank.api import lowrank_contract, lowrank_project, membership
from tests.ops.cases import boundaries

A, G, CU = torch.randn(12, 8), torch.randn(12, 6), boundaries([3, 0, 9])
P, Q, R = torch.randn(6, 3), torch.randn(8, 3), torch.randn(2, 6, 8)
IDS, TABLE, HEAD, QKV = torch.arange(12) % 5, torch.randn(2, 5, 6), torch.randn(5, 8), torch.randn(12, 2, 8)
CALLS: dict[str, tuple[str, Callable[..., Any], dict[str, torch.Tensor]]] = {
    "ghost_dot": ("ghost_dot", ops.ghost_dot, {"a": A, "g": G, "r": R, "cu_seqlens": CU}),
    "ghost_dot_lowrank": (
        "ghost_dot_lowrank", ops.ghost_dot_lowrank, {"a": A, "g": G, "p": P, "q": Q, "cu_seqlens": CU},
    ),
    "lowrank_project": ("ghost_dot_lowrank", lowrank_project, {"a": A, "q": Q}),
    "lowrank_contract": (
        "ghost_dot_lowrank", lowrank_contract, {"z": A @ Q, "g": G, "p": P, "member": membership([1, 2], A)},
    ),
    "ghost_norm_sq": ("ghost_norm_sq", ops.ghost_norm_sq, {"a": A, "g": G, "cu_seqlens": CU}),
    "ghost_inner": (
        "ghost_norm_sq", ops.ghost_inner, {"left1": G, "right1": A, "left2": G, "right2": A, "cu_seqlens": CU},
    ),
    "ghost_gram": (
        "ghost_gram",
        ops.ghost_gram,
        {"a1": A, "g1": G, "cu_seqlens1": CU, "a2": A[:5], "g2": G[:5], "cu_seqlens2": boundaries([2, 3])},
    ),
    "ghost_project": ("ghost_project", ops.ghost_project, {"a": A, "g": G, "p_in": Q, "p_out": P, "cu_seqlens": CU}),
    "embedding_dot": ("embedding_dot", ops.embedding_dot, {"ids": IDS, "g": G, "r": TABLE, "cu_seqlens": CU}),
    "scale_dot": ("scale_dot", ops.scale_dot, {"x_hat": G, "g": G, "r": torch.randn(2, 6), "cu_seqlens": CU}),
    "linear_cross_entropy": (
        "linear_cross_entropy",
        ops.linear_cross_entropy,
        {"h": A, "weight": HEAD, "labels": IDS, "token_weight": torch.rand(12), "p": torch.randn(5, 3), "q": Q},
    ),
    "linear_cross_entropy, dense": (
        "linear_cross_entropy",
        ops.linear_cross_entropy,
        {"h": A, "weight": HEAD, "labels": IDS, "r": torch.randn(2, 5, 8)},
    ),
    "varlen_attention": ("varlen_attention", ops.varlen_attention, {"q": QKV, "k": QKV, "v": QKV, "cu_seqlens": CU}),
}  # fmt: skip


def wrong(x: torch.Tensor) -> Iterator[tuple[str, Any]]:
    """What is wrong in the place of a right argument, and its name."""
    yield "no axis", x.flatten()[0]
    yield "one axis more", x[None]
    yield "another device", x.to("meta")
    yield "complex", x.to(torch.complex64)
    yield "bool", x.bool()
    yield "8 bits", x.to(torch.int8)
    yield "the other kind of number", x.int() if x.is_floating_point() else x.float()
    yield "a list", x.tolist()
    yield "an array", x.numpy()
    if x.is_floating_point():
        yield "float8", x.to(torch.float8_e4m3fn)
        yield "sparse", x.to_sparse()
        yield "a column less", x[..., :-1]
    if x is not TABLE and x is not R:
        yield "a row less", x[:-1]
    if x.ndim == 1 and not x.is_floating_point():
        yield "beyond the end", x + 100
        yield "below 0", x - 1


# What is as right as before: fewer columns of what is summed over, or fewer directions.
RIGHT = {
    *((op, name, "a column less") for op in ("ghost_norm_sq",) for name in ("a", "g")),
    *(("ghost_project", name, "a column less") for name in ("p_in", "p_out")),
    ("lowrank_project", "a", "a row less"),
    ("lowrank_project", "q", "a column less"),
    ("lowrank_contract", "member", "a column less"),
    ("scale_dot", "r", "a row less"),
    ("linear_cross_entropy, dense", "r", "a row less"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_a_wrong_argument_is_refused_by_name(name: str, backend: str) -> None:
    op, call, arguments = CALLS[name]
    call(**arguments, backend=backend)
    for argument, right in arguments.items():
        for what, bad in wrong(right):
            if (name, argument, what) in RIGHT:
                call(**{**arguments, argument: bad}, backend=backend)
                continue
            with pytest.raises(InputError) as raised:
                call(**{**arguments, argument: bad}, backend=backend)
            assert str(raised.value).startswith(f"{op}: "), (argument, what, raised.value)


@pytest.mark.parametrize("name", CALLS)
def test_a_backend_that_does_not_exist_is_refused_by_name(name: str) -> None:
    op, call, arguments = CALLS[name]
    with pytest.raises(InputError, match=rf"^{op}: backend must be one of auto, .* got 'cuda'"):
        call(**arguments, backend="cuda")


def test_every_op_is_called() -> None:
    assert {op for op, _, _ in CALLS.values()} == set(ops.available())


def test_boundaries_may_lie_on_the_cpu_or_beside_the_inputs_and_nowhere_else() -> None:
    for op, call, arguments in CALLS.values():
        for name in arguments:
            if name.startswith("cu_seqlens"):
                with pytest.raises(InputError, match=rf"^{op}: {name} is on meta, but the inputs are on cpu; move"):
                    call(**{**arguments, name: arguments[name].to("meta")})
