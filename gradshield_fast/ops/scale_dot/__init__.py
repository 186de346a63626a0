"""The ghost dot product of vectors that scale or shift: norm weights and biases."""

from gradshield_fast.ops.scale_dot.api import scale_dot

__all__ = ["scale_dot"]
