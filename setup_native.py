"""The build of the native CPU kernels: sources, flags of each instruction set, and a build_ext that knows them."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
# GCC 12 takes the undefined operand inside its own AVX-512 intrinsics for a mistake of ours: hence the last two.
QUIET = ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", *QUIET]
ISA_FLAGS = {
    "csrc/isa/avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "csrc/isa/avx512.cpp": AVX512,
    "csrc/isa/avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "csrc/isa/amx.cpp": [*AVX512, "-mamx-tile", "-mamx-bf16"],
    "csrc/isa/avx512_attention.cpp": AVX512,
    "csrc/isa/avx512_bf16_attention.cpp": [*AVX512, "-mavx512bf16"],
    "csrc/isa/amx_attention.cpp": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
}
"""One build serves every processor: these files alone use more than the baseline, and run where cpuid allows it."""
HEAD = "csrc/linear_cross_entropy/"
HEAD_TRIAL = """#include <immintrin.h>
#pragma GCC target("avx512f,avx512bf16,amx-tile,amx-bf16")
__m512bh pairs(__m512 x) { _tile_zero(0); return _mm512_cvtne2ps_pbh(x, x); }
"""
"""What a compiler must take to build the fused head, whose files say themselves which instructions they use."""
FLAGS = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-Wall", "-Wextra", "-pthread"]


def sources() -> list[str]:
    """List what the kernels are compiled from, without the bindings.

    Returns:
        Paths relative to the repository.
    """
    ops = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("csrc/*/cpu.cpp")}
    head = {path.relative_to(ROOT).as_posix() for path in ROOT.glob(f"{HEAD}*.cpp")}
    ops = sorted(ops | head if X86 else ops - head)
    common = ["csrc/common/isa.cpp", "csrc/common/packing.cpp", "csrc/common/pool.cpp", "csrc/common/processor.cpp"]
    return [*ops, *common, "csrc/isa/portable.cpp", *(ISA_FLAGS if X86 else ())]


def extensions() -> list[Extension]:
    """Describe the extension.

    Returns:
        One extension, or none without pybind11.
    """
    try:
        import pybind11
    except ImportError:
        print("gradshield_fast: pybind11 is not there, so the native CPU kernels are not built", file=sys.stderr)
        return []
    return [
        Extension(
            "gradshield_fast._native",
            [*sources(), "csrc/bindings.cpp"],
            include_dirs=["csrc", pybind11.get_include()],
            depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]


class BuildExtensions(build_ext):
    """Compiles the files of an extension side by side, each with the flags of its instruction set."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension.

        Args:
            ext: the extension.
        """
        if ext.name != "gradshield_fast._native":
            super().build_extension(ext)
            return
        compiler: Any = self.compiler
        one_by_one = compiler.compile
        known = {source: flags for source, flags in ISA_FLAGS.items() if source in ext.sources and self._takes(flags)}
        ext.sources = [source for source in ext.sources if source in known or source not in ISA_FLAGS]
        ext.define_macros = [(f"GSF_{Path(source).stem.upper()}", "1") for source in known]
        if X86 and self._takes([], HEAD_TRIAL):
            ext.define_macros.append(("GSF_HEAD", "1"))
            known |= {source: QUIET for source in ext.sources if source.startswith(HEAD)}
        else:
            ext.sources = [source for source in ext.sources if not source.startswith(HEAD)]
            print("gradshield_fast: this compiler does not know AMX, so the fused head is not built", file=sys.stderr)

        def side_by_side(sources: list[str], **options: Any) -> list[str]:
            flags = options.pop("extra_postargs", None) or []

            def compile_one(source: str) -> list[str]:
                own = known.get(Path(source).as_posix(), [])
                return one_by_one([source], extra_postargs=[*flags, *own], **options)

            with ThreadPoolExecutor(self.parallel or os.cpu_count() or 1) as workers:
                return [made for part in workers.map(compile_one, sources) for made in part]

        compiler.compile = side_by_side
        try:
            super().build_extension(ext)
        finally:
            compiler.compile = one_by_one

    def _takes(self, flags: list[str], text: str = "int main() { return 0; }\n") -> bool:
        """Say whether the compiler knows an instruction set; an older one builds the others."""
        compiler: Any = self.compiler
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "empty.cpp"
            source.write_text(text, encoding="utf-8")
            try:
                compiler.compile([str(source)], output_dir=folder, extra_postargs=flags)
            except CompileError:
                return False
        return True
