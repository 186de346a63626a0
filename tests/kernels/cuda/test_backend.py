"""The Python around the CUDA kernels that needs neither a GPU nor a compiler."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

import setup_cuda
from gradshield_fast.ops import cuda
from gradshield_fast.ops.embedding_dot import kernel_cuda as embedding
from gradshield_fast.ops.ghost_dot import kernel_cuda as dot
from gradshield_fast.ops.ghost_dot_lowrank import kernel_cuda as lowrank
from gradshield_fast.ops.ghost_norm_sq import kernel_cuda as norm
from gradshield_fast.ops.ghost_project import kernel_cuda as project


@pytest.fixture
def no_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if the package had been built without nvcc."""
    monkeypatch.setitem(sys.modules, "gradshield_fast._cuda", None)
    cuda.module.cache_clear()
    yield
    cuda.module.cache_clear()


def test_reasons_not_to_run() -> None:
    x, ids = torch.ones(2, 2), torch.zeros(2, dtype=torch.int64)
    expected = "needs a GPU, the inputs are on cpu"
    assert dot.why_not(x, x, x[None]) == expected
    assert lowrank.why_not(x, x) == expected
    assert lowrank.why_not(x, x, x) == expected
    assert project.why_not(x, x, x, x) == expected
    assert embedding.why_not(ids, x, x[None]) == expected
    assert norm.why_not(x, x, x, x) == expected
    assert norm.why_not(x, ids, x, x) == "ids in the place of a factor run on the reference"


def test_a_launch_without_the_module_says_so(no_module: None) -> None:
    assert cuda.module() is None
    with pytest.raises(RuntimeError, match="ghost_dot: the CUDA extension is not built"):
        dot.ghost_dot(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1, 2, 2))


@pytest.mark.parametrize(
    ("tokens", "ranks", "width", "expected"),
    [
        (1, 1, 1, 1),
        (16384, 16, 2048, 1),
        (16384, 16, 4096, 2),
        (512, 16, 4096, 16),
        (64, 16, 14336, 56),
        (64, 16, 255, 1),
    ],
)
def test_slices_fill_a_device_but_stay_long(tokens: int, ranks: int, width: int, expected: int) -> None:
    assert cuda.thin_slices(tokens, ranks, width) == expected


def test_a_factor_is_copied_only_where_its_layout_is_another() -> None:
    w = torch.randn(8, 3)
    assert torch.equal(cuda.factor(w), w)
    assert cuda.factor(w).stride() == (1, 8)
    ready = torch.randn(3, 8).t()
    assert cuda.factor(ready).data_ptr() == ready.data_ptr()
    assert cuda.factor(w.half()).dtype == torch.float32


def test_without_nvcc_there_is_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(setup_cuda, "find_nvcc", lambda: None)
    assert setup_cuda.extensions() == []


@pytest.mark.parametrize(
    ("switch", "path", "installed", "expected"),
    [
        (None, "nvcc", False, "on the path"),
        (None, "", True, "where it installs itself"),
        (None, "", False, None),
        ("0", "nvcc", True, None),
        ("1", "nvcc", False, "on the path"),
    ],
)
def test_whether_cuda_is_built(
    switch: str | None, path: str, installed: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {path: "on the path", "/usr/local/cuda/bin/nvcc": "where it installs itself" if installed else None}
    monkeypatch.setattr(setup_cuda.shutil, "which", found.get)
    monkeypatch.delenv(setup_cuda.SWITCH, raising=False)
    if switch is not None:
        monkeypatch.setenv(setup_cuda.SWITCH, switch)
    assert setup_cuda.find_nvcc() == expected
    if expected is None:
        assert setup_cuda.extensions() == []


def test_nothing_is_compiled_before_the_linker_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    if setup_cuda.find_nvcc() is None:
        pytest.skip("needs nvcc")
    pytest.importorskip("pybind11")
    calls: list[str] = []
    monkeypatch.setattr(setup_cuda, "build_objects", lambda nvcc: calls.append(nvcc) or ["kernels.o"])
    (extension,) = setup_cuda.extensions()
    assert extension.name == "gradshield_fast._cuda"
    assert extension.optional
    assert not calls
    assert extension.extra_objects == ["kernels.o"]
    assert extension.extra_objects == ["kernels.o"]
    assert len(calls) == 1
