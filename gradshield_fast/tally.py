"""What one batch's backward pass adds up to: dot products, position terms and squared norms, row by row."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from gradshield_fast.batches import PackedBatch
from gradshield_fast.errors import ScoringError
from gradshield_fast.head_norm import HeadNorm
from gradshield_fast.layout import Layout, RowAxisLost, by_row, by_token, layout_of, packed_layout, sum_rows, tokens_of
from gradshield_fast.ops import ghost_inner, ghost_norm_sq

Key = tuple[str, str]


class Tally:
    """Sums of one batch, in float64, on one device.

    Attributes:
        dot: Float64[Tensor, "rows directions"]; complete after `finish`.
        token_dot: Float64[Tensor, "rows tokens directions"] or None; complete after `finish`.
        norm_sq: Float64[Tensor, "rows"] or None; complete after `finish`.
        by_weight: weight's name -> Float64[Tensor, "rows directions"] and the same of its terms' magnitudes; kept only
            while a plan is checked.
        layouts: site's key -> the layouts its calls had.
        fired: (site's key) of every site whose output gradient arrived.
        uses: weight's name -> number of times its rule ran.
        inputs: (weight, activation) of every linear layer's call, in order; kept only while a plan is checked.
    """

    def __init__(
        self,
        rows: int,
        tokens: int,
        directions: int,
        device: torch.device,
        *,
        norms: bool,
        token_scores: bool,
        backend: str,
        expected_uses: Mapping[str, int] | None,
        known_layouts: Mapping[Key, set[Layout]] | None,
        by_weight: bool = False,
        line: PackedBatch | None = None,
    ) -> None:
        """Start at zero.

        Args:
            rows: rows of the batch.
            tokens: tokens of the padded batch.
            directions: K.
            device: where the sums live.
            norms: keep squared norms.
            token_scores: keep position terms.
            backend: the backend that the norm's op runs on.
            expected_uses: weight's name -> uses seen at calibration; None while calibrating.
            known_layouts: site's key -> layouts seen at calibration; None while calibrating.
            by_weight: also keep the dot products of each weight.
            line: the packed form that the model is given; None: it is given the padded one.
        """
        self.rows, self.tokens, self.directions, self.device = rows, tokens, directions, device
        self.dot = torch.zeros(rows, directions, dtype=torch.float64, device=device)
        self.token_dot = (
            torch.zeros(rows, tokens, directions, dtype=torch.float64, device=device) if token_scores else None
        )
        self.norm_sq = torch.zeros(rows, dtype=torch.float64, device=device) if norms else None
        self.by_weight: dict[str, tuple[torch.Tensor, torch.Tensor]] | None = {} if by_weight else None
        self.norm_by_weight: dict[str, torch.Tensor] = {}
        self.backend = backend
        self.layouts: dict[Key, set[Layout]] = {}
        self.fired: set[Key] = set()
        self.uses: dict[str, int] = {}
        self.inputs: list[tuple[str, torch.Tensor]] = []
        self._expected_uses, self._known_layouts = expected_uses, known_layouts
        self._line = line
        # position terms of all weights together, so that rows are summed once a batch and not once a use
        places = rows * tokens if line is None else len(line.place)
        self._terms = torch.zeros(places, directions, dtype=torch.float64, device=device)
        self._lengths = None if line is None else line.cu_seqlens.diff().long().to(device)
        self._bounds: dict[tuple[int, bool, torch.device], torch.Tensor] = {}
        self._matrix_uses: dict[str, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]] = {}
        self._vector_uses: dict[str, torch.Tensor] = {}
        self._head_norms: dict[str, HeadNorm] = {}

    def layout(self, site: Key, lead: tuple[int, ...]) -> Layout:
        """Find the layout of a call, and hold it against what calibration saw.

        Args:
            site: the site's key.
            lead: leading axes of the call's output.

        Returns:
            The layout.

        Raises:
            RowAxisLost: there is none, calibration never saw this site or saw another layout, or position terms are
                asked for and the layout has no token axis.
        """
        if self._line is not None:
            layout = packed_layout(lead, len(self._line.place))
            if layout is None:
                raise RowAxisLost(site, lead)
            self.fired.add(site)
            return layout
        layout = layout_of(lead, self.rows, self.tokens)
        if layout is None or (self.token_dot is not None and layout.kind != "flat" and layout.token_axis is None):
            raise RowAxisLost(site, lead)
        if self._known_layouts is not None:
            known = self._known_layouts.get(site, set())
            # with one row every layout sums to the same; position terms still need the calibrated one
            if layout not in known and (self.rows > 1 or self.token_dot is not None or not known):
                raise RowAxisLost(site, lead)
        self.layouts.setdefault(site, set()).add(layout)
        self.fired.add(site)
        return layout

    def add(self, weight: str, u: torch.Tensor, layout: Layout) -> None:
        """Add the position terms of one use of a weight.

        Args:
            weight: its name.
            u: Float[Tensor, "lead... directions"].
            layout: where the rows are in `lead`.
        """
        per_token = self._per_token(u, layout)
        if per_token is not None:
            self._terms += per_token.to(self.device)
        if per_token is None:
            self.dot += self._sum_rows(u, layout).to(self.device)
        if self.by_weight is not None:
            self._add_share(weight, self._sum_rows(u, layout).to(self.device), self._sum_rows(u.abs(), layout))
        self._used(weight)

    def _per_token(self, u: torch.Tensor, layout: Layout) -> torch.Tensor | None:
        """Sum over the positions that belong to one token, in float64 where there are several.

        Args:
            u: Float[Tensor, "lead... directions"].
            layout: where the rows are in `lead`.

        Returns:
            Float[Tensor, "places directions"], or None where the layout has no token axis.
        """
        if self._line is not None and layout.kind == "packed":
            flat = by_token(u, layout)
        else:
            found = tokens_of(u, layout, self.rows, self.tokens)
            if found is None:
                return None
            # the fused head's terms are padded whatever the model is given
            flat = found if self._line is None else found[self._line.place]
        return flat[:, 0] if flat.shape[1] == 1 else flat.sum(1, dtype=torch.float64)

    def _sum_rows(self, u: torch.Tensor, layout: Layout) -> torch.Tensor:
        if self._lengths is None or layout.kind != "packed":
            return sum_rows(u, layout, self.rows)
        return self._sum_segments(by_token(u, layout).sum(1, dtype=torch.float64))

    def _sum_segments(self, flat: torch.Tensor) -> torch.Tensor:
        """Sum over each packed row's tokens: float64[tokens, columns] -> float64[rows, columns]."""
        assert self._lengths is not None
        # the lengths are those of the batch: held against it again, a GPU would have to be waited for
        lengths = self._lengths.to(flat.device)
        return torch.segment_reduce(flat, "sum", lengths=lengths, axis=0, initial=0, unsafe=True)

    def add_rows(self, weight: str, s: torch.Tensor) -> None:
        """Add the dot products of one use of a weight, where there are no position terms.

        Args:
            weight: its name.
            s: Float64[Tensor, "rows directions"].
        """
        s = s.to(self.device)
        self.dot += s
        self._add_share(weight, s, s.abs())
        self._used(weight)

    def _used(self, weight: str) -> None:
        self.uses[weight] = self.uses.get(weight, 0) + 1

    def _add_share(self, weight: str, s: torch.Tensor, magnitude: torch.Tensor) -> None:
        if self.by_weight is not None:
            dot, terms = self.share(weight)
            self.by_weight[weight] = (dot + s, terms + magnitude.to(self.device))

    def share(self, weight: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Give one weight's dot products and the magnitudes of its terms; zeros for a weight that was not used.

        Args:
            weight: its name.

        Returns:
            Two of Float64[Tensor, "rows directions"].
        """
        none = torch.zeros_like(self.dot)
        return (self.by_weight or {}).get(weight, (none, none))

    def norm_of(self, weight: str) -> torch.Tensor:
        """Give one weight's norms; zeros for a weight that was not used. Complete after `finish`.

        Args:
            weight: its name.

        Returns:
            Float64[Tensor, "rows"].
        """
        none = torch.zeros(self.rows, dtype=torch.float64, device=self.device)
        return self.norm_by_weight.get(weight, none).clamp_min(0).sqrt()

    def add_matrix_norm(self, weight: str, left: torch.Tensor, right: torch.Tensor, layout: Layout) -> None:
        """Take in one use of a matrix weight as factors, G[n] = sum_t left[t] right[t]^T, for the squared norm.

        Args:
            weight: its name.
            left: Float[Tensor, "lead... rows_of_weight"], or Int[Tensor, "lead..."] for one-hot rows.
            right: Float[Tensor, "lead... cols_of_weight"].
            layout: where the batch's rows are in `lead`.
        """
        if self.norm_sq is None:
            return
        if not left.is_floating_point():
            left = left.unsqueeze(-1)
        if self._line is not None and layout.kind == "packed":
            left, right = by_token(left, layout), by_token(right, layout)
        else:
            left, right = by_row(left, layout, self.rows), by_row(right, layout, self.rows)
        bounds = self._bounds_of(left.shape[1], packed=self._line is not None and layout.kind == "packed", like=left)
        left, right = left.flatten(0, 1), right.flatten(0, 1)
        left = left if left.is_floating_point() else left[:, 0]
        if self._expected_uses is not None and self._expected_uses.get(weight) == 1:
            self._once(weight, ghost_norm_sq(right, left, bounds, backend=self.backend))
        else:
            self._matrix_uses.setdefault(weight, []).append((left, right, bounds))

    def _bounds_of(self, positions: int, *, packed: bool, like: torch.Tensor) -> torch.Tensor:
        """Row boundaries at so many positions a token (a row): one tensor for all layers, which kernels know again."""
        key = (positions, packed, like.device)
        if key not in self._bounds:
            one = self._line.cu_seqlens if packed and self._line is not None else torch.arange(self.rows + 1)
            self._bounds[key] = (one * positions).to(like.device, torch.int32)
        return self._bounds[key]

    def add_vector_norm(self, weight: str, v: torch.Tensor, layout: Layout) -> None:
        """Take in one use of a vector weight, whose per-example gradient is a sum over positions.

        Args:
            weight: its name.
            v: Float[Tensor, "lead... d"], position terms of the gradient.
            layout: where the batch's rows are in `lead`.
        """
        if self.norm_sq is None:
            return
        summed = self._sum_vectors(v, layout)
        self._vector_uses[weight] = self._vector_uses[weight] + summed if weight in self._vector_uses else summed

    def _sum_vectors(self, v: torch.Tensor, layout: Layout) -> torch.Tensor:
        """As `_sum_rows`, for many columns: on a CPU a sum of each row in its own type is much faster."""
        if self._line is None or layout.kind != "packed" or v.device.type != "cpu":
            return self._sum_rows(v, layout)
        flat = by_token(v, layout).flatten(0, 1)
        lengths = (self._line.cu_seqlens.diff() * (len(flat) // len(self._line.place))).tolist()
        return torch.stack([part.sum(0) for part in flat.split(lengths)]).double()

    def add_norm_sq(self, weight: str, norm_sq: torch.Tensor) -> None:
        """Take in the whole squared norm of a weight that is used once.

        Args:
            weight: its name.
            norm_sq: Float[Tensor, "rows"].
        """
        if self.norm_sq is not None:
            self._once(weight, norm_sq)

    def add_head_norm(self, weight: str, norm: HeadNorm) -> None:
        """Take in the fused head's use of a weight, which an embedding may have too.

        Args:
            weight: its name.
            norm: what the head gave.
        """
        self._head_norms[weight] = norm

    def finish(self) -> None:
        """Sum the position terms over each row, and add the norms of weights with several uses, cross terms included.

        Raises:
            ScoringError: two uses of one weight see different numbers of positions, or the head's weight has a use
                that is not the embedding of the model's input.
        """
        if self._lengths is None:
            self.dot += self._terms.view(self.rows, self.tokens, -1).sum(1)
        else:
            self.dot += self._sum_segments(self._terms)
        if self.token_dot is not None:
            place = slice(None) if self._line is None else self._line.place
            self.token_dot.view(-1, self.directions)[place] += self._terms
        self._terms = torch.zeros_like(self._terms)
        if self.norm_sq is None:
            return
        for weight in self._head_norms.keys() - self._matrix_uses.keys():
            self._once(weight, self._head_norms[weight].norm_sq)
        for weight, uses in self._matrix_uses.items():
            total = torch.zeros(self.rows, dtype=torch.float64, device=self.device)
            counts = sorted({left.shape[0] // self.rows for left, _, _ in uses})
            if len(counts) > 1:
                raise ScoringError(
                    f"norms: weight '{weight}' is used at {counts} positions a row; its cross term needs equal ones. "
                    "Score without norms, or leave it out of the direction"
                )
            for i, (left, right, bounds) in enumerate(uses):
                for j in range(i + 1):
                    inner = ghost_inner(
                        left,
                        right,
                        uses[j][0].to(left.device),
                        uses[j][1].to(left.device),
                        bounds,
                        backend=self.backend,
                    )
                    total += (1 if i == j else 2) * inner.to(self.device, torch.float64)
            if (head := self._head_norms.get(weight)) is not None:
                total += head.norm_sq.to(self.device, torch.float64)
                for left, right, _ in uses:
                    total += 2 * head.inner(weight, left, right).to(self.device, torch.float64)
            self._record(weight, total)
        for weight, v in self._vector_uses.items():
            self._record(weight, v.square().sum(-1))
        self._matrix_uses.clear()
        self._vector_uses.clear()
        self._head_norms.clear()

    def _once(self, weight: str, norm_sq: torch.Tensor) -> None:
        if weight in self.norm_by_weight:
            raise ScoringError(
                f"norms: weight '{weight}' was used more often in this batch than at calibration, so that a cross "
                "term is missing; score without norms, or leave the weight out of the direction"
            )
        self._record(weight, norm_sq)

    def _record(self, weight: str, norm_sq: torch.Tensor) -> None:
        assert self.norm_sq is not None
        self.norm_by_weight[weight] = norm_sq.to(self.device, torch.float64)
        self.norm_sq += self.norm_by_weight[weight]
