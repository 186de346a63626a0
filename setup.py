"""What can be declared is declared in pyproject.toml; this is where compiled extensions are added to the build.

No extension is needed to install: where one cannot be built, the build says so in one line and goes on without it.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

from setuptools import setup


def load(name: str) -> ModuleType | None:
    """Import a part of the build from this folder, which is not on the path of an isolated build.

    Args:
        name: the part's name.

    Returns:
        The module, or None where this source tree has no such part.
    """
    path = Path(__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path) if path.exists() else None
    if spec is None or spec.loader is None:
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native, cuda = load("setup_native"), load("setup_cuda")
setup(
    ext_modules=[extension for part in (native, cuda) if part is not None for extension in part.extensions()],
    cmdclass={"build_ext": native.BuildExtensions} if native is not None else {},
)
