"""The Triton kernels on the CPU: the interpreter is chosen when Triton is imported, so each run has its own process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

ROOT = Path(__file__).parents[3]
OPS = [
    ["ghost_dot", "ghost_dot_lowrank", "embedding_dot", "scale_dot"],
    ["ghost_norm_sq", "ghost_gram", "ghost_project"],
    ["linear_cross_entropy"],
]


def run(*arguments: str) -> str:
    """Run pytest under the interpreter and give what it printed."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("ops", OPS, ids=lambda ops: "+".join(ops))
def test_every_op_keeps_the_promise_of_its_room(ops: list[str]) -> None:
    out = run("-k", "triton", *(f"tests/ops/test_{op}.py" for op in ops))
    assert "passed" in out
    assert "skipped" not in out.splitlines()[-1]


@pytest.mark.slow
def test_shapes_types_and_plants() -> None:
    assert "passed" in run("tests/kernels/triton/interpreted.py")


@pytest.mark.slow
def test_every_tiling() -> None:
    assert "passed" in run("tests/kernels/triton/interpreted_tilings.py")
