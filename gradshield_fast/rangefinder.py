"""Low-rank factors of weights' gradients from a few passes over the data, no gradient ever being held.

    pass 1   Y = G W         W Gaussian, seeded; Q an orthonormal basis of Y's columns
    pass 2   Z = G^T Q       G ~ Q Z^T, the best approximation whose columns lie in Q
    pass 3   Y = G P         P an orthonormal basis of Z's columns; G ~ Y P^T, after one more power iteration
    ...                      and so on, alternating sides

The last product is cut to the rank by its singular values. Columns of W that were not used for Q say afterwards how
much was dropped.

Source: arXiv:0909.4061, algorithms 4.1 and 4.4 (orthonormalised after each product).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from gradshield_fast.lowrank import OVERSAMPLE, LowRank, fix_signs
from gradshield_fast.ops.checks import accumulate_dtype
from gradshield_fast.sketches import Sketch, Use, sketching
from gradshield_fast.weight_gradients import GradientCosine

HELD_OUT = 8
"""Random columns that are kept apart from the range finder to estimate what it drops."""

OUTSIDE = OVERSAMPLE + HELD_OUT
"""Random columns for the norm of a batch's gradient outside of the direction's input side."""

SEED = 0


@dataclass(frozen=True)
class Found:
    """Factors of one weight's gradient, with an estimate of what they drop.

        dropped = mean over j of ||(G - p q^T) w_j||^2,      w_j Gaussian, independent of p and q

    whose expectation is ||G - p q^T||_F^2.

    Attributes:
        factors: p q^T.
        dropped: the estimate.
        variance: of the estimate, from the spread of its columns.
    """

    factors: LowRank
    dropped: float
    variance: float

    @property
    def square(self) -> float:
        """Estimate of ||G||_F^2: what is kept is orthogonal to what is dropped."""
        return self.factors.square() + self.dropped


class RangeFinder:
    """Finds low-rank factors of the gradients of several weights at once.

    With k columns, k = min(rank + OVERSAMPLE, rows, cols) + HELD_OUT, it holds at most

        4 bytes * sum over weights of k * (rows + cols)          (8 bytes for float64 weights)

    between passes, and one weight's bases in float64 besides while it turns to the next pass. During a backward pass
    an odd pass keeps k numbers a token of each layer's input instead of the input, an even one keeps the input.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        weights: Mapping[str, torch.Tensor],
        uses: Mapping[str, Sequence[Use]],
        rank: int,
    ) -> None:
        """Draw the random columns.

        Args:
            model: the model, frozen.
            weights: name -> matrix weight.
            uses: name -> the modules that apply it.
            rank: columns of p and q, at most.
        """
        self._model, self._uses, self._rank = model, uses, rank
        self._finders = {name: _Finder(name, weight, rank) for name, weight in weights.items()}

    @contextmanager
    def next_pass(self) -> Iterator[dict[str, Sketch]]:
        """Take every backward pass inside as one pass over the data; every pass must be over the same data.

        Yields:
            Name -> the sketch that is being added to.
        """
        sketches = {name: finder.begin() for name, finder in self._finders.items()}
        with sketching(self._model, self._uses, sketches):
            yield sketches
        for name, sketch in sketches.items():
            if sketch.total is None:
                del self._finders[name]  # nothing reaches this weight

    def result(self, scale: float) -> dict[str, Found]:
        """Cut the last products to the rank. The finder is used up.

        Args:
            scale: factor on the gradients.

        Returns:
            Name -> factors; a weight that no pass has reached is missing.
        """
        found = {}
        for name in list(self._finders):
            found[name] = self._finders.pop(name).end(scale)
        return found


