"""Which of a kernel's tilings to take: the rule's, or on a GPU the fastest, measured once for a class of shapes.

A score must have the same bits in every run, so tilings come in groups: within one, every sum is made of the same terms
in the same order. Those of the rule's group may be taken at any time. One of another group, whose last bits differ,
counts only once the choice is on disk, where every later run finds it (measured.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, TypeVar

import torch

from gradshield_fast.ops import measured
from gradshield_fast.ops.triton_support import INTERPRETED, Tiling

Result = TypeVar("Result")

_CHOSEN: dict[tuple[Any, ...], Tiling] = {}
"""What was chosen for inputs of exactly these shapes; see dispatch.py."""
CHOSEN_MOST = 4096

GAIN = 0.03
"""Share of the rule's time that another tiling must save: less is noise."""


@dataclass(frozen=True)
class Tilings:
    """The tilings of a kernel for one kind of input.

    Attributes:
        groups: the rule's group first, and in it the rule's choice; all members of a group give the same bits.
    """

    groups: tuple[tuple[Tiling, ...], ...]

    @property
    def first(self) -> Tiling:
        """The rule's choice, which everything else is measured against."""
        return self.groups[0][0]

    @property
    def all(self) -> tuple[Tiling, ...]:
        """Every tiling, the rule's choice first."""
        return tuple(tiling for group in self.groups for tiling in group)


@dataclass(frozen=True)
class Device:
    """What decides which tilings a GPU can run.

    Attributes:
        name: as in "NVIDIA H100 80GB HBM3".
        shared: bytes of shared memory that one program may take.
        descriptors: whether it copies whole tiles by tensor descriptors.
        amd: whether it is one of AMD's.
    """

    name: str
    shared: int
    descriptors: bool
    amd: bool = False


def tilings(*groups: tuple[Tiling, ...]) -> Tilings:
    """Collect a kernel's tilings.

    Args:
        groups: the rule's first.

    Returns:
        The collection.
    """
    return Tilings(groups)


def described(*inputs: torch.Tensor) -> bool:
    """Say whether tensor descriptors can stand for matrices: last stride 1, all else a multiple of 16 bytes.

    Args:
        inputs: Float[Tensor, "... rows columns"].

    Returns:
        Whether they can; not for rows that lie on top of one another.
    """
    return all(
        x.stride(-1) == 1
        and x.numel() > 0
        and x.stride(-2) >= x.shape[-1]
        and not any(at % 16 for at in (x.data_ptr(), *(stride * x.element_size() for stride in x.stride()[:-1])))
        for x in inputs
    )


def runnable(given: Tilings, device: Device, *, descriptors: bool) -> tuple[tuple[Tiling, ...], ...]:
    """Leave out, by rule, the tilings that a device or these inputs cannot take.

    Args:
        given: a kernel's tilings.
        device: the GPU.
        descriptors: whether the inputs can be described.

    Returns:
        The groups that are left; the rule's choice alone where nothing would be.
    """
    left = []
    for group in given.groups:
        able: list[Tiling] = []
        for tiling in group:
            shared = tiling.shared_amd if device.amd else tiling.shared
            if shared > device.shared or (tiling.descriptors and not (descriptors and device.descriptors)):
                continue
            # AMD's compiler takes two stages at most, so deeper ones are the same kernel again
            if device.amd and any(other.blocks == tiling.blocks and other.warps == tiling.warps for other in able):
                continue
            able.append(tiling)
        if able:
            left.append(tuple(able))
    return tuple(left) or ((given.first,),)


def tuned(
    kernel: str,
    given: Tilings,
    inputs: Sequence[torch.Tensor],
    call: Callable[[Tiling], Result],
    *,
    descriptors: bool = False,
) -> Result:
    """Run a kernel with the tiling that suits its inputs and its device.

    Args:
        kernel: its name, with what tells this use of it from others.
        given: its tilings.
        inputs: tensors whose dtypes and shapes make the class; the first says where they lie.
        call: runs the kernel, from inputs that it leaves as they are.
        descriptors: whether the inputs can be described.

    Returns:
        What the call returns.
    """
    return call(choose(kernel, given, inputs, call, descriptors=descriptors))


def choose(
    kernel: str,
    given: Tilings,
    inputs: Sequence[torch.Tensor],
    call: Callable[[Tiling], Any],
    *,
    descriptors: bool = False,
) -> Tiling:
    """Choose a tiling for inputs of this kind, by measurement where that has not been done yet.

    Args:
        kernel: its name, with what tells this use of it from others.
        given: its tilings.
        inputs: tensors whose dtypes and shapes make the class; the first says where they lie.
        call: runs the kernel, from inputs that it leaves as they are.
        descriptors: whether the inputs can be described.

    Returns:
        The tiling; the rule's where nothing can be timed.
    """
    where = inputs[0].device
    if where.type != "cuda" or INTERPRETED:
        return given.first
    # `given` is one of a module's constants, which live as long as the process
    key = (kernel, id(given), descriptors, measured.stamp(), measured.signature(inputs))
    chosen = _CHOSEN.get(key)
    if chosen is not None:
        return chosen
    with torch.cuda.device(where):
        capturing = torch.cuda.is_current_stream_capturing()
        clock = None if capturing else measured.gpu_milliseconds
        chosen = pick(kernel, given, inputs, call, about(where), clock, descriptors=descriptors)
    if not capturing:
        if len(_CHOSEN) >= CHOSEN_MOST:
            _CHOSEN.clear()
        _CHOSEN[key] = chosen
    return chosen


def pick(
    kernel: str,
    given: Tilings,
    inputs: Sequence[torch.Tensor],
    call: Callable[[Tiling], Any],
    device: Device,
    clock: Callable[[Callable[[], Any]], float] | None,
    *,
    descriptors: bool = False,
) -> Tiling:
    """Choose as `choose` does, for a device that is given.

    Args:
        kernel: its name, with what tells this use of it from others.
        given: its tilings.
        inputs: tensors whose dtypes and shapes make the class.
        call: runs the kernel.
        device: the GPU.
        clock: runs a call and gives its milliseconds; None where nothing may be timed, as in a graph's capture.
        descriptors: whether the inputs can be described.

    Returns:
        The tiling.
    """
    groups = runnable(given, device, descriptors=descriptors)
    by_label = {tiling.label: tiling for group in groups for tiling in group}
    first = groups[0][0]
    if len(by_label) == 1 or any(n == 0 for x in inputs for n in x.shape):
        return first
    # inputs that can be described race more tilings: a class of its own
    name = f"{kernel}, aligned" if any(tiling.descriptors for tiling in by_label.values()) else kernel
    if clock is None:
        return by_label.get(measured.known(name, device.name, inputs) or "", first)
    calls = {label: partial(call, tiling) for label, tiling in by_label.items()}
    alike = {tiling.label for tiling in groups[0]}
    return by_label[measured.fastest(name, device.name, inputs, calls, clock, alike=alike, gain=GAIN)]


@lru_cache
def about(where: torch.device) -> Device:
    """Describe a GPU.

    Args:
        where: its device.

    Returns:
        The description.
    """
    properties = torch.cuda.get_device_properties(where)
    amd = torch.version.hip is not None
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or getattr(
        properties, "shared_memory_per_block", 0
    )
    return Device(properties.name, shared or 48 * 1024, not amd and properties.major >= 9, amd)
