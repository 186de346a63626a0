"""What the CUDA backends share: the compiled module, whether it can run, and how tensors reach it.

The module knows nothing of torch: a tensor crosses as (address, dtype code, sizes, strides in elements).
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType
from typing import Any

import torch

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int64: 3, torch.int32: 4}
"""The codes of `csrc/common/runtime.h`."""

LONGEST_SUM = 2048
"""Terms that a running float32 sum takes before it starts anew: see csrc/common/epilogue.cuh."""

Packed = tuple[int, int, tuple[int, ...], tuple[int, ...]]


@cache
def module() -> ModuleType | None:
    """Import the compiled module.

    Returns:
        The module, or None where this installation was built without nvcc.
    """
    try:
        return importlib.import_module("gradshield_fast._cuda")
    except ImportError:
        return None


def why_not(*inputs: torch.Tensor) -> str | None:
    """Say why no CUDA kernel can run on these inputs.

    Args:
        inputs: the op's tensors.

    Returns:
        None where one can, else the reason.
    """
    for x in inputs:
        if x.device.type != "cuda":
            return f"needs a GPU, the inputs are on {x.device}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if any(x.dtype == torch.float64 for x in inputs):
        return "float64 runs on the reference"
    if module() is None:
        return "the CUDA extension is not built"
    major, minor = torch.cuda.get_device_capability(inputs[0].device)
    return None if major >= 8 else f"needs compute capability 8.0, this GPU has {major}.{minor}"


def pack(x: torch.Tensor) -> Packed:
    """Describe a tensor to the compiled module.

    Args:
        x: a tensor of one of `DTYPE_CODES`.

    Returns:
        Address, dtype code, sizes and strides in elements.
    """
    return x.data_ptr(), DTYPE_CODES[x.dtype], tuple(x.shape), tuple(x.stride())


def pack_all(arguments: tuple[Any, ...]) -> list[Any]:
    """Describe every tensor among a call's arguments, also inside lists.

    Args:
        arguments: tensors, lists of tensors, integers and booleans.

    Returns:
        The same with each tensor packed.
    """
    return [
        pack(x) if isinstance(x, torch.Tensor) else [pack(y) for y in x] if isinstance(x, list) else x
        for x in arguments
    ]


def launch(name: str, *arguments: Any) -> None:
    """Queue one of the module's functions on the current stream of its tensors' device.

    Args:
        name: the function's name.
        arguments: its arguments, but for the stream; the first is a tensor or a list of tensors.

    Raises:
        RuntimeError: the module is not built, or a kernel could not be launched.
    """
    compiled = module()
    if compiled is None:
        raise RuntimeError(f"{name}: the CUDA extension is not built")
    device = (arguments[0][0] if isinstance(arguments[0], list) else arguments[0]).device
    with torch.cuda.device(device):
        queue = (torch.cuda.current_stream().cuda_stream, torch.cuda.current_device())
        getattr(compiled, name)(*pack_all(arguments), queue)


def parts(count: int, *sizes: int, like: torch.Tensor) -> torch.Tensor:
    """Allocate what blocks leave for the adding kernel; a single part goes straight to the result.

    Args:
        count: parts to be added.
        sizes: the shape of one part.
        like: a tensor whose device is taken.

    Returns:
        Float32[Tensor, "count ..."], uninitialised; without rows for a single part.
    """
    return torch.empty((0 if count == 1 else count, *sizes), dtype=torch.float32, device=like.device)


def slices(blocks: int, width: int) -> int:
    """Choose into how many slices a product cuts its summed axis, from the shape alone.

    At most `LONGEST_SUM` terms in one, for the error bound. Beyond that, about 256 blocks keep a large GPU busy, while
    a slice shorter than eight steps of 32 would cost more to start than it does.

    Args:
        blocks: blocks without slices.
        width: length of the summed axis.

    Returns:
        At least 1.
    """
    wanted = min(-(-256 // max(blocks, 1)), -(-width // 32) // 8)
    return max(1, -(-width // LONGEST_SUM), wanted)


def thin_slices(tokens: int, ranks: int, width: int) -> int:
    """Choose the slices of a thin product, whose blocks cover 64 tokens and 32 ranks.

    Args:
        tokens: rows of the product.
        ranks: columns of the product.
        width: length of the summed axis.

    Returns:
        At least 1.
    """
    return slices(-(-tokens // 64) * -(-ranks // 32), width)


def factor(w: torch.Tensor) -> torch.Tensor:
    """Bring a projection's factor into the layout that a thin product reads fastest.

    Args:
        w: Float[Tensor, "width ranks"], any dtype and strides.

    Returns:
        The same values in float32, the summed axis in one piece: a copy of 4 width ranks bytes where it was not.
    """
    w = w.float()
    return w if w.stride(0) == 1 else w.t().contiguous().t()


def thin_product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """z[t, j] = sum_i x[t, i] w[i, j].

    Args:
        x: Float[Tensor, "tokens width"].
        w: Float[Tensor, "width ranks"].

    Returns:
        Float32[Tensor, "tokens ranks"].
    """
    tokens, ranks = x.shape[0], w.shape[1]
    cut = thin_slices(tokens, ranks, x.shape[1])
    z = torch.empty(tokens, ranks, dtype=torch.float32, device=x.device)
    launch("lowrank_project", x, factor(w), parts(cut, tokens, ranks, like=x), z, cut)
    return z
