"""The ghost dot product with a low-rank reference direction r = p q^T."""

from gradshield_fast.ops.ghost_dot_lowrank.api import ghost_dot_lowrank, lowrank_contract, lowrank_project

__all__ = ["ghost_dot_lowrank", "lowrank_contract", "lowrank_project"]
