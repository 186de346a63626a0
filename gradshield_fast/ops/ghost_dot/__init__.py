"""The ghost dot product: every packed example's gradient against a dense reference direction."""

from gradshield_fast.ops.ghost_dot.api import ghost_dot

__all__ = ["ghost_dot"]
