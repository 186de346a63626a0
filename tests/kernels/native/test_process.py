"""What needs a process of its own: fork(), the sanitizers, an install without the extension."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.kernels.native.calls import needs_native

ROOT = Path(__file__).parents[3]

FORK = """
import os, warnings
import torch
from gradshield_fast.ops.ghost_dot_lowrank.kernel_native import lowrank_project

warnings.simplefilter("ignore")  # newer Pythons warn of fork() beside threads, which is what is tested
a, q = torch.randn(2048, 512), torch.randn(512, 16)
before = {before}
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(before, lowrank_project(a, q, threads=3)) else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert torch.equal(before, lowrank_project(a, q, threads=3))
"""
ALONE, TEAM = "lowrank_project(a, q, threads=1); torch.set_num_threads(3); a @ q", "lowrank_project(a, q, threads=3)"


WITHOUT = """
import sys
sys.modules["gradshield_fast._native"] = None
import torch
from gradshield_fast.errors import BackendUnavailable
from gradshield_fast.ops import ghost_dot

a, g, r = torch.randn(5, 4), torch.randn(5, 3), torch.randn(3, 4)
ghost_dot(a, g, r)
try:
    ghost_dot(a, g, r, backend="native")
except BackendUnavailable as error:
    assert "native extension" in str(error), error
else:
    raise AssertionError("the named backend ran without its extension")
"""


def run(code: str) -> None:
    """Run Python code in a new process."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


@needs_native
@pytest.mark.parametrize("before", [ALONE, TEAM], ids=["torch alone had threads", "both had"])
def test_a_forked_child_has_threads_of_its_own(before: str) -> None:
    run(FORK.format(before=before))


def test_without_the_extension_the_reference_runs_and_the_reason_is_given() -> None:
    run(WITHOUT)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to compile the kernels with the sanitizers")
@pytest.mark.skipif(platform.system() != "Linux", reason="the sanitizers are asked for as on Linux")
def test_no_kernel_reads_or_writes_beyond_its_buffers(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("setup_native", ROOT / "setup_native.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g1"]

    macros = [f"-DGSF_{Path(source).stem.upper()}" for source in build.ISA_FLAGS if source in build.sources()]

    def compiled(source: str) -> str:
        made = str(tmp_path / (source.replace("/", "_") + ".o"))
        flags = [*build.FLAGS, *build.ISA_FLAGS.get(source, []), "-O1", *macros, *sanitizers]
        subprocess.run(["g++", *flags, "-Icsrc", "-c", source, "-o", made], cwd=ROOT, check=True, timeout=300)
        return made

    with ThreadPoolExecutor(2) as workers:
        objects = list(
            workers.map(
                compiled, [*(x for x in build.sources() if not x.startswith(build.HEAD)), "csrc/tests/driver.cpp"]
            )
        )
    program = str(tmp_path / "driver")
    subprocess.run(["g++", *sanitizers, "-pthread", *objects, "-o", program], check=True, timeout=300)
    done = subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "portable: done" in done.stdout
