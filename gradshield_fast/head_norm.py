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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from gradshield_fast.batches import PackedBatch, PaddedBatch
from gradshield_fast.errors import ScoringError
from gradshield_fast.ops.checks import accumulate_dtype
from gradshield_fast.ops.ghost_dot_lowrank import lowrank_project
from gradshield_fast.ops.segments import segment_sum

WORDS = 8192
"""Rows of the head that are multiplied at once, for a row of at most ELEMENTS // WORDS labelled positions."""

ELEMENTS = 1 << 22
"""Entries of x that exist at once: 16 MiB. One row of more than ELEMENTS // FEWEST positions takes more."""

FEWEST = 256


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
    share = h.to(dtype) * scale if token_weight is None else h.to(dtype) * (scale * token_weight.to(dtype))[:, None]

    norm_sq = torch.zeros(len(counts), dtype=dtype, device=h.device)
    rows = None if lookups is None else torch.zeros(len(lookups.ids), h.shape[1], dtype=dtype, device=h.device)
    sizes = counts.tolist()
    bounds = [] if lookups is None else lookups.bounds.tolist()
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    for group in _groups(sizes, ELEMENTS // WORDS):
        longest = sizes[group[0]]
        step = torch.arange(longest)
        live = step < torch.tensor([sizes[n] for n in group])[:, None]
        # a place that a short row does not fill looks at any position, and is then blanked
        place = (torch.tensor([starts[n] for n in group])[:, None] + step).clamp_max(len(h) - 1).to(h.device)
        blank = ~live.to(h.device)
        part = _Part(
            h[place].masked_fill(blank[..., None], 0),
            labels[place],
            loss[place].masked_fill(blank, 0),
            total[place].masked_fill(blank, torch.inf),  # every share of it is exp(-inf) = 0
            share[place].masked_fill(blank[..., None], 0),
        )
        words = None
        if lookups is not None:
            words = [lookups.ids[bounds[n] : bounds[n + 1]].to(h.device) for n in group]
        found, kept = part.norm(weight, words, scale, softcap, backend)
        norm_sq[torch.tensor(group, device=h.device)] = found
        for n, at_words in zip(group, kept, strict=False):
            assert rows is not None
            rows[bounds[n] : bounds[n + 1]] = at_words
    return HeadNorm(norm_sq, lookups, rows)


def _groups(sizes: Sequence[int], room: int) -> Iterator[list[int]]:
    """Put examples of similar length together, longest first; an example without a label is left out.

    Args:
        sizes: positions of each example.
        room: positions of a group, padded to its longest; one example may have more.

    Yields:
        The examples of a group.
    """
    group: list[int] = []
    for n in sorted(range(len(sizes)), key=lambda n: -sizes[n]):
        if sizes[n] == 0:
            break
        if group and sizes[group[0]] * (len(group) + 1) > room:
            yield group
            group = []
        group.append(n)
    if group:
        yield group


@dataclass(frozen=True, eq=False)
class _Part:
    """Examples of similar length, padded to the longest.

    Attributes:
        h: Float[Tensor, "examples positions d"], 0 at padding.
        labels: Int64[Tensor, "examples positions"].
        loss: Float32[Tensor, "examples positions"], 0 at padding.
        total: Float32[Tensor, "examples positions"], log of the softmax's normaliser; infinite at padding.
        share: Float32[Tensor, "examples positions d"], h' of the module's formula, 0 at padding.
    """

    h: torch.Tensor
    labels: torch.Tensor
    loss: torch.Tensor
    total: torch.Tensor
    share: torch.Tensor

    def norm(
        self,
        weight: torch.Tensor,
        words: Sequence[torch.Tensor] | None,
        scale: float,
        softcap: float | None,
        backend: str,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Go through the vocabulary.

        Args:
            weight: Float[Tensor, "vocabulary d"].
            words: Int64[Tensor, "tokens"] of each example, where rows of G are asked for.
            scale: factor on the logits.
            softcap: bound on the logits, or None.
            backend: backend of the product.

        Returns:
            Float32[Tensor, "examples"], and Float32[Tensor, "tokens d"] of each example with words.
        """
        examples, positions, d = self.h.shape
        block = max(FEWEST, min(WORDS, ELEMENTS // (examples * positions)))
        flat = self.h.flatten(0, 1)
        long = positions > d
        norm_sq = self.share.new_zeros(examples)
        gram = None if long else self.share.new_zeros(examples, positions, positions)
        lookups = None if words is None else _Columns(words, weight.shape[0], block, self.share)
        for i, start in enumerate(range(0, weight.shape[0], block)):
            y = lowrank_project(flat, weight[start : start + block].T, backend=backend)
            x = self._gradient(y.view(examples, positions, -1), start, scale, softcap)
            if gram is None:
                norm_sq += (x.transpose(1, 2) @ self.share).square().sum((1, 2))
            else:
                gram.baddbmm_(x, x.transpose(1, 2))
            if lookups is not None:
                lookups.take(x, i, start)
        if gram is not None:
            norm_sq = (gram * (self.share @ self.share.transpose(1, 2))).sum((1, 2))
        return norm_sq, [] if lookups is None else lookups.rows(self.share)

    def _gradient(self, y: torch.Tensor, start: int, scale: float, softcap: float | None) -> torch.Tensor:
        """Turn a block of products y = h W^T into x, in their own memory but for a softcap's slope."""
        if scale != 1:
            y *= scale
        slope = None
        if softcap is not None:
            y.div_(softcap).tanh_()
            slope = 1 - y * y
            y *= softcap
        x = y.sub_(self.total[..., None]).exp_()
        column = (self.labels - start)[..., None]
        inside = (column >= 0) & (column < x.shape[-1])
        column = column.clamp(0, x.shape[-1] - 1)
        x.scatter_(-1, column, torch.where(inside, torch.expm1(-self.loss)[..., None], x.gather(-1, column)))
        return x if slope is None else x.mul_(slope)


class _Columns:
    """Columns of x at the words that a group's examples looked up, gathered block by block."""

    def __init__(self, words: Sequence[torch.Tensor], vocabulary: int, block: int, like: torch.Tensor) -> None:
        """Sort the words by block.

        Args:
            words: Int64[Tensor, "tokens"] of each example.
            vocabulary: number of words that there are.
            block: words of a block.
            like: Float[Tensor, "examples positions d"].
        """
        self.lengths = [len(w) for w in words]
        ids = torch.cat(list(words))
        self.ids, self.order = ids.sort(stable=True)
        self.example = torch.arange(len(words)).repeat_interleave(torch.tensor(self.lengths)).to(ids.device)[self.order]
        edges = torch.arange(0, vocabulary + block, block, device=ids.device)
        self.cuts = torch.searchsorted(self.ids, edges).tolist()
        self.columns = like.new_zeros(len(ids), like.shape[1])

    def take(self, x: torch.Tensor, i: int, start: int) -> None:
        """Take the columns that a block holds.

        Args:
            x: Float32[Tensor, "examples positions block"].
            i: the block's number.
            start: its first word.
        """
        at = slice(self.cuts[i], self.cuts[i + 1])
        self.columns[self.order[at]] = x[self.example[at], :, self.ids[at] - start]

    def rows(self, share: torch.Tensor) -> list[torch.Tensor]:
        """Turn the columns into rows of G: G[n][v] = sum_{t in n} x[t, v] h'[t].

        Args:
            share: Float32[Tensor, "examples positions d"], h'.

        Returns:
            Float32[Tensor, "tokens d"] of each example.
        """
        return [columns @ h for columns, h in zip(self.columns.split(self.lengths), share, strict=True)]
