"""What the rooms' native backends share: the compiled extension, how tensors cross to it, and what it cannot take."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch

extension: Any
try:
    from gradshield_fast import _native as extension
except ImportError as error:
    extension = None
    missing = f"the native extension cannot be loaded ({error})"
    if importlib.util.find_spec("gradshield_fast._native") is None:
        missing = "the native extension is not built (an install with a C++ compiler builds it)"
else:
    missing = ""

BEST = 4
"""No limit on the instruction set."""

ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
"""Instruction sets by their number; `limit=0` runs the portable kernels on any processor."""

CONTESTED = 1 << 22
"""Multiply-adds from which on a product is long enough to time."""

_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_IDS = (torch.int32, torch.int64)

TensorCode = tuple[int, int, int, int, int, int]


def isa(limit: int = BEST) -> str | None:
    """Name the instruction set whose kernels run here.

    Args:
        limit: number of the highest one that may.

    Returns:
        One of `ISAS`, or None where the extension is not there.
    """
    return None if extension is None else str(extension.isa(limit))


@cache
def at_least(name: str) -> bool:
    """Say whether an instruction set, or a more capable one, runs here.

    Args:
        name: one of `ISAS`.

    Returns:
        Whether it does.
    """
    best = isa()
    return best is not None and ISAS.index(best) >= ISAS.index(name)


@cache
def cuda_room(room: str) -> ModuleType | None:
    """Find the CUDA kernels of a room.

    Args:
        room: its package's name.

    Returns:
        The module, or None where this version has none.
    """
    name = f"{room}.kernel_cuda"
    return importlib.import_module(name) if importlib.util.find_spec(name) is not None else None


def why_not(room: str, *inputs: torch.Tensor) -> str | None:
    """Say why a room's native kernels cannot run.

    Args:
        room: its package's name.
        inputs: the op's tensors; integer vectors are ids.

    Returns:
        None, or the reason.
    """
    away = next((x.device for x in inputs if x.device.type != "cpu"), None)
    if away is not None:
        cuda = cuda_room(room)
        if cuda is None:
            return f"needs the CPU, the inputs are on {away}"
        return cuda.why_not(*inputs)
    if extension is None:
        return missing
    return unsuited(*inputs)


def unsuited(*inputs: torch.Tensor) -> str | None:
    """Say what about CPU tensors keeps compiled code from reading them.

    Args:
        inputs: the op's tensors.

    Returns:
        None, or the reason.
    """
    for x in inputs:
        if x.is_neg():
            return "an input is a view that torch negates when it is read; call resolve_neg() on it"
        if x.dtype == torch.float64:
            return "float64 runs on the reference"
        if x.dtype not in _CODES and x.dtype not in _IDS:
            return f"needs float32, float16 or bfloat16, got {x.dtype}"
    return None


def not_for_auto(room: str, *inputs: torch.Tensor) -> tuple[bool, str | None]:
    """Ask the CUDA kernels of a room about inputs that are not on the CPU.

    Args:
        room: its package's name.
        inputs: the op's tensors.

    Returns:
        Whether the inputs are on the CPU, and else what the CUDA kernels say.
    """
    if all(x.device.type == "cpu" for x in inputs):
        return True, None
    ask = getattr(cuda_room(room), "not_for_auto", None)
    return False, None if ask is None else ask(*inputs)


def contested(work: int) -> bool:
    """Say whether a product of these kernels in float32 should be timed against torch's.

    With AVX-512 that was 1.5 to 2.2 times as fast on an AMD EPYC and 0.6 times on an Intel Xeon (before these
    kernels shared torch's threads). Below, the rooms' rules decide.

    Args:
        work: multiply-adds.

    Returns:
        Whether it should; not where a call's fixed cost is most of it.
    """
    return at_least("avx512") and work >= CONTESTED


def elsewhere(room: str, name: str, x: torch.Tensor) -> Callable[..., torch.Tensor] | None:
    """Find the CUDA version of a function for an input on a GPU.

    Args:
        room: its package's name.
        name: the function's name.
        x: one of the op's inputs.

    Returns:
        The function, or None: the input is on the CPU.
    """
    if x.device.type == "cpu":
        return None
    cuda = cuda_room(room)
    return None if cuda is None else getattr(cuda, name)


def matrix(x: torch.Tensor) -> TensorCode:
    """Describe a matrix to the extension; any strides will do.

    Args:
        x: Float[Tensor, "rows cols"]; it must live until the call ends.

    Returns:
        Address, rows, columns, strides in elements, type code.
    """
    rows, cols = x.shape
    return x.data_ptr(), rows, cols, x.stride(0), x.stride(1), _CODES[x.dtype]


def id_vector(ids: torch.Tensor) -> TensorCode:
    """Describe ids to the extension, in the place of a matrix.

    Args:
        ids: contiguous Int64[Tensor, "tokens"].

    Returns:
        Address and length; minus one column marks ids.
    """
    return ids.data_ptr(), ids.shape[0], -1, 1, 1, 0


def threads(wanted: int | None) -> int:
    """Choose the number of threads of a call.

    Args:
        wanted: a number, or None: as many as torch uses.

    Returns:
        The number.
    """
    return torch.get_num_threads() if wanted is None else wanted
