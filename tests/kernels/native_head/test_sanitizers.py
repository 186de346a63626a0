"""The fused head's C++ under the address and undefined-behaviour sanitizers, on buffers without a spare byte."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FLAGS = ["-std=c++17", "-O1", "-g0", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="native: needs x86-64")
@pytest.mark.skipif(shutil.which("g++") is None, reason="native: needs g++")
def test_no_byte_beyond_the_buffers(tmp_path: Path) -> None:
    folder = ROOT / "csrc/linear_cross_entropy"
    common = [ROOT / f"csrc/common/{name}.cpp" for name in ("pool", "processor")]
    sources = [str(x) for x in [*sorted(folder.glob("*.cpp")), *common]]
    driver = tmp_path / "driver"
    command = [
        "g++",
        *FLAGS,
        f"-I{ROOT / 'csrc'}",
        str(Path(__file__).with_name("driver.cpp")),
        *sources,
        "-o",
        str(driver),
    ]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    ran = subprocess.run([driver], capture_output=True, text=True, check=False)
    if ran.returncode == 77:
        pytest.skip("native: this CPU lacks the instructions")
    assert ran.returncode == 0, ran.stdout + ran.stderr[-3000:]
