"""Squared norm of the fused head's per-example gradients, in blocks of the vocabulary: no logits are stored.

    x[t, v] = (softmax(z'[t])[v] - [v = label[t]]) dz'/dz,    h'[t] = scale * w[t] * h[t]
    G[n] = sum_{t in n} x[t] h'[t]^T

    ||G[n]||^2 = sum_{t, u in n} (x[t] . x[u]) (h'[t] . h'[u])      a row of at most d positions: x x^T adds up
               = sum_v |sum_{t in n} x[t, v] h'[t]|^2               a longer one: so do the squares of G[n] itself

On a GPU both forms are `ghost_norm_sq`'s, of a block of columns of x.

The loss is known by then, so that the softmax needs no pass of its own: z'[label] + loss is its normaliser, and its
entry at the label, less one, is expm1(-loss), which keeps a sure model's digits.

A head that shares its weight with the embedding has the cross term 2 <G[n], G_emb[n]>, where G_emb[n] puts the
embedding's output gradient into the rows of the words that were looked up. So of G[n] those rows are kept: one a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gradshield_fast.errors import ScoringError
from gradshield_fast.head_columns import BatchedColumns, Columns, Lookups
from gradshield_fast.ops import ghost_norm_sq
from gradshield_fast.ops.checks import accumulate_dtype
from gradshield_fast.ops.ghost_dot_lowrank import lowrank_project
from gradshield_fast.ops.segments import segment_sum

WORDS, WORDS_ELSEWHERE, FEWEST = {"cpu": 8192}, 1 << 17, 256
"""Rows of the head that are multiplied at once, at most and at least; a multiple of FEWEST."""

ELEMENTS = {"cpu": 1 << 21}
"""Entries of x that exist at once, unless FEWEST words have more: what the caches hold."""

ELEMENTS_ELSEWHERE = 1 << 26
"""The same on other devices: 256 MiB, so that few and large products are launched."""

BATCHED = frozenset({"cuda"})
"""Devices on which examples are taken together: a CPU's caches hold one at a time, but a GPU would launch each."""

_KEEPS = "out_dtype" in (torch.mm.__doc__ or "")
"""Whether this torch's product of 16-bit matrices can answer in float32."""


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
    batched = h.device.type in BATCHED
    examples = [(n, part) for n, part in enumerate(shared.split(sizes)) if len(part)]
    grams = {n: part.new_zeros(len(part), len(part)) for n, part in examples if len(part) <= d and not batched}
    norm_sq = torch.zeros(len(sizes), dtype=dtype, device=h.device)
    room = ELEMENTS.get(h.device.type, ELEMENTS_ELSEWHERE) // max(len(h), 1)
    block = max(FEWEST, min(WORDS.get(h.device.type, WORDS_ELSEWHERE), room // FEWEST * FEWEST))
    columns, bounds = None, torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(h.device, torch.int32)
    if lookups is not None:
        kind = BatchedColumns if batched else Columns
        columns = kind(lookups, sizes, range(0, vocabulary + block, block), shared)
    for i, start in enumerate(range(0, vocabulary if examples else 0, block)):
        y = _product(h, weight[start : start + block], backend)
        x = _gradient(y, labels[:, None] - start, at_label, total[:, None], scale, softcap)
        if batched:
            norm_sq += ghost_norm_sq(shared, x, bounds, backend=backend)
            if columns is not None:
                columns.take([x], i, start)
            continue
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
    return HeadNorm(norm_sq, lookups, None if columns is None else columns.rows(shared))


def _product(h: torch.Tensor, weight: torch.Tensor, backend: str) -> torch.Tensor:
    """Y = h W^T in float32; torch's own product where it sums 16-bit factors in float32 and keeps that."""
    if h.device.type == "cuda" and backend != "reference" and h.dtype == weight.dtype != torch.float32 and _KEEPS:
        return torch.mm(h, weight.T, out_dtype=torch.float32)  # pyright: ignore[reportCallIssue]
    return lowrank_project(h, weight.T, backend=backend)


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
