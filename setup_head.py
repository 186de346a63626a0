"""The CPU extension of the fused head: pybind11 and a C++ compiler, no torch.

`extensions()` is for setup.py; run as a script, `python setup_head.py build_ext --inplace` builds it alone.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
"""What g++ 12 says of its own AVX-512 headers."""

FLAGS = ("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-fno-math-errno", "-pthread", "-Wall", "-Wextra")
SOURCES = ("amx_item.cpp", "avx512_item.cpp", "bf16_item.cpp", "cpu.cpp", "finish.cpp", "head.cpp", "module.cpp")


def extensions() -> list[Extension]:
    """List the extension modules of the fused head.

    Returns:
        One module on x86-64 where pybind11 is there, else none.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    try:
        import pybind11
    except ImportError:
        print("gradshield_fast: pybind11 is not there, so the fused head's CPU kernel is not built", file=sys.stderr)
        return []
    folder = Path("csrc/linear_cross_entropy")
    return [
        Extension(
            "gradshield_fast._native_head",
            [str(folder / name) for name in SOURCES],
            depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).glob("*.h"))],
            include_dirs=[".", pybind11.get_include()],
            extra_compile_args=[*FLAGS, *QUIET],
            extra_link_args=["-pthread"],
            language="c++",
            optional=True,
        )
    ]


if __name__ == "__main__":
    setup(ext_modules=extensions())
