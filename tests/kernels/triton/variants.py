"""The argument types and constants that each Triton kernel is compiled with ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from gradshield_fast.ops.embedding_dot import kernel_triton as embedding
from gradshield_fast.ops.ghost_dot import kernel_triton as dense
from gradshield_fast.ops.ghost_dot_lowrank import kernel_triton as lowrank
from gradshield_fast.ops.ghost_norm_sq import kernel_triton as norm
from gradshield_fast.ops.ghost_project import kernel_triton as project
from gradshield_fast.ops.linear_cross_entropy import kernel_triton as head
from gradshield_fast.ops.scale_dot import kernel_triton as scale
from gradshield_fast.ops.triton_tuning import Tilings

F32, F16, BF16, I32, I64 = "*fp32", "*fp16", "*bf16", "*i32", "*i64"


@dataclass(frozen=True)
class Variant:
    """One kernel with one set of types, and the tilings that it may take with them.

    Attributes:
        kernel: the Triton function.
        name: what tells it from the kernel's other variants.
        tilings: as its room gives them for these types.
        types: pointer argument -> its type; other arguments are int32.
        ones: strides that are 1, as those of contiguous tensors are.
        constants: constants beside a tiling's.
        matrix: "best" where the target's newest matrix instruction must be there, "some" where an older one will do,
            "" where none is expected.
    """

    kernel: Any
    name: str
    tilings: Tilings
    types: Mapping[str, str]
    ones: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    matrix: str = ""


def _lowrank() -> list[Variant]:
    out = []
    for name, x, y, tiling, block_r in (
        ("bf16 x fp32, few ranks", BF16, F32, lowrank.OF_FEW_RANKS, 16),
        ("bf16 x fp32, 32 ranks", BF16, F32, lowrank.OF_FEW_RANKS, 32),
        ("fp16 x fp32, few ranks", F16, F32, lowrank.OF_FEW_RANKS, 16),
        ("bf16 x bf16, few ranks", BF16, BF16, lowrank.OF_FEW_RANKS, 16),
        ("bf16 x fp32", BF16, F32, lowrank.OF_NARROW, 64),
        ("fp16 x fp32", F16, F32, lowrank.OF_NARROW, 64),
        ("fp32 x fp32", F32, F32, lowrank.OF_WIDE, 64),
        ("fp32 x fp32, few ranks", F32, F32, lowrank.OF_WIDE, 16),
    ):
        matrix, constants = "" if x == y == F32 else "best", {"BLOCK_R": block_r}
        types, ones = {"a": x, "q": y, "z": F32}, ("stride_a_i", "stride_q_j")
        out.append(Variant(lowrank.project_kernel, name, tiling, types, ones, constants, matrix))
        types = {"z": F32, "g": x, "p": y, "member": F32, "u": F32}
        ones = ("stride_z_j", "stride_g_o", "stride_p_j", "stride_m_k")
        out.append(Variant(lowrank.contract_kernel, name, tiling, types, ones, constants, matrix))
    return out


def _ghost_dot() -> list[Variant]:
    out = []
    ones = ("stride_a_i", "stride_g_o", "stride_r_i")
    for name, x, y, tiling in (
        ("bf16 x fp32", BF16, F32, dense.OF_MIXED),
        ("fp16 x fp32", F16, F32, dense.OF_MIXED),
        ("bf16 x bf16", BF16, BF16, dense.OF_SAME),
        ("bf16 x fp32, small", BF16, F32, dense.OF_SMALL),
        ("fp16 x fp32, small", F16, F32, dense.OF_SMALL),
        ("fp32 x fp32", F32, F32, dense.OF_WIDE),
    ):
        types = {"a": x, "g": x, "r": y, "u": F32}
        matrix = "" if x == y == F32 else "best"
        out.append(Variant(dense.ghost_dot_kernel, name, tiling, types, ones, {}, matrix))
    return out


def _rows() -> list[Variant]:
    out = []
    for name, x in (("bf16", BF16), ("fp32", F32)):
        for block_k in (1, 4):
            types = {"ids": I64, "g": x, "r": F32, "u": F32}
            ones = ("stride_ids", "stride_g_i", "stride_r_i")
            case = f"{name}, {block_k} directions"
            constants: dict[str, Any] = {"BLOCK_K": block_k}
            out.append(Variant(embedding.embedding_dot_kernel, case, embedding.OF_ROWS, types, ones, constants))
            types, ones = {"x_hat": x, "g": x, "r": F32, "u": F32}, ("stride_x_i", "stride_g_i", "stride_r_i")
            for bias in (False, True):
                constants = {"BLOCK_K": block_k, "BIAS": bias}
                case = f"{name}, {block_k} directions, {'bias' if bias else 'scale'}"
                out.append(Variant(scale.scale_dot_kernel, case, scale.OF_ROWS, types, ones, constants))
    return out


def _norm() -> list[Variant]:
    out = []
    strides = tuple(f"stride_{x}_i" for x in ("l1", "r1", "l2", "r2"))
    for name, l1, r1, l2, r2, tiling, left, right in (
        ("bf16", BF16, BF16, BF16, BF16, norm.OF_PAIRS, norm.FLOATS, norm.FLOATS),
        ("fp32", F32, F32, F32, F32, norm.OF_PAIRS_WIDE, norm.FLOATS, norm.FLOATS),
        ("bf16 with fp32", BF16, BF16, F32, F32, norm.OF_PAIRS_MIXED, norm.FLOATS, norm.FLOATS),
        ("fp16 with fp32", F16, F16, F32, F32, norm.OF_PAIRS_MIXED, norm.FLOATS, norm.FLOATS),
        ("ids", I64, BF16, I64, BF16, norm.OF_PAIRS, norm.IDS, norm.FLOATS),
        ("ids with bf16", I64, BF16, BF16, BF16, norm.OF_PAIRS, norm.IDS_LEFT, norm.FLOATS),
        ("bf16 with ids", BF16, BF16, I64, BF16, norm.OF_PAIRS, norm.IDS_RIGHT, norm.FLOATS),
    ):
        types = {"l1": l1, "r1": r1, "l2": l2, "r2": r2, "first": I32, "last": I32, "v": F32}
        for symmetric in (False, True) if (l1, r1) == (l2, r2) else (False,):
            constants = {"LEFT": left, "RIGHT": right, "SYMMETRIC": symmetric}
            matrix = "" if name == "fp32" else "best"
            case = f"{name}, symmetric" if symmetric else name
            out.append(Variant(norm.pairs_kernel, case, tiling, types, strides, constants, matrix))
            if left == norm.FLOATS:
                types_outer = {"l1": l1, "r1": r1, "l2": l2, "r2": r2, "cu_seqlens": I32, "s": F32}
                constants = {"SYMMETRIC": symmetric}
                out.append(Variant(norm.outer_kernel, case, norm.OF_OUTER, types_outer, strides, constants, matrix))
    return out


def _project() -> list[Variant]:
    types = {"left": F32, "right": F32, "cu_seqlens": I32, "s": F32}
    ones = ("stride_left_o", "stride_right_c")
    return [Variant(project.segment_kernel, "fp32", project.OF_SEGMENT, types, ones)]


def _head() -> list[Variant]:
    out = []
    for name, h, weight, logits, pull in (
        ("bf16", BF16, BF16, head.OF_LOGITS, head.OF_PULL),
        ("fp16", F16, F16, head.OF_LOGITS, head.OF_PULL),
        ("fp32", F32, F32, head.OF_LOGITS_WIDE, head.OF_PULL_WIDE),
        ("bf16 with fp32", BF16, F32, head.OF_LOGITS_MIX, head.OF_PULL_WIDE),
        ("fp16 with fp32", F16, F32, head.OF_LOGITS_MIX, head.OF_PULL_WIDE),
    ):
        matrix, ones = "" if name == "fp32" else "best", ("stride_h_i", "stride_w_i")
        for capped in (False, True):
            constants = {"CAPPED": capped, "FLAT": head.FLAT}
            case = f"{name}, softcap" if capped else name
            types = {
                "h": h,
                "weight": weight,
                "label": I64,
                "part": F32,
                "own": F32,
                "scale": "fp32",
                "softcap": "fp32",
            }
            out.append(Variant(head.others_kernel, case, logits, types, ones, constants, matrix))
            vectors = {"total": F32, "rest": F32, "share": F32}
            for g in _workspaces(h, weight):
                gradient = {**types, **vectors, "g": g}
                rounded = f"{case}, rounded" if g is BF16 else case
                out.append(Variant(head.gradient_kernel, rounded, logits, gradient, ones, constants, matrix))
        matrix = "" if pull is head.OF_PULL_WIDE else "best"
        for add, g in product((False, True), _workspaces(h, weight)):
            case = f"{name}{', rounded' * (g is BF16)}{', add' * add}"
            types = {"g": g, "weight": weight, "dh": F32}
            out.append(Variant(head.pull_kernel, case, pull, types, ("stride_w_i",), {"ADD": add}, matrix))
    return out


def _workspaces(h: str, weight: str) -> tuple[str, ...]:
    return (F32,) if F32 in (h, weight) else (F32, BF16)


VARIANTS: list[Variant] = [*_lowrank(), *_ghost_dot(), *_rows(), *_norm(), *_project(), *_head()]
