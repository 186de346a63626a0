"""The launch of each op against a pretended Hopper GPU: kernels are compiled as for a real launch, then not run.

Shows what `aot.py` cannot: that the arguments of a launch fit its kernel, and that a batch of another size compiles
nothing again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

import triton
from triton.backends.compiler import GPUTarget

from gradshield_fast.ops.embedding_dot import kernel_triton as embedding
from gradshield_fast.ops.ghost_dot import kernel_triton as dense
from gradshield_fast.ops.ghost_dot_lowrank import kernel_triton as lowrank
from gradshield_fast.ops.ghost_gram import kernel_triton as gram
from gradshield_fast.ops.ghost_norm_sq import kernel_triton as norm
from gradshield_fast.ops.ghost_project import kernel_triton as project
from gradshield_fast.ops.linear_cross_entropy import kernel_triton as head
from gradshield_fast.ops.scale_dot import kernel_triton as scale
from tests.kernels.triton.variants import VARIANTS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="pretends a GPU, and there is one: test_gpu.py runs on it"),
]


class Pretended:
    """As much of a driver as a launch asks before it runs a kernel."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return device

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Names of the kernels that were compiled, in order."""
    names: list[str] = []
    run = triton.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        before = len(self.device_caches[0][0])
        out = run(self, *arguments, grid=grid, warmup=True, **options)
        names.extend([self.fn.__name__] * (len(self.device_caches[0][0]) - before))
        return out

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton.runtime.driver, "_active", Pretended())
    for variant in VARIANTS:
        variant.kernel.device_caches.clear()
    return names


def bf16(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def cu(tokens: int) -> torch.Tensor:
    return torch.tensor([0, tokens // 2, tokens], dtype=torch.int32)


def run_head(tokens: int) -> None:
    labels = torch.zeros(tokens, dtype=torch.int64)
    p, q, member = torch.zeros(300, 16), torch.zeros(64, 16), torch.ones(16, 1)
    head.linear_cross_entropy(bf16(tokens, 64), bf16(300, 64), labels, None, 1.0, 30.0, None, p, q, member)


CALLS: dict[str, Callable[[int], object]] = {
    "project_kernel": lambda t: lowrank.lowrank_project(bf16(t, 64), torch.zeros(64, 16)),
    "contract_kernel": lambda t: lowrank.lowrank_contract(
        torch.zeros(t, 16), bf16(t, 96), torch.zeros(96, 16), torch.ones(16, 2)
    ),
    "ghost_dot_kernel": lambda t: dense.ghost_dot(bf16(t, 64), bf16(t, 96), torch.zeros(2, 96, 64)),
    "embedding_dot_kernel": lambda t: embedding.embedding_dot(
        torch.zeros(t, dtype=torch.int64), bf16(t, 64), torch.zeros(2, 9, 64)
    ),
    "scale_dot_kernel": lambda t: scale.scale_dot(bf16(t, 64), bf16(t, 64), torch.zeros(1, 64)),
    "pairs_kernel": lambda t: norm.ghost_inner(bf16(t, 64), bf16(t, 64), bf16(t, 64), bf16(t, 64), cu(t)),
    "outer_kernel": lambda t: norm.ghost_inner(bf16(t, 16), bf16(t, 16), bf16(t, 16), bf16(t, 16), cu(t)),
    "pairs_kernel, gram": lambda t: gram.ghost_gram(bf16(t, 64), bf16(t, 32), cu(t), bf16(t, 64), bf16(t, 32), cu(t)),
    "segment_kernel": lambda t: project.ghost_project(
        bf16(t, 64), bf16(t, 32), torch.zeros(64, 8), torch.zeros(32, 8), cu(t)
    ),
    "gradient_kernel": run_head,
}


@pytest.mark.parametrize("name", CALLS)
def test_a_launch_compiles_once_for_every_number_of_tokens(name: str, compiled: list[str]) -> None:
    call = CALLS[name]
    call(96)
    assert name.split(",")[0] in compiled
    compiled.clear()
    for tokens in (97, 112, 120):
        call(tokens)
    assert not compiled
