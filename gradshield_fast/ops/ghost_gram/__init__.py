"""Inner products of all pairs of per-example gradients between two packed batches."""

from gradshield_fast.ops.ghost_gram.api import ghost_gram

__all__ = ["ghost_gram"]
