"""The ops: one room each, with its formula, its reference and its kernels."""

from gradshield_fast.ops.dispatch import available
from gradshield_fast.ops.embedding_dot import embedding_dot
from gradshield_fast.ops.ghost_dot import ghost_dot
from gradshield_fast.ops.ghost_dot_lowrank import ghost_dot_lowrank
from gradshield_fast.ops.ghost_gram import ghost_gram
from gradshield_fast.ops.ghost_norm_sq import ghost_inner, ghost_norm_sq
from gradshield_fast.ops.ghost_project import ghost_project
from gradshield_fast.ops.linear_cross_entropy import HeadLoss, linear_cross_entropy
from gradshield_fast.ops.scale_dot import scale_dot
from gradshield_fast.ops.varlen_attention import varlen_attention

__all__ = [
    "HeadLoss",
    "available",
    "embedding_dot",
    "ghost_dot",
    "ghost_dot_lowrank",
    "ghost_gram",
    "ghost_inner",
    "ghost_norm_sq",
    "ghost_project",
    "linear_cross_entropy",
    "scale_dot",
    "varlen_attention",
]
