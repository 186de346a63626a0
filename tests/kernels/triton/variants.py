"""The argument types and constants that each Triton kernel is compiled with ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gradshield_fast.ops.embedding_dot import kernel_triton as embedding
from gradshield_fast.ops.ghost_dot import kernel_triton as dense
from gradshield_fast.ops.ghost_dot_lowrank import kernel_triton as lowrank
from gradshield_fast.ops.scale_dot import kernel_triton as scale
from gradshield_fast.ops.triton_support import Tiling

F32, F16, BF16, I64 = "*fp32", "*fp16", "*bf16", "*i64"


@dataclass(frozen=True)
class Variant:
    """One kernel with one tiling and one set of types.

    Attributes:
        kernel: the Triton function.
        name: what tells it from the kernel's other variants.
        tiling: blocks, warps, stages and budget.
        types: pointer argument -> its type; other arguments are int32.
        ones: strides that are 1, as those of contiguous tensors are.
        constants: constants beside the tiling's.
        matrix: "best" where the target's newest matrix instruction must be there, "some" where an older one will do,
            "" where none is expected.
    """

    kernel: Any
    name: str
    tiling: Tiling
    types: Mapping[str, str]
    ones: tuple[str, ...] = ()
    constants: Mapping[str, Any] = field(default_factory=dict)
    matrix: str = ""


def _lowrank() -> list[Variant]:
    out = []
    for name, x, y, tiling, block_r in (
        ("bf16 x fp32, few ranks", BF16, F32, lowrank.FEW_RANKS, 16),
        ("bf16 x fp32, 32 ranks", BF16, F32, lowrank.FEW_RANKS, 32),
        ("fp16 x fp32, few ranks", F16, F32, lowrank.FEW_RANKS, 16),
        ("bf16 x bf16, few ranks", BF16, BF16, lowrank.FEW_RANKS, 16),
        ("bf16 x fp32", BF16, F32, lowrank.NARROW, 64),
        ("fp16 x fp32", F16, F32, lowrank.NARROW, 64),
        ("fp32 x fp32", F32, F32, lowrank.WIDE, 64),
        ("fp32 x fp32, few ranks", F32, F32, lowrank.WIDE, 16),
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
        ("bf16 x fp32", BF16, F32, dense.MIXED),
        ("fp16 x fp32", F16, F32, dense.MIXED),
        ("bf16 x bf16", BF16, BF16, dense.SAME),
        ("bf16 x fp32, small", BF16, F32, dense.SMALL),
        ("fp16 x fp32, small", F16, F32, dense.SMALL),
        ("fp32 x fp32", F32, F32, dense.WIDE),
    ):
        types = {"a": x, "g": x, "r": y, "u": F32}
        matrix = "" if x == y == F32 else "best"
        out.append(Variant(dense.ghost_dot_kernel, name, tiling, types, ones, {"GROUP": dense.GROUP}, matrix))
    return out


def _rows() -> list[Variant]:
    out = []
    for name, x in (("bf16", BF16), ("fp32", F32)):
        for block_k in (1, 4):
            types = {"ids": I64, "g": x, "r": F32, "u": F32}
            ones = ("stride_ids", "stride_g_i", "stride_r_i")
            case = f"{name}, {block_k} directions"
            constants: dict[str, Any] = {"BLOCK_K": block_k}
            out.append(Variant(embedding.embedding_dot_kernel, case, embedding.ROWS, types, ones, constants))
            types, ones = {"x_hat": x, "g": x, "r": F32, "u": F32}, ("stride_x_i", "stride_g_i", "stride_r_i")
            for bias in (False, True):
                constants = {"BLOCK_K": block_k, "BIAS": bias}
                case = f"{name}, {block_k} directions, {'bias' if bias else 'scale'}"
                out.append(Variant(scale.scale_dot_kernel, case, scale.ROWS, types, ones, constants))
    return out


VARIANTS: list[Variant] = [*_lowrank(), *_ghost_dot(), *_rows()]
