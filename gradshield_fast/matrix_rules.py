"""Rules of matrix weights: linear layers, embedding tables and the output head, dense or low-rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from gradshield_fast.batches import PackedBatch, PaddedBatch
from gradshield_fast.direction import Entry
from gradshield_fast.head_columns import Lookups
from gradshield_fast.head_loss import HeadTerms
from gradshield_fast.layout import Layout
from gradshield_fast.lowrank import LowRank
from gradshield_fast.ops.embedding_dot import embedding_dot
from gradshield_fast.ops.ghost_dot import ghost_dot
from gradshield_fast.ops.ghost_dot_lowrank import lowrank_contract, lowrank_project
from gradshield_fast.ops.ghost_dot_lowrank.api import membership
from gradshield_fast.rule import Context
from gradshield_fast.tally import Tally


class _Matrix:
    """A direction on a matrix weight, prepared for products on its input side and on its output side.

    Written for a weight [out, in]; `transposed` is for one stored [in, out].
    """

    def __init__(
        self,
        weight: str,
        entries: Sequence[Entry | None],
        device: torch.device,
        context: Context,
        *,
        transposed: bool = False,
    ) -> None:
        self.weight, self.context, self.transposed = weight, context, transposed
        dense = [(k, e) for k, e in enumerate(entries) if isinstance(e, torch.Tensor)]
        factors = [(k, e.to(device, context.dtype)) for k, e in enumerate(entries) if isinstance(e, LowRank)]
        self.dense_of = [k for k, _ in dense]
        self.r = torch.stack([e.to(device, context.dtype) for _, e in dense]) if dense else None
        if self.r is not None and transposed:
            self.r = self.r.transpose(1, 2)
        self.p = self.q = self.member = None
        if factors:
            self.p = torch.cat([e.q if transposed else e.p for _, e in factors], 1)
            self.q = torch.cat([e.p if transposed else e.q for _, e in factors], 1)
            self.ranks = [0] * context.directions
            for k, e in factors:
                self.ranks[k] = e.rank
            self.member = membership(self.ranks, self.q)


class SharedInput:
    """Layers that are given the very same activation, one after another: q^T a of all of them in one pass over it.

    The first computes every layer's columns, the others take theirs, and the last lets go of the activation.
    """

    def __init__(self, rules: Sequence[MatrixRule]) -> None:
        """Put the layers' input sides side by side.

        Args:
            rules: low-rank rules of the layers, in the order in which they are called.
        """
        self.q = torch.cat([rule.q for rule in rules if rule.q is not None], 1)
        self.backend = rules[0].context.backend
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None
        start = 0
        for i, rule in enumerate(rules):
            assert rule.q is not None
            stop = start + rule.q.shape[1]
            rule.shared = (self, start, stop, i == 0, i == len(rules) - 1)
            start = stop

    def project(self, a: torch.Tensor, start: int, stop: int, *, first: bool, last: bool) -> torch.Tensor | None:
        """Give one layer's columns of q^T a.

        Args:
            a: Float[Tensor, "... d_in"].
            start: its first column.
            stop: one past its last column.
            first: this is the first of the layers.
            last: this is the last of them.

        Returns:
            Float32[Tensor, "tokens rank"], or None where the first layer was given another activation.
        """
        if first:
            self.held = (a, lowrank_project(a.detach().reshape(-1, a.shape[-1]), self.q, backend=self.backend))
        held = self.held
        if last:
            self.held = None
        return held[1][:, start:stop] if held is not None and held[0] is a else None


class MatrixRule(_Matrix):
    """Linear layers: u[t] = g[t] . (r a[t]), dense or low-rank."""

    shared: tuple[SharedInput, int, int, bool, bool] | None = None

    def project(self, a: torch.Tensor) -> torch.Tensor | None:
        """Project the activation, in one pass for all the layers that share it.

        Args:
            a: Float[Tensor, "... d_in"].

        Returns:
            Float32[Tensor, "tokens rank"], q^T a; None without low-rank directions.
        """
        if self.q is None:
            return None
        z = None
        if self.shared is not None:
            group, start, stop, first, last = self.shared
            z = group.project(a, start, stop, first=first, last=last)
        if z is None:
            z = lowrank_project(a.detach().reshape(-1, a.shape[-1]), self.q, backend=self.context.backend)
        return z

    def terms(self, a: torch.Tensor | None, z: torch.Tensor | None, g: torch.Tensor) -> torch.Tensor:
        """Position terms of every direction.

        Args:
            a: Float[Tensor, "tokens d_in"], for dense directions.
            z: Float32[Tensor, "tokens rank"], for low-rank ones.
            g: Float[Tensor, "tokens d_out"].

        Returns:
            Float[Tensor, "tokens directions"].
        """
        backend = self.context.backend
        low = None
        if z is not None and self.p is not None and self.member is not None:
            low = lowrank_contract(z, g, self.p, self.member, backend=backend)
        if self.r is None or a is None:
            return g.new_zeros(g.shape[0], self.context.directions, dtype=self.context.dtype) if low is None else low
        dense = ghost_dot(a, g, self.r, backend=backend)
        if len(self.dense_of) == self.context.directions:
            return dense
        u = g.new_zeros(g.shape[0], self.context.directions, dtype=self.context.dtype) if low is None else low.clone()
        u[:, self.dense_of] += dense
        return u

    def keep(self, module: nn.Module, a: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Keep q^T a alone where that is enough: it frees the activation, which a frozen layer does not save itself.

        Args:
            module: the layer.
            a: Float[Tensor, "... d_in"].

        Returns:
            The activation or None, and its projection or None.
        """
        del module
        z = self.project(a)
        return (a.detach() if self.r is not None or self.context.norms else None), z

    def add(
        self, kept: tuple[torch.Tensor | None, torch.Tensor | None], g: torch.Tensor, layout: Layout, tally: Tally
    ) -> None:
        """Add this use of the weight.

        Args:
            kept: the activation or None, and its projection or None.
            g: Float[Tensor, "... d_out"].
            layout: where the rows are.
            tally: the batch's sums.
        """
        a, z = kept
        flat_a = None if a is None else a.reshape(-1, a.shape[-1])
        u = self.terms(flat_a, z, g.reshape(-1, g.shape[-1]))
        tally.add(self.weight, u.reshape(*g.shape[:-1], -1), layout)
        if a is not None and self.context.norms:
            left, right = (a, g) if self.transposed else (g, a)
            tally.add_matrix_norm(self.weight, left, right, layout)


