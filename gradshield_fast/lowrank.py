"""Low-rank factors of a direction on one weight: r = p q^T, with what was dropped measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

OVERSAMPLE = 16
"""Columns that the randomised factors are found with beyond the rank; they are dropped at the end."""

EXACT_SHARE = 4
"""A rank this many times smaller than the short side is found by a randomised range finder: O(rows cols rank), not
O(short^3), and with four power iterations the residual is within 1e-3 of the best one's."""


@dataclass(frozen=True)
class LowRank:
    """A direction r = p q^T on a matrix weight.

    Attributes:
        p: Float[Tensor, "rows rank"], rows as in the weight.
        q: Float[Tensor, "cols rank"], cols as in the weight; orthonormal columns.
    """

    p: torch.Tensor
    q: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that this is a direction on."""
        return (self.p.shape[0], self.q.shape[0])

    @property
    def rank(self) -> int:
        """Number of columns of p and of q."""
        return self.p.shape[1]

    def dense(self) -> torch.Tensor:
        """Multiply the factors out.

        Returns:
            Float[Tensor, "rows cols"], p q^T.
        """
        return self.p @ self.q.T

    def square(self) -> float:
        """Squared Frobenius norm, from the factors' Gram matrices in float64.

        Returns:
            ||p q^T||_F^2.
        """
        p, q = self.p.double(), self.q.double()
        return float(((p.T @ p) * (q.T @ q)).sum())

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """Move and cast both factors.

        Args:
            device: where to.
            dtype: to what.

        Returns:
            The factors there.
        """
        return LowRank(self.p.to(device=device, dtype=dtype), self.q.to(device=device, dtype=dtype))


def factor(r: torch.Tensor, *, rank: int | None, energy: float | None) -> tuple[LowRank, float]:
    """Best low-rank factors of a matrix in the Frobenius norm, by a given rank or by the share of energy to keep.

        min_{rank p q^T <= k} ||r - p q^T||_F,      energy kept = sum_{i<k} sigma_i^2 / sum_i sigma_i^2

    Args:
        r: Float[Tensor, "rows cols"].
        rank: number of columns, or None.
        energy: share of the squared norm to keep, in (0, 1]; the smallest rank that keeps it is taken. Or None.

    Returns:
        The factors in r's dtype, and the squared norm that they drop.
    """
    short = min(r.shape)
    if rank is not None and short >= EXACT_SHARE * (rank + OVERSAMPLE):
        basis, squares = _random_basis(r, rank)
        x = r
    else:
        basis, squares = _eigenbasis(r)
        x = r.double()
    total = float(r.double().square().sum())
    if energy is not None:
        kept = torch.cumsum(squares, 0)
        rank = int((kept < energy * total * (1 - 1e-12)).sum()) + 1 if total > 0 else 1
    k = max(1, min(rank or short, short, basis.shape[1]))
    basis = basis[:, :k]
    if r.shape[0] >= r.shape[1]:
        q = basis
        p = x @ q
    else:  # the basis spans the columns of r: r ~ u (r^T u)^T; orthonormalise q so that both cases store one form
        p, q = basis, x.T @ basis
        q, upper = torch.linalg.qr(q)
        p = p @ upper.T
    dropped = max(0.0, total - float(p.double().square().sum()))
    return LowRank(p.to(r.dtype), q.to(r.dtype)), dropped


def _eigenbasis(r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Singular vectors of the short side and squared singular values, largest first, through the Gram matrix."""
    x = r.double()
    gram = x.T @ x if r.shape[0] >= r.shape[1] else x @ x.T
    values, vectors = torch.linalg.eigh(gram)
    return fix_signs(vectors.flip(1))[0], values.flip(0).clamp_min(0)


def _random_basis(r: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Randomised singular vectors of the short side (arXiv:0909.4061), with a seed of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(r, q=rank + OVERSAMPLE, niter=4)
    return fix_signs(v if r.shape[0] >= r.shape[1] else u)[0], s.square()


def fix_signs(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make the largest entry of each vector positive, so that the same matrix gives the same factors everywhere.

    Args:
        vectors: Float[Tensor, "d k"], column by column.

    Returns:
        The vectors, and Float[Tensor, "k"], the sign that each was multiplied by; 1 for a zero vector.
    """
    top = vectors.abs().argmax(0)
    sign = torch.where(vectors[top, torch.arange(vectors.shape[1], device=vectors.device)] < 0, -1.0, 1.0)
    sign = sign.to(vectors.dtype)
    return vectors * sign, sign
