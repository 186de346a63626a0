"""One wrong line in the real kernels: the emulator must say so, whatever the numbers come out as."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kernels.cuda.emulator import CSRC, WARNINGS

TILE, OPERAND, DOT = "common/tile_mma.cuh", "common/operand.cuh", "ghost_dot/ghost_dot.cuh"
RACE = "no barrier between|never written|asynchronous copy"
FAULTS = {
    "no barrier after the wait": (TILE, "sync_block();\n      const int64_t ahead", "const int64_t ahead", RACE),
    "waits for too little": (TILE, "copy_async_wait<kStages - 2>", "copy_async_wait<kStages - 1>", "asynchronous copy"),
    "no wait at all": (TILE, "copy_async_wait<kStages - 2>();", "", "asynchronous copy"),
    "fills the slot that is being read": (TILE, "free_slot = kStages - 1;", "free_slot = 0;", RACE),
    "no barrier before shared memory is free": (TILE, "copy_async_wait<0>();\n    sync_block();", "", RACE),
    "rows beyond the matrix": (OPERAND, "row + step * kStepRows < rows && bytes > 0", "bytes > 0", "outside every"),
    "columns beyond the row": (OPERAND, "clamp_to(depth - k, kPerCopy)", "kPerCopy", "outside every buffer"),
    "no barrier in the epilogue": ("common/epilogue.cuh", "sync_block();", "", RACE),
    "tokens beyond the last": (DOT, "&& t0 + row < p.tokens", "", "outside every buffer"),
    "outputs beyond the last": (DOT, "&& o0 + n < p.d_out", "", "outside every buffer"),
    "a part left out": (DOT, "p.u, parts, p.tokens", "p.u, 1, p.tokens", "wrong result"),
    "swapped registers": (TILE, "b[s][i / 2][i % 2] = terms[s]", "b[s][i % 2][i / 2] = terms[s]", "wrong result"),
}


def compile_and_run(folder: Path) -> str:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++ to build the emulator")
    program = folder / "planted"
    sources = [Path(__file__).with_name("planted_main.cpp"), *sorted((CSRC / "emulator").glob("*.cpp"))]
    flags = ["-std=c++17", "-O1", *WARNINGS, "-Wno-unused-variable", "-DGRADSHIELD_EMULATOR"]
    command = [compiler, *flags, f"-I{folder}", f"-I{CSRC}", *map(str, sources), "-o", str(program)]
    subprocess.run(command, check=True)
    return subprocess.run([str(program)], check=True, capture_output=True, text=True).stdout.strip()


def test_the_kernels_as_they_are_run_clean(tmp_path: Path) -> None:
    assert compile_and_run(tmp_path) == "clean"


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(tmp_path: Path, fault: str) -> None:
    name, line, planted, expected = FAULTS[fault]
    text = (CSRC / name).read_text()
    assert text.count(line) == 1, f"{name} no longer has one line to plant this fault in"
    target = tmp_path / name
    target.parent.mkdir(parents=True)
    target.write_text(text.replace(line, planted))
    said = compile_and_run(tmp_path)
    assert said != "clean"
    assert re.search(expected, said), said
