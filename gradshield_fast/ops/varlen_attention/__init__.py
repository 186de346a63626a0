"""Causal attention over packed rows, and its gradients."""

from gradshield_fast.ops.varlen_attention.api import varlen_attention

__all__ = ["varlen_attention"]
