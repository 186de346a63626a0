"""What every Triton room shares on the host: whether Triton can run, how a kernel is tiled, launched and summed up.

The package must import where Triton is missing, so this is the one module that looks for it; the rooms take `jit`
and `tl` from here and their kernels are then plain functions that nothing calls.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

_missing: str | None = None
if TYPE_CHECKING:
    import triton
    import triton.language as tl
else:
    try:
        import triton
        import triton.language as tl
    except ImportError as error:
        triton, tl, _missing = None, None, str(error)


def jit(*, fixed: tuple[str, ...] = ()) -> Callable[[Callable[..., Any]], Any]:
    """Make a Triton function, or leave it as it is where Triton is missing.

    Args:
        fixed: integer arguments that must not be specialised: a count of tokens changes with every batch, and each
            new divisibility would compile the kernel again.

    Returns:
        A decorator.
    """
    if triton is None:
        return lambda function: function
    return triton.jit(do_not_specialize=list(fixed))


@jit()
def _probe():
    pass


INTERPRETED = triton is not None and not isinstance(_probe, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when this was imported: kernels then run on the CPU, one program at a time."""


@dataclass(frozen=True)
class Tiling:
    """One way to compile a kernel, with what the result may take.

    Attributes:
        blocks: its BLOCK_* constants.
        warps: warps a program.
        stages: depth of the load pipeline on NVIDIA GPUs; AMD GPUs take at most two.
        shared: bytes of shared memory that the compiled kernel may use on NVIDIA GPUs, whatever the input types.
        registers: registers a thread that it may use on NVIDIA GPUs; none may spill.
        shared_amd: bytes of shared memory that it may use on AMD GPUs.
        descriptors: whether tiles are copied by tensor descriptors, from Hopper on, instead of by pointers.
    """

    blocks: Mapping[str, int]
    warps: int
    stages: int
    shared: int
    registers: int
    shared_amd: int = 64 * 1024
    descriptors: bool = False

    def but(
        self,
        blocks: Mapping[str, int] | None = None,
        *,
        warps: int = 0,
        stages: int = 0,
        shared: int = 0,
        registers: int = 0,
        shared_amd: int = 0,
        descriptors: bool = False,
    ) -> Tiling:
        """Change a tiling; what is not given stays.

        Args:
            blocks: other sizes of some blocks.
            warps: as the attribute.
            stages: as the attribute.
            shared: as the attribute.
            registers: as the attribute.
            shared_amd: as the attribute.
            descriptors: as the attribute.

        Returns:
            The other tiling.
        """
        return Tiling(
            {**self.blocks, **(blocks or {})},
            warps or self.warps,
            stages or self.stages,
            shared or self.shared,
            registers or self.registers,
            shared_amd or self.shared_amd,
            descriptors or self.descriptors,
        )

    @property
    def label(self) -> str:
        """Its name among a kernel's tilings, such as "T128 O128 I64 w8 s3"."""
        blocks = " ".join(f"{name.removeprefix('BLOCK_')}{size}" for name, size in self.blocks.items())
        return f"{blocks} w{self.warps} s{self.stages}{' descriptors' * self.descriptors}"


def why_not(*inputs: torch.Tensor | None) -> str | None:
    """Say why Triton cannot run an op on these inputs.

    Args:
        inputs: the op's tensors.

    Returns:
        None where it can run, else the reason.
    """
    if triton is None:
        return f"Triton is not installed ({_missing})"
    given = [x for x in inputs if x is not None]
    if any(x.dtype == torch.float64 for x in given):
        return "float64 runs on the reference"
    device = given[0].device
    if device.type == "cuda":
        return "TRITON_INTERPRET is set, the inputs are on a GPU" if INTERPRETED else _too_old(device.index)
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"runs on GPUs, the inputs are on {device.type}"


def not_for_auto(*inputs: torch.Tensor | None) -> str | None:
    """Say why `auto` should pass Triton by although it can run.

    Args:
        inputs: the op's tensors.

    Returns:
        None where it should be taken, else the reason.
    """
    del inputs
    return "the Triton interpreter is for tests" if INTERPRETED else None


@lru_cache
def _too_old(index: int) -> str | None:
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    return None if major >= 8 else f"needs compute capability 8.0 for bfloat16 products, the GPU has {major}.{minor}"


@lru_cache
def processors(device: torch.device) -> int:
    """Count a GPU's multiprocessors, which is how many programs it takes to keep all of it busy.

    Args:
        device: where the kernel will run.

    Returns:
        The count; 2 under the interpreter, so that small tests have something to split.
    """
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def blocks_of(size: int, block: int) -> int:
    """Count the blocks that cover an axis.

    Args:
        size: length of the axis.
        block: length of a block.

    Returns:
        size / block, rounded up.
    """
    return -(-size // block)


def power_of_two(size: int, low: int, high: int) -> int:
    """Choose a block for a short axis.

    Args:
        size: length of the axis.
        low: smallest block.
        high: largest block.

    Returns:
        The smallest power of two that covers the axis, within low..high.
    """
    return min(max(low, 1 << max(size - 1, 0).bit_length()), high)


def launch(kernel: Any, programs: tuple[int, ...], tiling: Tiling, *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor.

    Args:
        kernel: a Triton function.
        programs: the grid; nothing runs where one axis is 0.
        tiling: blocks, warps and stages.
        arguments: the kernel's arguments before its constants.
        constants: constants that are not in the tiling.
    """
    if 0 in programs:
        return
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    stages = tiling.stages if torch.version.hip is None else min(tiling.stages, 2)

    def workspace(size: int, alignment: int, stream: int | None) -> torch.Tensor:
        del alignment, stream  # torch's own alignment is wider, and the stream is the current one
        return torch.empty(size, dtype=torch.int8, device=device)

    def queue() -> None:
        if tiling.descriptors and not INTERPRETED:
            triton.set_allocator(workspace)
        kernel[programs](
            *arguments,
            **{**tiling.blocks, **constants},
            INTERPRETED=INTERPRETED,
            num_warps=tiling.warps,
            num_stages=stages,
            enable_fp_fusion=True,  # said outright: its default differs between versions, and the last bits with it
        )

    with guard:
        # the allocator, which descriptors are written to the memory of, is one for the context: others keep theirs
        contextvars.copy_context().run(queue) if tiling.descriptors else queue()


def is_wide(*inputs: torch.Tensor) -> bool:
    """Say whether a product has float32 on both sides, which runs on other units and wants other tiles.

    Args:
        inputs: the two factors.

    Returns:
        Whether none of them has 16 bits.
    """
    return all(x.dtype == torch.float32 for x in inputs)
