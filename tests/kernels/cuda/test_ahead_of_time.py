"""The kernels compiled for every architecture: no spills, registers within the budgets written beside them, and the
instructions that make them fast really there."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import setup_cuda
from tests.kernels.cuda.emulator import CSRC

OPS = ["ghost_dot", "ghost_dot_lowrank", "ghost_norm_sq", "ghost_project", "embedding_dot"]


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel."""

    name: str
    registers: int
    stack: int
    spills: int


@pytest.fixture(scope="module")
def nvcc() -> str:
    """The compiler; skips where there is none."""
    found = setup_cuda.find_nvcc()
    if found is None:
        pytest.skip("needs nvcc")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where machine code goes."""
    return tmp_path_factory.mktemp("cubin")


@cache
def compiled(nvcc: str, op: str, arch: str, folder: Path) -> tuple[tuple[Kernel, ...], Path]:
    """The kernels of an op for an architecture, and the file with their machine code."""
    if f"{arch}" not in setup_cuda.architectures(nvcc):
        pytest.skip(f"this nvcc does not know sm_{arch}")
    target = folder / f"{op}.{arch}.cubin"
    command = [nvcc, *setup_cuda.FLAGS, f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", f"-I{CSRC}"]
    said = subprocess.run(
        [*command, str(CSRC / op / f"{op}.cu"), "-o", str(target)], check=True, capture_output=True, text=True
    ).stderr
    pattern = (
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    return tuple(
        Kernel(name, int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in re.findall(pattern, said, re.DOTALL)
    ), target


def budgets(op: str) -> dict[str, int]:
    """The register budgets of an op: part of a kernel's mangled name -> registers."""
    line = re.search(r"// Budget +registers: (.*?)(;|$)", (CSRC / op / f"{op}.cuh").read_text(), re.MULTILINE)
    assert line, f"{op}.cuh names no register budget"
    return {name: int(count) for name, count in re.findall(r"(\w+) (\d+)", line.group(1))}


@pytest.mark.parametrize("arch", setup_cuda.ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_no_spills_and_registers_within_the_budget(nvcc: str, folder: Path, op: str, arch: str) -> None:
    kernels, _ = compiled(nvcc, op, arch, folder)
    assert kernels
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        assert kernel.stack == 0, kernel
        limits = [count for part, count in budgets(op).items() if part in kernel.name]
        if limits or "sum_parts" not in kernel.name:
            assert kernel.registers <= min(limits), kernel


def machine_code(cubin: Path) -> dict[str, str]:
    """Kernel -> its instructions, by the disassembler of the toolkit or the one inside triton."""
    tool = shutil.which("cuobjdump")
    environment = None
    if tool is None:
        triton = pytest.importorskip("triton", reason="needs cuobjdump, from the CUDA toolkit or inside triton")
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        tool = str(tools / "cuobjdump")
        if not Path(tool).exists():
            pytest.skip("needs cuobjdump, from the CUDA toolkit or inside triton")
        environment = {"PATH": f"{tools}:/usr/bin:/bin"}
    said = subprocess.run([tool, "-sass", str(cubin)], check=True, capture_output=True, text=True, env=environment)
    _, *parts = re.split(r"Function : (\S+)", said.stdout)
    return dict(zip(parts[::2], parts[1::2], strict=True))


@pytest.mark.parametrize("arch", setup_cuda.ARCHITECTURES)
@pytest.mark.parametrize("op", ["ghost_dot", "ghost_dot_lowrank", "ghost_norm_sq"])
def test_matrix_instructions_and_asynchronous_copies_are_there(nvcc: str, folder: Path, op: str, arch: str) -> None:
    _, cubin = compiled(nvcc, op, arch, folder)
    code = machine_code(cubin)
    tensor = {name: text for name, text in code.items() if "MmaTile" in name}
    assert tensor
    for name, text in tensor.items():
        assert "HMMA.16816.F32" in text, name
        assert "LDSM" in text, name
        # the template's last two flags: rows that 16-byte copies can fetch
        assert ("LDGSTS" in text) == ("Lb1ELb1E" in name), name
    for name, text in code.items():
        if "FmaTile" in name:
            assert "FFMA" in text, name
            assert "HMMA" not in text, name
        assert "ATOM" not in text, name
        assert "RED." not in text, name


def hottest_loop(code: str) -> list[str]:
    """The opcodes of the loop with the most matrix instructions."""
    instructions = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", code)]
    loops = []
    for at, text in instructions:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if jump and int(jump.group(1), 16) <= at:
            loops.append([body for where, body in instructions if int(jump.group(1), 16) <= where <= at])
    return max(loops, key=lambda body: sum("HMMA" in text for text in body))


# Splitting the direction is work for the other units, beside the matrix instructions. Treating infinities in it once
# took ten instructions for each of those; this keeps such a thing from coming back unnoticed.
@pytest.mark.parametrize("arch", setup_cuda.ARCHITECTURES)
def test_splitting_the_direction_stays_cheap(nvcc: str, folder: Path, arch: str) -> None:
    _, cubin = compiled(nvcc, "ghost_dot", arch, folder)
    (code,) = [text for name, text in machine_code(cubin).items() if "MmaTileINS_4Bf16EfLi128ELi64ELb1ELb1E" in name]
    loop = hottest_loop(code)
    matrix = sum("HMMA" in text for text in loop)
    # 4 x 4 pieces of C, two halves of a step, three terms
    assert matrix == 96
    assert len(loop) <= 6 * matrix
