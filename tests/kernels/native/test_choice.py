"""What `auto` takes, and where inputs on another device go."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from gradshield_fast.errors import BackendUnavailable
from gradshield_fast.ops import dispatch, ghost_dot, ghost_dot_lowrank, ghost_project, measured, native, scale_dot
from gradshield_fast.ops.ghost_dot_lowrank import kernel_native, lowrank_project
from tests.kernels.native.calls import needs_native


@needs_native
@pytest.mark.skipif(not native.at_least("avx512"), reason="needs AVX-512: below it the choice depends on the shape")
def test_auto_takes_the_native_kernels_where_they_were_measured_faster() -> None:
    def ran(dtype: torch.dtype, backend: str) -> set[str]:
        with dispatch.record() as seen:
            lowrank_project(torch.randn(64, 32).to(dtype), torch.randn(32, 4), backend=backend)
        return seen["ghost_dot_lowrank"]

    assert ran(torch.bfloat16, "auto") == {"native"}
    assert ran(torch.float32, "auto") == {"reference"}
    assert ran(torch.float32, "native") == {"native"}


@needs_native
@pytest.mark.skipif(not native.at_least("avx512"), reason="needs AVX-512: below it the rules decide")
@pytest.mark.parametrize("slow", ["native", "reference"])
def test_auto_takes_the_faster_one_for_a_long_float32_product(
    slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "cpu_milliseconds", lambda call: float(call.func.__module__.endswith(slow)))
    a, g = torch.randn(1024, 512), torch.randn(1024, 512)
    p, norm = torch.randn(512, 16), torch.randn(9, 512)
    cu = torch.tensor([0, 1024], dtype=torch.int32)
    with dispatch.record() as seen:
        ghost_dot_lowrank(a, g, p, p, cu)
        ghost_project(a, g, p, p, cu)
        scale_dot(a, g, norm, cu)
        if not native.at_least("amx"):
            ghost_dot(a, g, torch.randn(512, 512), cu)
    assert {name for names in seen.values() for name in names} == {"native", "reference"} - {slow}


def test_float64_runs_on_the_reference() -> None:
    a, q = torch.randn(4, 3, dtype=torch.float64), torch.randn(3, 2)
    with pytest.raises(BackendUnavailable, match=r"float64 runs on the reference|native extension"):
        ghost_dot_lowrank(a, a, q, q, backend="native")


def test_inputs_elsewhere_go_to_the_cuda_kernels_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    a, q = torch.empty(4, 3, device="meta"), torch.empty(3, 2, device="meta")
    monkeypatch.setattr(native, "cuda_room", lambda room: None)
    assert kernel_native.why_not(a, q) == "needs the CPU, the inputs are on meta"
    result = torch.zeros(1)
    cuda = SimpleNamespace(why_not=lambda *inputs: "needs compute capability 8.0", lowrank_project=lambda a, q: result)
    monkeypatch.setattr(native, "cuda_room", lambda room: cuda)
    assert kernel_native.why_not(a, q) == "needs compute capability 8.0"
    assert kernel_native.not_for_auto(a, q) is None
    assert kernel_native.lowrank_project(a, q) is result
