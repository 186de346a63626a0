"""Builds the CUDA kernels for the emulator, and puts the emulator in the place of a GPU."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
# nvcc's unrolling hints mean nothing to g++. No fused multiply-adds that the source does not ask for.
FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE"]
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]


def build(name: str, sources: Sequence[Path]) -> ModuleType:
    """Compile sources and the emulator to a Python module, once for each state of csrc/ and of the sources."""
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11 to build the emulator")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to build the emulator")
    digest = hashlib.sha256(" ".join([*FLAGS, *WARNINGS, sysconfig.get_platform(), pybind11.__version__]).encode())
    headers = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".cuh", ".h")]
    sources = [*sources, *sorted((CSRC / "emulator").glob("*.cpp"))]
    for path in [*headers, *sources]:
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulator"
    target = folder / f"{name}-{digest.hexdigest()[:16]}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        includes = [f"-I{CSRC}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]
        defines = ["-DGRADSHIELD_EMULATOR", f"-DGRADSHIELD_MODULE={name}"]
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            objects = []
            for source in sources:
                objects.append(str(Path(scratch) / f"{source.name}.o"))
                command = [compiler, "-x", "c++", *FLAGS, *WARNINGS, *includes, *defines, "-c", str(source)]
                subprocess.run([*command, "-o", objects[-1]], check=True)
            linked = Path(scratch) / target.name
            subprocess.run([compiler, "-shared", *objects, "-o", str(linked)], check=True)
            # another process may have built the same: the last one in wins, and both are whole
            os.replace(linked, target)
    spec = importlib.util.spec_from_file_location(name, target)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels() -> ModuleType:
    """The module of `csrc/bindings_cuda.cpp`, its kernels on the emulator."""
    return build("_cuda_emulated", [*sorted(CSRC.glob("*/*.cu")), CSRC / "bindings_cuda.cpp"])


class EmulatedLaunch:
    """Stands in for `gradshield_fast.ops.cuda.launch`, with tensors on the CPU."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.names: list[str] = []

    def __call__(self, name: str, *arguments: Any) -> None:
        from gradshield_fast.ops import cuda

        self.names.append(name)
        getattr(self.module, name)(*cuda.pack_all(arguments), (0, 0))
