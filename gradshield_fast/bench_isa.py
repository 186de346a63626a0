"""Holding the native CPU kernels below an instruction set: a benchmark shows what a lesser processor would take."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from types import ModuleType
from typing import Any

import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import dispatch, native
from gradshield_fast.ops.linear_cross_entropy import kernel_native as head

HEAD_LEVELS = {"portable": 0, "avx2": 0, "avx512": 1, "avx512_bf16": 2, "amx": 3}
"""The fused head's levels (its `UPTO`): it has no kernel below AVX-512, and takes BF16 instructions with it."""


@contextmanager
def limited(isa: str | None, device: torch.device) -> Iterator[None]:
    """Let native kernels use an instruction set and those below it, and nothing above, inside the scope.

    Args:
        isa: one of `native.ISAS`; None: no limit.
        device: where the ops will run.

    Yields:
        Nothing.

    Raises:
        InputError: there is no such set, it does not run here, or the device is not the CPU.
    """
    if isa is None:
        yield
        return
    if isa not in native.ISAS:
        raise InputError(f"--isa must be one of {', '.join(native.ISAS)}: got {isa!r}")
    if device.type != "cpu":
        raise InputError(f"--isa limits the native CPU kernels, but the device is {device}: add --device cpu")
    here = native.isa()
    if here is None:
        raise InputError(f"--isa limits the native CPU kernels: {native.missing}")
    if native.ISAS.index(here) < native.ISAS.index(isa):
        raise InputError(f"--isa {isa} does not run here: this processor and this build end at {here}")
    rooms = {op: dispatch.room(op) for op, names in dispatch.available().items() if "native" in names}
    try:
        for op, room in rooms.items():
            dispatch.register(op, {**room, "native": _Limited(room["native"], isa)})
        yield
    finally:
        for op, room in rooms.items():
            dispatch.register(op, room)


class _Limited(ModuleType):
    """A native module whose kernels stay at or below an instruction set."""

    def __init__(self, module: ModuleType, isa: str) -> None:
        super().__init__(module.__name__)
        self._module, self._isa = module, isa

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if self._module is head:
            level = HEAD_LEVELS[self._isa]
            if name == "why_not" and level == 0:
                return lambda *inputs: found(*inputs) or f"has no kernel for {self._isa}"
            return _at_level(found, level) if name == "linear_cross_entropy" else found
        if callable(found) and "isa" in inspect.signature(found).parameters:
            return partial(found, isa=native.ISAS.index(self._isa))
        return found


def _at_level(call: Callable[..., Any], level: int) -> Callable[..., Any]:
    """The fused head, held below a level."""

    @wraps(call)
    def run(*args: Any) -> Any:
        before = head.UPTO
        head.UPTO = level
        try:
            return call(*args)
        finally:
            head.UPTO = before

    return run
