"""The rows of a head's gradient that a tied embedding meets: G[n] at the words that example n looked up.

    G[n][v] = sum_{t in n} x[t, v] h'[t],      v = ids[u] for every looked-up u of n

x comes in blocks of the vocabulary (head_norm.py), and of it the columns at those words are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gradshield_fast.batches import PackedBatch, PaddedBatch

PLACES = 1 << 25
"""Pairs of a position and a word, padding included, that are gathered at once: 128 MiB of float32."""


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


class Columns:
    """Columns of x at the words that each example looked up, gathered block by block, one example after another."""

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

    def rows(self, shared: torch.Tensor) -> torch.Tensor:
        """Turn the columns into rows of G: G[n][v] = sum_{t in n} x[t, v] h'[t].

        Args:
            shared: Float32[Tensor, "labelled d"], h'.

        Returns:
            Float32[Tensor, "tokens d"].
        """
        parts = shared.split([len(columns) for columns in self.columns])
        return torch.cat([columns.T @ part for columns, part in zip(self.columns, parts, strict=True)])


@dataclass(eq=False)
class _Group:
    """A few examples side by side, padded to the longest.

    Attributes:
        at: Int64[Tensor, "examples positions"], places in the labelled positions.
        real: Bool[Tensor, "examples positions"], False where that is padding.
        ids: Int64[Tensor, "examples lookups"], the words; -1 where that is padding.
        columns: Float32[Tensor, "examples positions lookups"], what was gathered.
    """

    at: torch.Tensor
    real: torch.Tensor
    ids: torch.Tensor
    columns: torch.Tensor


class BatchedColumns:
    """The same for many examples at a time: two launches a block instead of one for each example."""

    def __init__(self, lookups: Lookups, sizes: Sequence[int], starts: range, like: torch.Tensor) -> None:
        """Lay the examples out side by side.

        Args:
            lookups: the words.
            sizes: labelled positions of each example.
            starts: first word of every block, and the end of the last.
            like: Float[Tensor, "labelled d"].
        """
        del starts
        lengths, device = lookups.bounds.diff().tolist(), like.device
        ids, self.groups, begin = lookups.ids.to(device), [], 0
        firsts = torch.tensor([0, *sizes]).cumsum(0)[:-1], torch.tensor([0, *lengths]).cumsum(0)[:-1]
        counts = torch.tensor(sizes), torch.tensor(lengths)
        while begin < len(sizes):
            end = begin + 1
            while end < len(sizes) and _places(sizes, lengths, begin, end + 1) <= PLACES:
                end += 1
            (at, real), (word, known) = (
                _padded(first[begin:end], count[begin:end], device) for first, count in zip(firsts, counts, strict=True)
            )
            words = torch.where(known, ids[word.clamp_max(max(len(ids) - 1, 0))] if len(ids) else word, -1)
            columns = like.new_zeros(*at.shape, words.shape[1])
            self.groups.append(_Group(at.clamp_max(max(len(like) - 1, 0)), real, words, columns))
            begin = end

    def take(self, blocks: Sequence[torch.Tensor], i: int, start: int) -> None:
        """Take the columns that a block holds.

        Args:
            blocks: one Float32[Tensor, "labelled block"].
            i: the block's number.
            start: its first word.
        """
        del i
        (x,) = blocks
        for group in self.groups:
            inside = (group.ids >= start) & (group.ids < start + x.shape[1])
            word = (group.ids - start).clamp(0, x.shape[1] - 1)
            found = x[group.at[:, :, None], word[:, None, :]]
            group.columns = torch.where(inside[:, None, :], found, group.columns)

    def rows(self, shared: torch.Tensor) -> torch.Tensor:
        """Turn the columns into rows of G: G[n][v] = sum_{t in n} x[t, v] h'[t].

        Args:
            shared: Float32[Tensor, "labelled d"], h'.

        Returns:
            Float32[Tensor, "tokens d"].
        """
        none = shared.new_zeros(())
        out = [shared.new_zeros(0, shared.shape[1])]
        for group in self.groups:
            if not len(shared):
                out.append(shared.new_zeros(int((group.ids >= 0).sum()), shared.shape[1]))
                continue
            columns = torch.where(group.real[:, :, None], group.columns, none)
            part = torch.where(group.real[:, :, None], shared[group.at], none)
            out.append((columns.mT @ part)[group.ids >= 0])
        return torch.cat(out)


def _places(sizes: Sequence[int], lengths: Sequence[int], begin: int, end: int) -> int:
    return (end - begin) * max(sizes[begin:end]) * max(lengths[begin:end])


def _padded(first: torch.Tensor, count: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Places first[n], first[n] + 1, ... of each example, as many as the longest has, and which of them it has."""
    step = torch.arange(int(count.max()))
    return (first[:, None] + step).to(device), (step < count[:, None]).to(device)
