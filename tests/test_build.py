"""The build goes on without what it can do without."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("setuptools", reason="needs setuptools to build")
pytest.importorskip("pybind11", reason="without pybind11 nothing is compiled")

ROOT = Path(__file__).parents[1]


def test_without_a_compiler_the_extension_is_left_out_and_the_build_says_so(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--force", "--build-lib", "lib", "--build-temp", "temp"]
    command = [str(tmp_path / word) if word in ("lib", "temp") else word for word in command]
    nowhere = str(tmp_path / "no-compiler")
    environment = {**os.environ, "PATH": str(tmp_path), "CC": nowhere, "CXX": nowhere, "GRADSHIELD_CUDA": "0"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert 'building extension "gradshield_fast._native" failed' in said
    assert not list(tmp_path.rglob("*.so"))
