"""The ghost dot product of an embedding table."""

from gradshield_fast.ops.embedding_dot.api import embedding_dot

__all__ = ["embedding_dot"]
