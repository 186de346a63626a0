"""Products of a weight's gradient with a few columns, summed over a backward pass, without the gradient itself.

    G = sum_t g[t] a[t]^T      G right = sum_t g[t] (right^T a[t])^T,      G^T left = sum_t a[t] (left^T g[t])^T

over every token of every batch. A tied weight's uses add up, as its gradient's would.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from gradshield_fast.capture import Site, capture
from gradshield_fast.errors import ScoringError
from gradshield_fast.layers import method_of
from gradshield_fast.layout import Layout
from gradshield_fast.ops.ghost_dot_lowrank import lowrank_project
from gradshield_fast.tally import Tally
from gradshield_fast.universal import MethodFailed

KINDS = ("linear", "conv1d", "embedding")


@dataclass(frozen=True)
class Use:
    """One module that applies a weight.

    Attributes:
        name: the module's name in the model.
        module: the module.
        kind: "linear" (weight [out, in]), "conv1d" (weight [in, out]) or "embedding" (weight [ids, d]).
    """

    name: str
    module: nn.Module
    kind: str


class Sketch:
    """The running product of one weight's gradient with a few columns, for one side at a time.

    Attributes:
        columns: Float[Tensor, "cols k"] for the right side, Float[Tensor, "rows k"] for the left one.
        right: G columns if true, G^T columns if not.
        total: Float[Tensor, "rows k"] or Float[Tensor, "cols k"]; None before anything arrived.
    """

    def __init__(self, shape: tuple[int, int], columns: torch.Tensor, *, right: bool) -> None:
        """Start at nothing.

        Args:
            shape: the weight's.
            columns: what its gradient is multiplied with; their dtype is the one that sums run in.
            right: which side they are on.
        """
        self.shape, self.columns, self.right = shape, columns, right
        self.total: torch.Tensor | None = None

    def add(self, part: torch.Tensor, *, ids: torch.Tensor | None = None) -> None:
        """Add the share of one use.

        Args:
            part: Float[Tensor, "rows k"] (or cols), or with ids Float[Tensor, "tokens k"].
            ids: Int64[Tensor, "tokens"], rows of the total that the parts belong to.
        """
        if ids is None:
            self.total = part if self.total is None else self.total.add_(part)
            return
        if self.total is None:
            self.total = part.new_zeros(self.shape[0], part.shape[1])
        if part.device.type == "cpu":
            self.total.index_add_(0, ids, part)  # one after the other
        else:
            self.total.index_put_((ids,), part, accumulate=True)  # sorted first; index_add_ would race

    def add_at(self, start: int, part: torch.Tensor) -> None:
        """Add the share of some rows on the right side.

        Args:
            start: the first of them.
            part: Float[Tensor, "some k"].
        """
        if self.total is None:
            self.total = part.new_zeros(self.shape[0], part.shape[1])
        self.total[start : start + len(part)] += part


class _MatrixRule:
    """A use by a linear layer, or by one whose weight is stored transposed."""

    def __init__(self, sketch: Sketch, *, transposed: bool) -> None:
        self.sketch = sketch
        self.projects_input = sketch.right != transposed

    def keep(self, module: nn.Module, a: torch.Tensor) -> torch.Tensor:
        """Keep the input's few projections where they are enough, else the input.

        Args:
            module: the layer.
            a: Float[Tensor, "... d_in"].

        Returns:
            Float[Tensor, "tokens k"], or the input.
        """
        del module
        a = a.detach()
        return self._project(a) if self.projects_input else a

    def add(self, kept: torch.Tensor, g: torch.Tensor, layout: Layout, tally: Tally) -> None:
        """Add this use: one side's columns against the other side's projections.

        Args:
            kept: what `keep` returned.
            g: Float[Tensor, "... d_out"].
            layout: not used: the sum is over everything.
            tally: not used.
        """
        del layout, tally
        x, z = (g, kept) if self.projects_input else (kept, self._project(g))
        self.sketch.add(x.reshape(-1, x.shape[-1]).to(z.dtype).T @ z)

    def _project(self, x: torch.Tensor) -> torch.Tensor:
        return lowrank_project(x.reshape(-1, x.shape[-1]), self.sketch.columns)


class _EmbeddingRule:
    """A use by an embedding table: G has g[t] at row ids[t]; the padding row has no gradient."""

    def __init__(self, sketch: Sketch, padding: int | None) -> None:
        self.sketch, self.padding = sketch, padding

    def keep(self, module: nn.Module, a: torch.Tensor) -> torch.Tensor:
        """Keep the ids.

        Args:
            module: the table.
            a: Int64[Tensor, "..."].

        Returns:
            The ids.
        """
        del module
        return a

    def add(self, kept: torch.Tensor, g: torch.Tensor, layout: Layout, tally: Tally) -> None:
        """Add this use.

        Args:
            kept: Int64[Tensor, "..."], the ids.
            g: Float[Tensor, "... d"].
            layout: not used: the sum is over everything.
            tally: not used.
        """
        del layout, tally
        ids, flat_g = kept.reshape(-1), g.reshape(-1, g.shape[-1])
        if self.padding is not None:
            flat_g = flat_g.masked_fill((ids == self.padding)[:, None], 0)
        columns = self.sketch.columns
        if self.sketch.right:
            self.sketch.add(lowrank_project(flat_g, columns), ids=ids)
        else:
            self.sketch.add(flat_g.to(columns.dtype).T @ columns[ids])


class _AnyRows:
    """Stands in for a tally: sums over everything need to know nothing of where the rows are.

    Attributes:
        by_weight: None: no plan is being checked.
    """

    by_weight = None

    def layout(self, site: tuple[str, str], lead: tuple[int, ...]) -> Layout:
        """Accept every call.

        Args:
            site: the site's key.
            lead: leading axes of the call's output.

        Returns:
            A layout that nobody reads.
        """
        del site, lead
        return Layout("single", None)


@contextmanager
def sketching(model: nn.Module, uses: Mapping[str, Sequence[Use]], sketches: Mapping[str, Sketch]) -> Iterator[None]:
    """Add every backward pass inside to the sketches. The model is frozen; hooks alone are put on it.

    Args:
        model: the model.
        uses: weight's name -> the modules that apply it.
        sketches: weight's name -> what is to be summed.

    Yields:
        Nothing.

    Raises:
        ScoringError: a module was called with something that its class does not take.
    """
    sites: dict[str, Site] = {}
    for name, sketch in sketches.items():
        for use in uses[name]:
            site = sites.setdefault(use.name, Site(use.name, use.module))
            if use.kind == "embedding":
                rule = _EmbeddingRule(sketch, cast(nn.Embedding, use.module).padding_idx)
            else:
                rule = _MatrixRule(sketch, transposed=use.kind == "conv1d")
            site.rules.setdefault((name, use.kind), []).append(rule)
    with capture(model, list(sites.values())) as state:
        state.tally = cast(Tally, _AnyRows())
        try:
            yield
        except MethodFailed as failed:
            raise ScoringError(
                f"weight '{failed.site[0]}': its gradient cannot be sketched ({failed}); leave it out of the "
                "direction, or take the dense gradient"
            ) from failed


def uses_of(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> dict[str, list[Use]]:
    """Find the matrix weights that are owned by linear, Conv1D and embedding modules alone.

    A guess by the modules' classes, which `confirmed` tests: a subclass or a hook may do more, and a parent may use the
    weight without calling its owner.

    Args:
        model: the model.
        weights: name -> weight.

    Returns:
        Name -> every module that owns the weight; weights with another kind of owner are left out.
    """
    owners: dict[int, list[Use | None]] = {}
    for name, module in model.named_modules():
        for local, weight in module._parameters.items():
            if weight is not None:
                kind = method_of(module, local)
                known = kind in KINDS and weight.ndim == 2
                owners.setdefault(id(weight), []).append(Use(name, module, kind) if known else None)
    found = {name: owners.get(id(weight), [None]) for name, weight in weights.items()}
    return {name: [u for u in uses if u is not None] for name, uses in found.items() if None not in uses}


def confirmed(
    uses: Mapping[str, Sequence[Use]], weights: Mapping[str, nn.Parameter], trial: Callable[[], torch.Tensor]
) -> dict[str, list[Use]]:
    """Keep the weights whose owners do what their kind says, and which nothing else uses, as far as one trial shows.

    Every call of an owner must give what the kind gives for its input, and the trial's graph must lead to the weight as
    often as its owners were called. An owner that the trial did not call must have its class's plain forward. No
    gradient is taken.

    Args:
        uses: name -> owners, from `uses_of`.
        weights: name -> weight, frozen.
        trial: runs the model; its result has a graph where a weight requires grad.

    Returns:
        The part of `uses` that passed.
    """
    calls: Counter[str] = Counter()
    called: set[str] = set()
    broken: set[str] = set()

    def hook(name: str, use: Use) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls[name] += 1
            called.add(use.name)
            if not _as_expected(use.kind, module, args, kwargs, output):
                broken.add(name)

        return see

    handles = []
    try:
        for name, owners in uses.items():
            weights[name].requires_grad_(True)
            handles += [use.module.register_forward_hook(hook(name, use), with_kwargs=True) for use in owners]
        with torch.enable_grad():
            edges = edges_to(trial())
    finally:
        for handle in handles:
            handle.remove()
        for name in uses:
            weights[name].requires_grad_(False)
    kept = {}
    for name, owners in uses.items():
        known = all(use.name in called or _is_plain(use.module) for use in owners)
        if known and name not in broken and edges[id(weights[name])] == calls[name]:
            kept[name] = list(owners)
    return kept


def _as_expected(kind: str, module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> bool:
    a = args[0] if args else next(iter(kwargs.values()), None)
    if not isinstance(a, torch.Tensor) or not isinstance(output, torch.Tensor):
        return False
    weight, bias = module.weight.detach(), getattr(module, "bias", None)
    with torch.no_grad():
        try:
            if kind == "embedding":
                want = nn.functional.embedding(a, weight)
            else:
                want = nn.functional.linear(a, weight.T if kind == "conv1d" else weight, bias)
        except (RuntimeError, TypeError):
            return False
        if want.shape != output.shape:
            return False
        # rounding in another order; a factor that differs from 1 by less would be within the model's own rounding
        off = torch.linalg.vector_norm(output.double() - want.double())
        return bool(off <= 4 * torch.finfo(want.dtype).eps * torch.linalg.vector_norm(want.double()))


def _is_plain(module: nn.Module) -> bool:
    forward = type(module).forward
    known = forward in (nn.Linear.forward, nn.Embedding.forward) or type(module).__name__ == "Conv1D"
    return known and "forward" not in vars(module) and not module._forward_hooks


def edges_to(root: torch.Tensor) -> Counter[int]:
    """Count how often each leaf is used in a graph; no gradient is taken.

    Args:
        root: a tensor with a graph.

    Returns:
        id(leaf) -> edges that lead to it.
    """
    edges: Counter[int] = Counter()
    todo: list[Any] = [root.grad_fn] if root.grad_fn is not None else []
    seen = set(todo)
    while todo:
        for node, _ in todo.pop().next_functions:
            if node is None:
                continue
            if type(node).__name__ == "AccumulateGrad":
                edges[id(node.variable)] += 1
            elif node not in seen:
                seen.add(node)
                todo.append(node)
    return edges
