"""When the Triton backend can run, and what is said where it cannot."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gradshield_fast.errors import BackendUnavailable
from gradshield_fast.ops import ghost_dot
from gradshield_fast.ops.ghost_dot import kernel_triton

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[3]
PLAIN = pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter takes tensors on the CPU")


@PLAIN
def test_the_cpu_is_refused_with_its_reason() -> None:
    a, g, r = torch.randn(3, 4), torch.randn(3, 5), torch.randn(5, 4)
    assert kernel_triton.not_for_auto(a, g, r) is None
    with pytest.raises(BackendUnavailable, match=r"ghost_dot: backend 'triton' cannot run.*runs on GPUs.*on cpu"):
        ghost_dot(a, g, r, backend="triton")
    torch.testing.assert_close(ghost_dot(a, g, r), ((a @ r.T) * g).sum(1))


def test_float64_is_left_to_the_reference() -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    assert kernel_triton.why_not(x, x.float()) == "float64 runs on the reference"


def test_the_package_works_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from gradshield_fast.ops import ghost_dot\n"
        "from gradshield_fast.ops.ghost_dot import kernel_triton\n"
        "x = torch.ones(2, 3)\n"
        "print(kernel_triton.why_not(x))\n"
        "print(ghost_dot(x, x, torch.ones(3, 3)).tolist())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "Triton is not installed" in out
    assert "[9.0, 9.0]" in out
