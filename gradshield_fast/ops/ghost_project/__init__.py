"""The per-example gradient of a linear layer projected on both sides, without the gradient."""

from gradshield_fast.ops.ghost_project.api import ghost_project

__all__ = ["ghost_project"]
