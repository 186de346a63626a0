from __future__ import annotations

from types import ModuleType

import pytest

from gradshield_fast.ops import cuda
from tests.kernels.cuda.emulator import EmulatedLaunch, kernels


@pytest.fixture(scope="session")
def emulated_module() -> ModuleType:
    """The kernels, compiled for the emulator."""
    return kernels()


@pytest.fixture
def emulated(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> EmulatedLaunch:
    """Sends every launch of the CUDA backends to the emulator, threads in their natural order."""
    launch = EmulatedLaunch(emulated_module)
    emulated_module.set_seed(0)
    monkeypatch.setattr(cuda, "launch", launch)
    return launch