class _Finder:
    """One weight's state between passes."""

    def __init__(self, name: str, weight: torch.Tensor, rank: int) -> None:
        self.shape = (int(weight.shape[0]), int(weight.shape[1]))
        self.rank, self.device, self.dtype = rank, weight.device, accumulate_dtype(weight)
        self.width = min(rank + OVERSAMPLE, *self.shape)
        self.seed = SEED + zlib.crc32(name.encode())  # the same columns whatever else is selected
        self.sketch: Sketch | None = None
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None  # w_j, and G w_j

    def begin(self) -> Sketch:
        """Give what the gradient is to be multiplied with in the next pass."""
        if self.sketch is None:
            columns = gaussian(self.shape[1], self.width + HELD_OUT, self.seed).to(self.device, self.dtype)
            self.sketch = Sketch(self.shape, columns, right=True)
        else:
            right = self.sketch.right
            self.sketch = Sketch(self.shape, _orthonormal(self._product()), right=not right)
        return self.sketch

    def _product(self) -> torch.Tensor:
        """The last pass's product, its held-out columns put aside."""
        assert self.sketch is not None
        assert self.sketch.total is not None
        if self.held is None:
            self.held = self.sketch.columns[:, self.width :].clone(), self.sketch.total[:, self.width :].clone()
            return self.sketch.total[:, : self.width]
        return self.sketch.total

    def end(self, scale: float) -> Found:
        assert self.sketch is not None
        right, basis, product = self.sketch.right, self.sketch.columns, self._product()
        assert self.held is not None
        # product = u s v^T; G ~ product basis^T on the right side, basis product^T on the left
        u, upper = torch.linalg.qr(product.double())
        small_u, s, vh = torch.linalg.svd(upper)
        rank = max(1, min(self.rank, int((s > s[0] * torch.finfo(self.dtype).eps).sum())))
        outer = (u @ small_u[:, :rank]) * s[:rank]
        inner = basis.double() @ vh[:rank].T
        if right:
            p, q = outer, inner
        else:
            p, q = inner * s[:rank], outer / s[:rank].clamp_min(torch.finfo(s.dtype).tiny)
        q, sign = fix_signs(q)
        p = p * sign
        omega, product = (x.double() for x in self.held)
        squares = (product - p @ (q.T @ omega)).square().sum(0) * scale**2
        factors = LowRank((p * scale).to(self.dtype), q.to(self.dtype))
        return Found(factors, float(squares.mean()), float(squares.var()) / HELD_OUT)


def gaussian(rows: int, cols: int, seed: int) -> torch.Tensor:
    """Draw a Gaussian matrix on the CPU, so that it is the same for every device.

    Args:
        rows: its rows.
        cols: its columns.
        seed: its seed.

    Returns:
        Float32[Tensor, "rows cols"].
    """
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))


def _orthonormal(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.qr(x.double())[0].to(x.dtype)


def residual_of(found: Mapping[str, Found], exact: float) -> tuple[float, float]:
    """Relative norm of what was dropped over all weights, estimated, and the estimate's standard error.

        residual = sqrt(D / (K + D)),    D = sum of `dropped`,    K = sum of what was kept

    The error is the first-order one of D, whose variance adds up over weights.

    Args:
        found: name -> factors.
        exact: squared norm of the entries that dropped nothing.

    Returns:
        The residual, and its standard error.
    """
    dropped = math.fsum(f.dropped for f in found.values())
    total = math.fsum(f.factors.square() for f in found.values()) + exact + dropped
    if total == 0:
        return 0.0, 0.0
    residual = math.sqrt(dropped / total)
    error = math.sqrt(math.fsum(f.variance for f in found.values()))
    # d/dD sqrt(D / (K + D)) = K / (2 residual (K + D)^2)
    return residual, error * (total - dropped) / (2 * residual * total**2) if residual else 0.0


class SketchedCosine(GradientCosine):
    """Cosine of each backward pass's gradient with a direction whose matrices are low-rank.

        <G, p q^T> = sum (G q) p,      ||G||_F^2 ~ ||G q||_F^2 + mean over j of ||G (w_j - q q^T w_j)||^2,  w_j Gaussian

    so that the dot product is exact, and of the norm only what lies outside of q is estimated.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        uses: Mapping[str, Sequence[Use]],
        dense: Mapping[str, torch.Tensor],
        factors: Mapping[str, LowRank],
    ) -> None:
        """Start with no pass.

        Args:
            model: the model, frozen.
            uses: name -> the modules that apply a weight.
            dense: name -> entry, of which whole gradients are given to this object.
            factors: name -> low-rank entry.
        """
        super().__init__(dense)
        self._norm = math.sqrt(self._norm**2 + math.fsum(f.square() for f in factors.values()))
        self._model, self._uses, self._factors = model, uses, factors
        self._sketches: dict[str, Sketch] = {}
        for name, f in factors.items():
            omega = gaussian(f.shape[1], OUTSIDE, SEED + zlib.crc32(f"cosine of {name}".encode())).to(f.q)
            columns = torch.cat([f.q, (omega - f.q @ (f.q.T @ omega)) / math.sqrt(OUTSIDE)], 1)
            self._sketches[name] = Sketch(f.shape, columns, right=True)

    @contextmanager
    def listening(self) -> Iterator[dict[str, Sketch]]:
        """Put the hooks on.

        Yields:
            Name -> the sketch that is being added to.
        """
        with sketching(self._model, self._uses, self._sketches):
            yield self._sketches

    def finish(self) -> float:
        """End a pass.

        Returns:
            Its cosine; 0.0 where either is zero.
        """
        for name, sketch in self._sketches.items():
            f, product, sketch.total = self._factors[name], sketch.total, None
            if product is not None:
                self._dot.append((product[:, : f.rank] * f.p).sum())
                self._square.append(product.square().sum())
        return super().finish()
