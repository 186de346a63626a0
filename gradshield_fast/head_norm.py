"""Squared norm of the fused head's per-example gradients, in blocks of the vocabulary: no logits are stored.

    x[t, v] = (softmax(z'[t])[v] - [v = label[t]]) dz'/dz,    h'[t] = scale * w[t] * h[t]
    G[n] = sum_{t in n} x[t] h'[t]^T

    ||G[n]||^2 = sum_{t, u in n} (x[t] . x[u]) (h'[t] . h'[u])      a row of at most d positions: x x^T adds up
               = sum_v |sum_{t in n} x[t, v] h'[t]|^2               a longer one: so do the squares of G[n] itself

The loss is known by then, so that the softmax needs no pass of its own: z'[label] + loss is its normaliser, and its
entry at the label, less one, is expm1(-loss), which keeps a sure model's digits.

A head that shares its weight with the embedding has the cross term 2 <G[n], G_emb[n]>, where G_emb[n] puts the
embedding's output gradient into the rows of the words that were looked up. So of G[n] those rows are kept: one a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradshield_fast.batches import PackedBatch, PaddedBatch
from gradshield_fast.errors import ScoringError
from gradshield_fast.ops.checks import accumulate_dtype
from gradshield_fast.ops.ghost_dot_lowrank import lowrank_project
from gradshield_fast.ops.segments import segment_sum

WORDS, FEWEST = 8192, 256
"""Rows of the head that are multiplied at once, at most and at least; a multiple of FEWEST."""

ELEMENTS = {"cpu": 1 << 21}
"""Entries of x that exist at once, unless FEWEST words have more: what the caches hold."""

ELEMENTS_ELSEWHERE = 1 << 25
"""The same on other devices: 128 MiB, so that few and large products are launched."""


@dataclass(frozen=True, eq=False)
class Lookups:
    """The words that each example's embedding looked up.

    Attributes:
        ids: Int64[Tensor, "tokens"], example after example.
        bounds: Int[Tensor, "examples+1"], example n owns bounds[n]:bounds[n+1].
    """

    ids: torch.Tensor
    bounds: torch.Tensor

    @classmethod
    def of(cls, batch: PaddedBatch, line: PackedBatch | None) -> Lookups:
        """List the words of a batch in the form that the model is given.

        Args:
            batch: the rows.
            line: their packed form; None: the model is given the padded one, whose padding is looked up too.

        Returns:
            The words.
        """
        if line is not None:
            return cls(line.input_ids[0], line.cu_seqlens)
        return cls(batch.input_ids.reshape(-1), torch.arange(batch.rows + 1, dtype=torch.int32) * batch.tokens)


@dataclass(frozen=True, eq=False)
class HeadNorm:
    """What the head adds to the squared norms of its weight.

    Attributes:
        norm_sq: Float32[Tensor, "examples"], ||G[n]||^2.
        lookups: the words whose rows of G were kept, or None.
        rows: Float32[Tensor, "tokens d"], G[n] at each of those words, or None.
    """

    norm_sq: torch.Tensor
    lookups: Lookups | None
    rows: torch.Tensor | None

    def inner(self, weight: str, ids: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
        """Inner product with the gradient of an embedding that has the same weight.

            <G[n], G_emb[n]> = sum_{u in n} G[n][ids[u]] . g[u]

        Args:
            weight: the weight's name, for the message.
            ids: Int[Tensor, "tokens"], the words that were looked up.
            g: Float[Tensor, "tokens d"], the embedding's output gradient.

        Returns:
            Float32[Tensor, "examples"].

        Raises:
            ScoringError: the weight's other use is not a look-up of the model's own input.
        """
        kept = self.lookups
        same = kept is not None and ids.shape == kept.ids.shape and bool((ids == kept.ids.to(ids.device)).all())
        if kept is None or self.rows is None or not same:
            raise ScoringError(f"norms: weight '{weight}' is used by the head and by more than the input's embedding")
        return segment_sum((self.rows * g.to(self.rows)).sum(1), kept.bounds)


def head_norm(
    h: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    loss: torch.Tensor,
    token_weight: torch.Tensor | None,
    counts: torch.Tensor,
    lookups: Lookups | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    backend: str = "auto",
) -> HeadNorm:
    """Squared norms of the examples' gradients of a head's weight, and the rows of them that a tied embedding meets.

    Args:
        h: Float[Tensor, "labelled d"], hidden states that predict a label, example after example.
        weight: Float[Tensor, "vocabulary d"], the head's weight.
        labels: Int64[Tensor, "labelled"], the words to predict.
        loss: Float32[Tensor, "labelled"], their negative log-likelihood, from `linear_cross_entropy`.
        token_weight: Float32[Tensor, "labelled"], factor of each position's gradient; None: 1.
        counts: Int64[Tensor, "examples"], labelled positions of each example.
        lookups: the words whose rows of the gradients are to be kept, or None.
        scale: factor on the logits, before the softcap.
        softcap: soft bound on the logits; None: none.
        backend: backend of the product with the weight.

    Returns:
        The norms and rows; float64 where an input is float64.
    """
    dtype = accumulate_dtype(h, weight)
    own = (h.to(dtype) * weight[labels].to(dtype)).sum(1) * scale
    total = loss + (own if softcap is None else softcap * torch.tanh(own / softcap))
    at_label = torch.expm1(-loss)[:, None]
    shared = h.to(dtype) * scale if token_weight is None else h.to(dtype) * (scale * token_weight.to(dtype))[:, None]

    sizes, vocabulary, d = counts.tolist(), weight.shape[0], h.shape[1]
    examples = [(n, part) for n, part in enumerate(shared.split(sizes)) if len(part)]
    grams = {n: part.new_zeros(len(part), len(part)) for n, part in examples if len(part) <= d}
    norm_sq = torch.zeros(len(sizes), dtype=dtype, device=h.device)
    room = ELEMENTS.get(h.device.type, ELEMENTS_ELSEWHERE) // max(len(h), 1)
    block = max(FEWEST, min(WORDS, room // FEWEST * FEWEST))
    columns = None if lookups is None else _Columns(lookups, sizes, range(0, vocabulary + block, block), shared)
    for i, start in enumerate(range(0, vocabulary if examples else 0, block)):
        y = lowrank_project(h, weight[start : start + block].T, backend=backend)
        x = _gradient(y, labels[:, None] - start, at_label, total[:, None], scale, softcap)
        blocks = x.split(sizes)
        for n, part in examples:
            if n in grams:
                grams[n].addmm_(blocks[n], blocks[n].T)
            else:
                norm_sq[n] += (blocks[n].T @ part).square().sum()
        if columns is not None:
            columns.take(blocks, i, start)
    for n, part in examples:
        if n in grams:
            norm_sq[n] = (grams[n] * (part @ part.T)).sum()
    return HeadNorm(norm_sq, lookups, None if columns is None else columns.rows(shared.split(sizes)))


def _gradient(
    y: torch.Tensor,
    column: torch.Tensor,
    at_label: torch.Tensor,
    total: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> torch.Tensor:
    """Turn a block of products y = h W^T into x, in their own memory but for a softcap's slope.

    Args:
        y: Float32[Tensor, "labelled block"].
        column: Int64[Tensor, "labelled 1"], where the label is in the block, if it is.
        at_label: Float32[Tensor, "labelled 1"], the label's entry before the slope.
        total: Float32[Tensor, "labelled 1"], log of the softmax's normaliser.
        scale: factor on the logits.
        softcap: bound on the logits, or None.

    Returns:
        Float32[Tensor, "labelled block"].
    """
    if scale != 1:
        y *= scale
    slope = None
    if softcap is not None:
        y.div_(softcap).tanh_()
        slope = 1 - y * y
        y *= softcap
    x = y.sub_(total).exp_()
    inside = (column >= 0) & (column < x.shape[1])
    column = column.clamp(0, x.shape[1] - 1)
    x.scatter_(1, column, torch.where(inside, at_label, x.gather(1, column)))
    return x if slope is None else x.mul_(slope)


class _Columns:
    """Columns of x at the words that each example looked up, gathered block by block."""

    def __init__(self, lookups: Lookups, sizes: Sequence[int], starts: range, like: torch.Tensor) -> None:
        """Sort each example's words, and find out which of them are in which block.

        Args:
            lookups: the words.
            sizes: labelled positions of each example.
            starts: first word of every block, and the end of the last.
            like: Float[Tensor, "labelled d"].
        """
        lengths = lookups.bounds.diff().tolist()
        ids = lookups.ids.to(like.device).split(lengths)
        self.sorted = [x.sort(stable=True) for x in ids]
        edges = torch.tensor(starts, device=like.device)
        self.cuts = [torch.searchsorted(x.values, edges).tolist() for x in self.sorted]
        self.columns = [like.new_zeros(size, length) for size, length in zip(sizes, lengths, strict=True)]

    def take(self, blocks: Sequence[torch.Tensor], i: int, start: int) -> None:
        """Take the columns that a block holds.

        Args:
            blocks: Float32[Tensor, "positions block"] of each example.
            i: the block's number.
            start: its first word.
        """
        for x, ids, cuts, columns in zip(blocks, self.sorted, self.cuts, self.columns, strict=True):
            if len(x) and cuts[i] < cuts[i + 1]:
                at = slice(cuts[i], cuts[i + 1])
                columns[:, ids.indices[at]] = x[:, ids.values[at] - start]

    def rows(self, shared: Sequence[torch.Tensor]) -> torch.Tensor:
        """Turn the columns into rows of G: G[n][v] = sum_{t in n} x[t, v] h'[t].

        Args:
            shared: Float32[Tensor, "positions d"] of each example, h'.

        Returns:
            Float32[Tensor, "tokens d"].
        """
        return torch.cat([columns.T @ part for columns, part in zip(self.columns, shared, strict=True)])
