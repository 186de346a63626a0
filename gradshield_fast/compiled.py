"""A compiled step: the model's repeated layers through torch.compile, scoring included (taps.py).

One layer is compiled, and its code serves all of them and every batch shape, so that warming up costs one layer and
not the model. Embedding, final norm and head stay with the hooks and the fused loss.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gradshield_fast.batches import PaddedBatch, packed_batch
from gradshield_fast.errors import InputError, ScoringError
from gradshield_fast.layers import ScaleRule
from gradshield_fast.layout import Layout
from gradshield_fast.matrix_rules import MatrixRule
from gradshield_fast.plan import Plan
from gradshield_fast.repeated import reclassed, repeated_layers, with_forward
from gradshield_fast.tally import Tally
from gradshield_fast.taps import Carrier, tapped
from gradshield_fast.universal import CHAIN

SHAPES = 64
"""Versions of one layer's code that may exist: kinds of layers, rows of one, and flags; beyond it torch gives up."""


class CompiledLayers:
    """The compiled layers of one scorer.

    Attributes:
        sites: the tapped sites, which hooks must leave alone.
        weights: weights that they score.
        warm_up: seconds that the first passes took, compiling; 0.0 before.
    """

    def __init__(self, model: nn.Module, plan: Plan) -> None:
        """Find what can be tapped.

        Args:
            model: the model.
            plan: its settled plan.

        Raises:
            InputError: the model has no repeated layers, or one of their weights needs a rule that cannot be tapped.
        """
        self.layers = repeated_layers(model)
        if not self.layers:
            raise InputError("compile: the model has no list of repeated layers of one class; score without compile")
        around = [
            key for keys in plan.sites_of.values() for key in keys if key[1] in CHAIN and _holds(key[0], self.layers)
        ]
        if around:
            raise InputError(
                f"compile: weights {', '.join(plan.weights_at(around[0])[:3])} need the universal rule at "
                f"'{around[0][0] or 'the model'}', which holds the layers; score without compile, or leave them out"
            )
        prefixes = tuple(f"{name}." for name in self.layers)
        inside = [site for site in plan.sites() if site.name in self.layers or site.name.startswith(prefixes)]
        for site in inside:
            rules = [rule for group in site.rules.values() for rule in group]
            if site.universals or not all(isinstance(rule, MatrixRule | ScaleRule) for rule in rules):
                weights = [weight for key in (site.name,) for weight in _weights_of(plan, key)]
                raise InputError(
                    f"compile: weights {', '.join(weights[:3])} need the universal rule, which the compiler cannot "
                    "see through; score without compile, or leave them out of the direction"
                )
        self.sites = inside
        names = [weight for site in inside for weight in _weights_of(plan, site.name)]
        self.weights = list(dict.fromkeys(names))
        uses = plan.expected_uses or {}
        twice = [weight for weight in self.weights if uses.get(weight, 1) > 1 or names.count(weight) > 1]
        if plan.context.norms and twice:
            raise InputError(
                f"compile: norms of weight '{twice[0]}', which is used more than once, need its uses together; score "
                "without compile or without norms"
            )
        self._plan, self._carrier, self.warm_up = plan, Carrier(), 0.0

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Tap and compile the layers.

        Yields:
            Nothing.
        """
        kinds = {layer: _compiled_kind(type(layer)) for layer in self.layers.values()}
        with (
            _kept_code(),
            torch._dynamo.config.patch(recompile_limit=SHAPES, accumulated_recompile_limit=16 * SHAPES),
            tapped(self.sites, self._carrier),
            reclassed(kinds, {}),
        ):
            yield

    @contextmanager
    def batch(self, batch: PaddedBatch, tally: Tally, *, packed: bool) -> Iterator[None]:
        """Set up the carrier for a batch, and hand what it brought to the batch's sums.

        Args:
            batch: the rows.
            tally: the batch's sums.
            packed: whether the rows are packed in a line.

        Yields:
            Nothing; forward and backward pass run inside.
        """
        line = packed_batch(batch) if packed else None
        tokens = batch.rows * batch.tokens if line is None else len(line.place)
        device, carrier = batch.input_ids.device, self._carrier
        carrier.terms = torch.zeros(tokens, self._plan.direction.count, device=device, requires_grad=True)
        bounds = torch.arange(batch.rows + 1, dtype=torch.int32, device=device) * batch.tokens
        carrier.bounds = bounds if line is None else line.cu_seqlens
        if self._plan.context.norms:
            carrier.squares = torch.zeros(batch.rows, device=device, requires_grad=True)
            row_of = torch.repeat_interleave(torch.arange(batch.rows, device=device), carrier.bounds.diff().long())
            carrier.member = torch.nn.functional.one_hot(row_of, batch.rows).T.to(torch.float32).contiguous()
        try:
            yield
            name = ", ".join(self.weights)
            if carrier.terms.grad is not None:
                tally.add(name, carrier.terms.grad, Layout("flat", None) if line is None else Layout("packed", 0))
            if carrier.squares is not None and carrier.squares.grad is not None:
                tally.add_norm_sq(name, carrier.squares.grad)
        finally:
            carrier.terms = carrier.squares = carrier.bounds = carrier.member = None

    @contextmanager
    def warming(self) -> Iterator[None]:
        """Time the first passes, and say what to do where the compiler fails.

        Yields:
            Nothing.

        Raises:
            ScoringError: compiling failed.
        """
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                first = str(error).strip().splitlines()[0]
                raise ScoringError(
                    f"compile: torch.compile failed on {type(next(iter(self.layers.values()))).__name__}: {first}; "
                    "it needs a C++ compiler on the CPU; score without compile"
                ) from error
            raise
        self.warm_up += time.perf_counter() - start


def _weights_of(plan: Plan, module: str) -> list[str]:
    return [weight for weight, keys in plan.sites_of.items() if any(name == module for name, _ in keys)]


def _holds(module: str, layers: Iterable[str]) -> bool:
    return any(not module or layer.startswith(f"{module}.") for layer in layers)


FOLDER = "TORCHINDUCTOR_CACHE_DIR"
_CHOSEN = os.environ.get(FOLDER)
"""The user's folder: read here, since torch writes its own, below /tmp, into the variable as soon as dynamo loads."""


@contextmanager
def _kept_code() -> Iterator[None]:
    """Keep compiled code in the user's cache folder, where it survives a restart, unless another one was chosen."""
    if _CHOSEN is not None:
        yield
        return
    root, before = os.environ.get("XDG_CACHE_HOME"), os.environ.get(FOLDER)
    os.environ[FOLDER] = str((Path(root) if root else Path.home() / ".cache") / "gradshield_fast" / "inductor")
    try:
        yield
    finally:
        if before is None:
            del os.environ[FOLDER]
        else:
            os.environ[FOLDER] = before


_KINDS: dict[type, type] = {}


def _compiled_kind(kind: Any) -> type:
    """The class whose forward is compiled; made once, so that another scorer on the same kind finds it compiled."""
    if kind not in _KINDS:
        _KINDS[kind] = with_forward(kind, torch.compile(kind.forward, dynamic=True))
    return _KINDS[kind]
