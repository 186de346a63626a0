"""The ops: one room each, with its formula, its reference and its kernels."""

from gradshield_fast.ops.dispatch import available
from gradshield_fast.ops.embedding_dot import embedding_dot
from gradshield_fast.ops.ghost_dot import ghost_dot
from gradshield_fast.ops.ghost_dot_lowrank import ghost_dot_lowrank
from gradshield_fast.ops.ghost_norm_sq import ghost_inner, ghost_norm_sq
from gradshield_fast.ops.scale_dot import scale_dot

__all__ = [
    "available",
    "embedding_dot",
    "ghost_dot",
    "ghost_dot_lowrank",
    "ghost_inner",
    "ghost_norm_sq",
    "scale_dot",
]
