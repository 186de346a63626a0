"""Compile every Triton kernel ahead of time and say what each result takes; no GPU is needed.

    python -m tests.kernels.triton.aot [--target sm_90] [--kernel project_kernel] [--first]

A case is one kernel, one tiling and one set of input types. It holds where nothing spills, registers and shared memory
stay inside the tiling's budget, the matrix instructions of the target are there, nothing is atomic, asynchronous copies
move 16 bytes, and tensor descriptors become copies of whole tiles. Tilings of one group must also sum in one order
(`order.py`).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradshield_fast.ops.triton_support import Tiling
from gradshield_fast.ops.triton_tuning import Device, runnable
from tests.kernels.triton.order import order_of_sums
from tests.kernels.triton.variants import VARIANTS, Variant

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_89": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "sm_120": "mma.sync",
    "gfx942": "v_mfma",
}
SPILLS = {"sm_89": 8, "sm_120": 16}
"""Bytes that may be spilled: a few small tilings of mixed types do, of a thread's 1020 bytes of registers, and a
smaller tile would read its operands more often. Every other target holds all in registers."""
FALLBACK = {"sm_90": "mma.sync", "sm_100": "mma.sync"}
SHARED_LIMIT = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Report(NamedTuple):
    """What a compiled kernel takes."""

    case: str
    registers: int
    spilled: int
    shared: int
    instructions: tuple[str, ...]
    seconds: float
    faults: tuple[str, ...]
    order: tuple[str, ...]


def device(target: str) -> Device:
    """A target as the choice of tilings sees it."""
    cuda = TARGETS[target].backend == "cuda"
    return Device(target, SHARED_LIMIT[target], cuda and int(TARGETS[target].arch) >= 90, not cuda)


def cases(targets: list[str], *, first_only: bool = False) -> Iterator[tuple[str, Variant, int, Tiling]]:
    """List target, variant, group and tiling of every case that the target may be given.

    With `first_only` each kernel's tilings are taken with the first types that they are for.
    """
    for target in targets:
        seen: set[tuple[str, int]] = set()
        for variant in VARIANTS:
            use = variant.kernel.__name__, id(variant.tilings)
            if first_only and use in seen:
                continue
            seen.add(use)
            for at, group in enumerate(runnable(variant.tilings, device(target), descriptors=True)):
                for tiling in group:
                    yield target, variant, at, tiling


def check(target: str, variant: Variant, tiling: Tiling) -> Report:
    """Compile one case and hold it against its budget."""
    begun = time.perf_counter()
    backend = TARGETS[target].backend
    stages = tiling.stages if backend == "cuda" else min(tiling.stages, 2)
    options = {"num_warps": tiling.warps, "num_stages": stages, "enable_fp_fusion": True}
    compiled = triton.compile(source(variant, tiling), target=TARGETS[target], options=options)
    if backend == "cuda":
        registers, spilled = _resources(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
    else:
        text = compiled.asm["amdgcn"]
        registers = _last(r"\.vgpr_count:\s+(\d+)", text)
        spilled = _last(r"\.vgpr_spill_count:\s+(\d+)", text)
    shared = compiled.metadata.shared
    wanted = (MATRIX_INSTRUCTION[target], FALLBACK.get(target, MATRIX_INSTRUCTION[target]))
    found = tuple(sorted({word for word in (*wanted, "cp.async.bulk.tensor", "cp.async.cg") if word in text}))
    faults = []
    if spilled > SPILLS.get(target, 0):
        faults.append(f"{spilled} bytes or registers spilled")
    budget = min(tiling.shared if backend == "cuda" else tiling.shared_amd, SHARED_LIMIT[target])
    if shared > budget:
        faults.append(f"shared memory {shared} > {budget}")
    if tiling.descriptors and "cp.async.bulk.tensor" not in text:
        faults.append("no copies of whole tiles")
    if backend == "cuda" and registers > tiling.registers:
        faults.append(f"registers {registers} > {tiling.registers}")
    if variant.matrix and not any(word in text for word in wanted[: 1 if variant.matrix == "best" else 2]):
        faults.append(f"no {wanted[0]}")
    if atomic := re.search(r"\batom\.\S+|\bred\.\S+|\w+_atomic_\w+", text):
        faults.append(f"{atomic[0]}, which adds in any order")
    copies = set(re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^\]]*\], \[[^\]]*\], (\w+)", text))
    if copies - {"0x10"}:
        faults.append(f"asynchronous copies of {sorted(copies)} bytes, not all 16")
    case = f"{target} {variant.kernel.__name__} {variant.name} {tiling.label}"
    order = order_of_sums(compiled.asm["ttgir"])
    return Report(case, registers, spilled, shared, found, time.perf_counter() - begun, tuple(faults), order)


def source(variant: Variant, tiling: Tiling) -> ASTSource:
    """The kernel with its argument types: pointers and sizes aligned to 16 as torch's are, depth strides of 1."""
    kernel, constants = variant.kernel, {**tiling.blocks, **variant.constants, "INTERPRETED": False}
    if "DESCRIPTORS" in kernel.arg_names:
        constants["DESCRIPTORS"] = tiling.descriptors
    for name in variant.ones:
        constants[name] = 1
    signature, attributes = {}, {}
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    for at, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        signature[name] = variant.types.get(name, "i32")
        if name not in fixed:
            attributes[(at,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constexprs=constants, attrs=attributes)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of local memory of a cubin, from cuobjdump."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return _last(r"REG:(\d+)", text), _last(r"STACK:(\d+)", text) + _last(r"LOCAL:(\d+)", text)


def _last(pattern: str, text: str) -> int:
    """The number that a pattern finds last."""
    return int(re.findall(pattern, text)[-1])


def main(arguments: list[str]) -> int:
    """Compile what was asked for, print a line each, and count the faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", action="append", choices=list(TARGETS))
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--first", action="store_true", help="only the first variant of each kernel")
    options = parser.parse_args(arguments)
    faults = 0
    for target, variant, _, tiling in cases(options.target or list(TARGETS), first_only=options.first):
        if options.kernel and options.kernel not in variant.kernel.__name__:
            continue
        report: Any = check(target, variant, tiling)
        faults += len(report.faults)
        print(
            f"{report.case}: registers {report.registers}, spilled {report.spilled}, shared {report.shared}, "
            f"{'+'.join(report.instructions) or 'no matrix instruction'}, {report.seconds:.1f} s"
            + "".join(f"  FAULT {fault}" for fault in report.faults),
            flush=True,
        )
    return min(faults, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
