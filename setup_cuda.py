"""The CUDA extension for setup.py: kernels compiled by nvcc, the binding by whatever compiles the other extensions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import warnings
from functools import cached_property
from pathlib import Path

from setuptools import Extension
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "cuda"

ARCHITECTURES = ("80", "90", "100", "120")
"""Machine code for each; the newest also as PTX, which later devices compile for themselves."""

FLAGS = ("-std=c++17", "-O3", "-Werror", "all-warnings", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall")


SWITCH = "GRADSHIELD_CUDA"
"""Set to 0 while building, the CUDA kernels are left out although nvcc is there: their compilation takes minutes."""


def find_nvcc() -> str | None:
    """Find the CUDA compiler.

    Returns:
        Its path: from PATH, else where its installer puts it; None where there is none, or it is not to be used.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def architectures(nvcc: str) -> list[str]:
    """Keep those of `ARCHITECTURES` that this compiler knows.

    Args:
        nvcc: the compiler's path.

    Returns:
        The numbers behind `sm_`, oldest first.
    """
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    return [arch for arch in ARCHITECTURES if f"compute_{arch}" in listed]


def toolkit_folders(nvcc: str) -> tuple[list[str], list[str]]:
    """Ask the compiler where its headers and libraries lie, since nvcc may be a wrapper far away from them.

    Args:
        nvcc: the compiler's path.

    Returns:
        Include folders and library folders.
    """
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], check=False, capture_output=True, text=True).stderr
    includes = re.search(r"^#\$ INCLUDES=(.*)$", dry, re.MULTILINE)
    libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dry, re.MULTILINE)
    return (
        re.findall(r'"-I([^"]+)"', includes.group(1) if includes else ""),
        re.findall(r'"-L([^"]+)"', libraries.group(1) if libraries else ""),
    )


def compile_command(nvcc: str, chosen: list[str]) -> list[str]:
    """Give the command that compiles one file, but for input and output.

    Args:
        nvcc: the compiler's path.
        chosen: the architectures, oldest first.

    Returns:
        The command's words.
    """
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in chosen]
    return [nvcc, *FLAGS, f"-I{CSRC}", *codes, f"-gencode=arch=compute_{chosen[-1]},code=compute_{chosen[-1]}"]


def build_objects(nvcc: str) -> list[str]:
    """Compile every kernel, by ninja where there is one: it skips what has not changed and uses every core.

    Args:
        nvcc: the compiler's path.

    Returns:
        The object files.

    Raises:
        CompileError: a kernel could not be compiled.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    command = compile_command(nvcc, architectures(nvcc))
    sources = sorted(CSRC.glob("*/*.cu"))
    objects = [str(BUILD / f"{source.stem}.o") for source in sources]
    ninja = shutil.which("ninja")
    try:
        if ninja is None:
            for source, target in zip(sources, objects, strict=True):
                subprocess.run([*command, "-c", str(source), "-o", target], check=True)
        else:
            rules = ["rule cuda", f"  command = {' '.join(command)} -MMD -MF $out.d -c $in -o $out", "  deps = gcc"]
            rules += ["  depfile = $out.d"]
            rules += [f"build {target}: cuda {source}" for source, target in zip(sources, objects, strict=True)]
            (BUILD / "build.ninja").write_text("\n".join(rules) + "\n")
            subprocess.run([ninja, "-C", str(BUILD)], check=True)
    except subprocess.CalledProcessError as error:
        raise CompileError(f"nvcc could not compile the CUDA kernels: {error}") from error
    return objects


class CudaExtension(Extension):
    """An extension whose kernels are compiled when the linker asks for them, not when setup.py is read."""

    def __init__(self, nvcc: str, pybind11_include: str) -> None:
        self.nvcc = nvcc
        includes, libraries = toolkit_folders(nvcc)
        super().__init__(
            "gradshield_fast._cuda",
            ["csrc/bindings_cuda.cpp"],
            include_dirs=["csrc", pybind11_include, *includes],
            library_dirs=libraries,
            libraries=["cudart_static", "dl", "rt", "pthread"],
            define_macros=[("GRADSHIELD_MODULE", "_cuda")],
            depends=[str(path.relative_to(ROOT)) for path in sorted(CSRC.rglob("*")) if path.is_file()],
            extra_compile_args=["-std=c++17", "-O2", "-fvisibility=hidden", "-Wall", "-Wextra"],
            language="c++",
            # without it everything but this backend works, and `why_not` says that it is missing
            optional=True,
        )

    @cached_property
    def _objects(self) -> list[str]:
        return build_objects(self.nvcc)

    @property
    def extra_objects(self) -> list[str]:
        """Object files for the linker; the first reading compiles them."""
        return self._objects

    @extra_objects.setter
    def extra_objects(self, value: object) -> None:
        """Take no list: setuptools sets an empty one while it constructs the extension."""


def extensions() -> list[Extension]:
    """Give the extensions that need nvcc.

    Returns:
        One extension; none where nvcc or pybind11 is missing.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        return []
    try:
        import pybind11
    except ImportError:
        warnings.warn("nvcc is here but pybind11 is not: the CUDA kernels are left out", stacklevel=2)
        return []
    return [CudaExtension(nvcc, pybind11.get_include())]
