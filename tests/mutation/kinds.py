"""What one mutation is, and the ways to write one down for each kind of kernel."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """One break.

    Attributes:
        name: short, unique.
        what: what is broken, for the table.
        file: path in the repository.
        old: text that stands in it once.
        new: text in its place.
        tests: files or node ids that should notice.
        builds: whether the CPU extension must be built again.
        interpreted: whether the tests run under Triton's interpreter.
        needs: the instruction set without which none of the tests reaches the broken line; "" for any processor.
    """

    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    builds: bool = False
    interpreted: bool = False
    needs: str = ""


ROOMS = "gradshield_fast/ops"
TRITON = "tests/kernels/triton/interpreted.py"
NATIVE = "tests/kernels/native/test_kernels.py"
SPECIAL = "tests/kernels/native/test_special_values.py"
PROCESS = "tests/kernels/native/test_process.py"
HEAD = "tests/kernels/native_head/test_head.py"
ATTENTION = "tests/kernels/native/test_attention.py::test_agrees_with_the_reference"
CUDA = "tests/kernels/cuda/test_kernels.py::test_within_the_bound"


def triton(name: str, what: str, file: str, old: str, new: str, *tests: str) -> Mutation:
    path = file if file.startswith(ROOMS) else f"{ROOMS}/{file}/kernel_triton.py"
    return Mutation(
        f"triton-{name}", what, path, old, new, tuple(f"{TRITON}::{test}" for test in tests), interpreted=True
    )


def native(name: str, what: str, file: str, old: str, new: str, *tests: str, needs: str = "") -> Mutation:
    usual = (f"{NATIVE}::test_is_within_the_bound_and_the_same_for_any_number_of_threads",)
    return Mutation(f"native-{name}", what, f"csrc/{file}", old, new, tests or usual, builds=True, needs=needs)


def cuda(name: str, what: str, file: str, old: str, new: str) -> Mutation:
    return Mutation(f"cuda-{name}", what, f"csrc/{file}", old, new, (CUDA,))
