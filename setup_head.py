"""The CPU extension of the fused head: pybind11 and a C++ compiler, no torch.

`extensions()` is for setup.py; run as a script, `python setup_head.py build_ext --inplace` builds it alone.
"""

from __future__ import annotations

import platform
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

ROOT = Path(__file__).resolve().parent
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")
"""What g++ 12 says of its own AVX-512 headers."""

SOURCES = ("amx_item.cpp", "avx512_item.cpp", "bf16_item.cpp", "cpu.cpp", "finish.cpp", "head.cpp", "module.cpp")


def extensions() -> list[Pybind11Extension]:
    """List the extension modules of the fused head.

    Returns:
        One module on x86-64, none elsewhere.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return []
    folder = Path("csrc/linear_cross_entropy")
    return [
        Pybind11Extension(
            "gradshield_fast._native_head",
            [str(folder / name) for name in SOURCES],
            depends=[str(path.relative_to(ROOT)) for path in sorted((ROOT / folder).glob("*.h"))],
            include_dirs=[str(ROOT)],
            cxx_std=17,
            extra_compile_args=["-O3", "-fno-math-errno", "-pthread", "-Wall", "-Wextra", *QUIET],
            extra_link_args=["-pthread"],
        )
    ]


if __name__ == "__main__":
    setup(ext_modules=extensions())
