"""In which order a compiled kernel sums, read from Triton's intermediate code: what decides the last bits of a result.

Two tilings give the same bits where their products go through the same matrix instruction in steps of the same depth,
and where the threads share the axis of every sum in the same way. How an axis without a sum is cut does not matter.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_LAYOUT = re.compile(r"^(#\w+) = #[\w.]*?(\w+)<\{(.*)\}>", re.MULTILINE)
_DOT = re.compile(r"(tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) (.*)")
_SUM = re.compile(
    r'"tt\.reduce"\((?:(?!tt\.reduce).)*?axis = (\d+).*?\}\) : \(tensor<([0-9x]+)x\w+, (.*?)>\) ->', re.DOTALL
)
_OPERAND = re.compile(r"(?:tensor|memdesc)<(?:\d+x)*(\d+)x(\w+)")
_RESULT = re.compile(r"-> tensor<[0-9x]+xf32, (#\w+)")


class Layout(NamedTuple):
    """A named layout of the code: its kind and its text."""

    kind: str
    text: str


def order_of_sums(code: str) -> tuple[str, ...]:
    """Describe the products and sums of a kernel.

    Args:
        code: TTGIR.

    Returns:
        One line for each that differs, in the order of the code; a pipeline writes the same one several times.
    """
    layouts = {name: Layout(kind, text) for name, kind, text in _LAYOUT.findall(code)}
    found: list[tuple[int, str]] = []
    for dot in _DOT.finditer(code):
        (depth, left), (_, right) = _OPERAND.findall(dot[2])[:2]
        unit = "".join(_unit(layouts[name]) for name in _RESULT.findall(dot[2]))
        found.append((dot.start(), f"{dot[1]} {left} {right} in steps of {depth}{unit}"))
    for reduced in _SUM.finditer(code):
        if "arith.addf" in reduced[0]:
            axis, where = int(reduced[1]), reduced[3]
            if inner := re.fullmatch(r"#ttg\.slice<\{dim = (\d), parent = (#\w+)\}>", where):
                # one axis of two is summed already, and the other keeps its threads
                axis, where = 1 - int(inner[1]), inner[2]
            shared = _share(layouts[where], axis)
            found.append((reduced.start(), f"sum of {reduced[2].split('x')[int(reduced[1])]}, {shared}"))
    return tuple(dict.fromkeys(text for _, text in sorted(found)))


def _unit(layout: Layout) -> str:
    """The matrix unit behind a product; none for fused multiply-adds, which go along the depth one by one."""
    if "instrShape" not in layout.text:
        return ""
    version = re.findall(r"version(?:Major)? = (\d+)", layout.text)[0]
    # rows and columns of an instruction are independent of one another; the depth is the last number, where it is said
    depth = _numbers(layout)["instrShape"][2:]
    return f" by {layout.kind} {version}, {depth} at once"


def _share(layout: Layout, axis: int) -> str:
    """How registers, lanes and warps share an axis."""
    if layout.kind == "linear":
        bases = re.findall(r"(\w+) = \[((?:\[[\d, ]*\](?:, )?)*)\]", layout.text)
        along = {
            name: [int(base.split(", ")[axis]) for base in re.findall(r"\[([\d, ]+)\]", text)] for name, text in bases
        }
        # a basis vector that does not step along the axis belongs to another sum
        return str({name: [step for step in steps if step] for name, steps in along.items() if name != "block"})
    return f"{layout.kind} " + ", ".join(
        f"{name} {values[axis]}"
        for name, values in sorted(_numbers(layout).items())
        if axis < len(values) and name != "order"
    )


def _numbers(layout: Layout) -> dict[str, list[int]]:
    """The lists of numbers in a layout."""
    return {
        name: [int(value) for value in values.split(", ")]
        for name, values in re.findall(r"(\w+) = \[(\d[\d, ]*)\]", layout.text)
    }