class HeadRule(_Matrix):
    """An output head whose product is part of the fused loss (head_loss.py): the op gives the position terms itself."""

    tied: bool = False

    @property
    def mixed(self) -> bool:
        """Whether some directions are dense and some low-rank on this weight, which the op does not take."""
        return self.r is not None and self.q is not None

    def terms(self, batch: PaddedBatch, line: PackedBatch | None) -> HeadTerms:
        """What the op is given.

        Args:
            batch: the rows.
            line: the packed form that the model is given; None: it is given the padded one.

        Returns:
            The directions on the head's weight, and what its norm needs.
        """
        norms = self.context.norms
        lookups = Lookups.of(batch, line) if norms and self.tied else None
        if self.r is not None:
            return HeadTerms(r=self.r, norms=norms, lookups=lookups)
        return HeadTerms(p=self.p, q=self.q, ranks=self.ranks, norms=norms, lookups=lookups)

    def add(self, terms: HeadTerms, batch: PaddedBatch, tally: Tally) -> None:
        """Add the head's use of the weight.

        Args:
            terms: what `terms` gave, after the pass.
            batch: the rows.
            tally: the batch's sums.
        """
        assert terms.dot is not None
        u = torch.zeros(*batch.predicts.shape, self.context.directions, dtype=terms.dot.dtype, device=terms.dot.device)
        columns = self.dense_of if self.r is not None else list(range(self.context.directions))
        rows, positions = batch.predicts.to(u.device).nonzero(as_tuple=True)
        u[rows[:, None], positions[:, None], torch.tensor(columns, device=u.device)] = terms.dot
        tally.add(self.weight, u, Layout("rows", 1))
        if terms.norm is not None:
            tally.add_head_norm(self.weight, terms.norm)


class EmbeddingRule(_Matrix):
    """Embedding tables: u[t] = g[t] . r[ids[t]]; the padding row has no gradient. A scaled table's g is scaled."""

    padding: int | None = None
    scale: torch.Tensor | float | None = None

    def keep(self, module: nn.Embedding, a: torch.Tensor) -> torch.Tensor:
        """Keep the ids.

        Args:
            module: the embedding.
            a: Int64[Tensor, "..."], the ids.

        Returns:
            The ids.
        """
        self.padding, self.scale = module.padding_idx, getattr(module, "embed_scale", None)
        return a

    def add(self, kept: torch.Tensor, g: torch.Tensor, layout: Layout, tally: Tally) -> None:
        """Add this use of the table.

        Args:
            kept: Int64[Tensor, "..."], the ids.
            g: Float[Tensor, "... d"].
            layout: where the rows are.
            tally: the batch's sums.
        """
        if self.scale is not None:
            g = g * torch.as_tensor(self.scale, dtype=g.dtype, device=g.device)
        if self.padding is not None:
            g = g.masked_fill((kept == self.padding).unsqueeze(-1), 0)
        ids, flat_g = kept.reshape(-1), g.reshape(-1, g.shape[-1])
        u = torch.zeros(ids.shape[0], self.context.directions, dtype=self.context.dtype, device=g.device)
        if self.r is not None:
            u[:, self.dense_of] = embedding_dot(ids, flat_g, self.r, backend=self.context.backend)
        if self.p is not None and self.q is not None and self.member is not None:
            u += lowrank_contract(self.p[ids], flat_g, self.q, self.member, backend=self.context.backend)
        tally.add(self.weight, u.reshape(*g.shape[:-1], -1), layout)
        tally.add_matrix_norm(self.weight, kept, g, layout)
