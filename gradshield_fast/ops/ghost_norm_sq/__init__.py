"""Squared norms of per-example gradients, and inner products between two uses of one weight, from factors alone."""

from gradshield_fast.ops.ghost_norm_sq.api import ghost_inner, ghost_norm_sq

__all__ = ["ghost_inner", "ghost_norm_sq"]
