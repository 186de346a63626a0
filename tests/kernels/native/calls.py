"""Calls of the native kernels beside the reference in float64: op by op, with the bound's scale."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from gradshield_fast.ops import native
from gradshield_fast.ops.embedding_dot import kernel_native as embedding_native
from gradshield_fast.ops.embedding_dot import reference as embedding_reference
from gradshield_fast.ops.ghost_dot import kernel_native as dense_native
from gradshield_fast.ops.ghost_dot import reference as dense_reference
from gradshield_fast.ops.ghost_dot_lowrank import kernel_native as lowrank_native
from gradshield_fast.ops.ghost_dot_lowrank import reference as lowrank_reference
from gradshield_fast.ops.ghost_gram import kernel_native as gram_native
from gradshield_fast.ops.ghost_gram import reference as gram_reference
from gradshield_fast.ops.ghost_norm_sq import kernel_native as norm_native
from gradshield_fast.ops.ghost_norm_sq import reference as norm_reference
from gradshield_fast.ops.ghost_project import kernel_native as project_native
from gradshield_fast.ops.ghost_project import reference as project_reference
from gradshield_fast.ops.scale_dot import kernel_native as scale_native
from gradshield_fast.ops.scale_dot import reference as scale_reference
from tests.ops.cases import boundaries, strided

needs_native = pytest.mark.skipif(native.extension is None, reason=native.missing)


def isas() -> list[Any]:
    """Every instruction set as a parameter; those that this processor lacks are skipped."""
    missing = pytest.mark.skip(reason="this processor does not have it, or the extension is not built")
    return [
        pytest.param(i, id=name, marks=() if native.isa(i) == name else missing) for i, name in enumerate(native.ISAS)
    ]


class Call(NamedTuple):
    """One kernel call: the modules, the function, its inputs."""

    fast: ModuleType
    slow: ModuleType
    function: str
    inputs: tuple[torch.Tensor | None, ...]

    def run(self, **options: int) -> torch.Tensor:
        """The native result."""
        return getattr(self.fast, self.function)(*self.inputs, **options)

    def truth(self, change: Callable[[torch.Tensor], torch.Tensor] = torch.Tensor.double) -> torch.Tensor:
        """The reference in float64, on inputs that `change` makes so."""
        changed = {id(x): change(x) if x.is_floating_point() else x for x in self.inputs if x is not None}
        return getattr(self.slow, self.function)(*(changed.get(id(x)) for x in self.inputs))

    def scale(self) -> torch.Tensor:
        """The same of the magnitudes: the sum that the bound is relative to."""
        return self.truth(lambda x: x.double().abs())


class Size(NamedTuple):
    """Shape of the inputs."""

    lens: list[int]
    d_in: int
    d_out: int
    rank: int


def calls(size: Size, dtype: torch.dtype, *, direction: torch.dtype = torch.float32, seed: int = 0) -> list[Call]:
    """Every kernel once, on views into NaN-filled buffers; a is also given transposed in memory."""
    random, tokens = torch.Generator().manual_seed(seed), sum(size.lens)
    cu = boundaries(size.lens)
    a, g = strided(random, dtype, tokens, size.d_in), strided(random, dtype, tokens, size.d_out)
    turned = strided(random, dtype, size.d_in, tokens).T
    q, p = strided(random, direction, size.d_in, size.rank), strided(random, direction, size.d_out, size.rank)
    z = torch.randn(tokens, size.rank, generator=random)
    member = torch.eye(size.rank)[:, : (size.rank + 1) // 2].contiguous()
    r = strided(random, direction, 2, size.d_out, size.d_in)
    vocabulary = 11
    ids = torch.randint(vocabulary, (tokens,), generator=random)
    table = strided(random, direction, 2, vocabulary, size.d_out)
    other = strided(random, dtype, tokens, size.d_out)
    low, dense = (lowrank_native, lowrank_reference), (dense_native, dense_reference)
    norm, rows = (norm_native, norm_reference), (embedding_native, embedding_reference)
    logits = strided(random, dtype, tokens, vocabulary)
    scales = strided(random, direction, size.d_out, 3).T
    scale = (scale_native, scale_reference, "scale_dot")
    return [
        Call(*low, "lowrank_project", (a, q)),
        Call(*low, "lowrank_project", (turned, q.T.contiguous().T)),
        Call(*low, "lowrank_contract", (z, g, p, member)),
        Call(*dense, "ghost_dot", (a, g, r)),
        Call(*dense, "ghost_dot", (turned, g, r.transpose(1, 2).contiguous().transpose(1, 2))),
        Call(*rows, "embedding_dot", (ids, g, table)),
        Call(*scale, (other, g, scales)),
        Call(*scale, (None, g, scales)),
        Call(project_native, project_reference, "ghost_project", (a, g, q, p, cu)),
        Call(gram_native, gram_reference, "ghost_gram", (a, g, cu, turned, other, cu)),
        Call(*norm, "ghost_inner", (g, a, g, a, cu)),
        Call(*norm, "ghost_inner", (g, a, other, turned, cu)),
        Call(*norm, "ghost_inner", (ids, a, ids, a, cu)),
        Call(*norm, "ghost_inner", (ids, a, logits, turned, cu)),
        Call(*norm, "ghost_inner", (logits, a, ids.int(), turned, cu)),
    ]
