"""The language-model head and its loss in one op: losses, dL/dh and the head's own ghost dot, without the logits."""

from gradshield_fast.ops.linear_cross_entropy.api import HeadLoss, linear_cross_entropy

__all__ = ["HeadLoss", "linear_cross_entropy"]
