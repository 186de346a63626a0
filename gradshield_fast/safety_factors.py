"""The gradient of the safety score as low-rank factors, from several passes over the probes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from gradshield_fast.capture import frozen
from gradshield_fast.direction import Entry
from gradshield_fast.errors import InputError
from gradshield_fast.fused_answers import FusedAnswers
from gradshield_fast.head_sketch import add_head
from gradshield_fast.losses import eager_experts
from gradshield_fast.lowrank import factor
from gradshield_fast.probes import SafetyProbes
from gradshield_fast.rangefinder import Found, RangeFinder, SketchedCosine, residual_of
from gradshield_fast.safety import COMPARED, Meter, Progress, check_gradient
from gradshield_fast.safety_report import SafetyReport, check_aligned, check_rate
from gradshield_fast.sketches import Sketch, Use, confirmed, uses_of
from gradshield_fast.weight_gradients import GradientSum, chosen_weights, each_gradient


@dataclass(frozen=True)
class SafetyFactors:
    """What `safety_factors` found.

    Attributes:
        entries: weight's name -> `LowRank`, or Float32 tensor of the weight's shape.
        residual: relative Frobenius norm of what the factors drop, over all weights: an estimate.
        residual_error: the estimate's standard error.
        residuals: the same estimate for each low-rank entry.
    """

    entries: dict[str, Entry]
    residual: float
    residual_error: float
    residuals: dict[str, float]


def safety_factors(
    model: torch.nn.Module,
    tokenizer: Any,
    probes: SafetyProbes,
    *,
    rank: int = 16,
    passes: int = 3,
    score: str = "refusal_margin",
    weights: str | None = None,
    batch_tokens: int = 2048,
    refusals_per_probe: int = 1,
    allow_unaligned: bool = False,
    progress: Progress | None = None,
) -> tuple[SafetyFactors, SafetyReport]:
    """Take the gradient of the safety score as factors of a given rank, never holding a matrix weight's gradient.

    As `safety_gradient` followed by `Direction.low_rank(rank)`, with the range finder of `gradshield_fast.rangefinder`
    in place of the gradient: the model stays frozen, hooks add what each layer's (a, g) gives to a few columns, and
    the answers that make up S are gone through `passes` times. What is dropped is estimated from random columns kept
    apart for it. The sums run in float32, from the activations and output gradients as the model computes them, so
    that a half-precision model's gradient is not rounded once more.

    Vectors (norms, biases) and stacks of matrices (experts) keep their exact gradient, and so does a matrix for which
    factors would take no less memory, or that is used otherwise than by linear, Conv1D or embedding modules (see
    `gradshield_fast.sketches.confirmed`); the report names all of these but the vectors. A matrix among them is
    compressed afterwards where that saves memory.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        probes: what to ask, and how a refusal and compliance read.
        rank: columns of the factors of each weight, at most.
        passes: how often the answers are gone through, at least 2. Two give the range finder alone; each further one
            is half a power iteration.
        score: as for `safety_gradient`.
        weights: as for `safety_gradient`.
        batch_tokens: as for `safety_gradient`.
        refusals_per_probe: as for `safety_gradient`.
        allow_unaligned: as for `safety_gradient`.
        progress: as for `safety_gradient`; every pass counts.

    Returns:
        The factors, and the report.

    Raises:
        UnalignedModelError: `refusal_logprob` would mislead on this model.
        InputError: an option is wrong, a probe cannot be encoded, no weight matches, or the gradient is zero or not
            finite.

    Source: arXiv:2605.14194 (r = grad S), arXiv:0909.4061 (the range finder).
    """
    if passes < 2 or rank < 1:
        raise InputError(f"low-rank factors need rank >= 1 and passes >= 2, got rank {rank} and {passes} passes")
    chosen = chosen_weights(model, weights)
    favoured = score == "refusal_logprob"
    complies = score == "compliance_logprob"
    total, cosine = GradientSum(), None
    with frozen(model), eager_experts(model):
        with torch.no_grad():
            meter = Meter(model, tokenizer, probes, score, batch_tokens, refusals_per_probe, progress, passes)
            rate = meter.judge()
            check_rate(*rate, score, allow_unaligned)
            refusals, compliances = meter.refusals(), meter.compliances()
        large = {name: w for name, w in chosen.items() if w.ndim == 2 and rank * sum(w.shape) < w.numel()}
        uses = confirmed(uses_of(model, large), large, lambda: meter.trial(refusals[0]))
        with torch.no_grad():
            meter.fuse(refusals[:COMPARED], [w for name, w in chosen.items() if name not in uses])
        head = _Head(meter.fused, chosen)
        uses = head.without(uses)
        whole = {name: w for name, w in chosen.items() if name not in uses}
        finder = RangeFinder(model, {name: chosen[name] for name in uses}, uses, rank)
        rest: list[float] = []
        with torch.no_grad():
            values = meter.measure(refusals) if complies else []
        with torch.enable_grad():
            for i in range(passes if uses else 1):
                with (
                    finder.next_pass() as sketches,
                    head.listening(sketches),
                    each_gradient(whole if i == 0 else {}, total),
                ):
                    if not complies:
                        values = meter.measure(refusals, sign=1)
                    if not favoured:
                        rest = meter.measure(compliances, sign=-1)
        if not uses:
            meter.step((passes - 1) * ((0 if complies else len(values)) + len(rest)))
        found = finder.result(1 / len(probes))
        exact = {name: total.sums[name].div_(len(probes)) for name in whole if name in total.sums}
        check_gradient({**exact, **{name: f.factors.p for name, f in found.items()}}, score)
        if favoured:
            cosine = SketchedCosine(model, uses, exact, {name: f.factors for name, f in found.items()})
            with (
                torch.enable_grad(),
                cosine.listening() as sketches,
                head.listening(sketches),
                each_gradient(whole, cosine),
            ):
                rest, cosine = meter.measure_cosine(compliances, cosine)
    report = dataclasses.replace(
        meter.report(rate, refusals, compliances, values, rest),
        compliance_cosine=cosine,
        allow_unaligned=allow_unaligned and favoured,
        unused_weights=tuple(name for name in chosen if name not in exact and name not in found),
        dense_weights=tuple(name for name in exact if exact[name].ndim > 1),
    )
    check_aligned(report, score, allow_unaligned)
    return _gather(chosen, exact, found, rank), report


class _Head:
    """The fused head, if there is one: its use of its weight is sketched from the hidden states, not by a hook."""

    def __init__(self, fused: FusedAnswers | None, chosen: Mapping[str, torch.nn.Parameter]) -> None:
        self._fused = fused
        weight = None if fused is None else fused.head.module.weight
        self._name = next((name for name, w in chosen.items() if w is weight), None)

    def without(self, uses: Mapping[str, Sequence[Use]]) -> dict[str, list[Use]]:
        """Leave the head out of the modules that are hooked."""
        module = None if self._fused is None else self._fused.head.module
        return {name: [use for use in owners if use.module is not module] for name, owners in uses.items()}

    @contextmanager
    def listening(self, sketches: Mapping[str, Sketch]) -> Iterator[None]:
        """Add the head's use of its weight in every backward pass inside."""
        sketch = None if self._name is None else sketches.get(self._name)
        if self._fused is None or sketch is None:
            yield
            return
        head = self._fused.head
        self._fused.listen = lambda h, labels, token_weight: add_head(
            sketch, h, head.module.weight, labels, token_weight, scale=head.scale, softcap=head.softcap
        )
        try:
            yield
        finally:
            self._fused.listen = None


def _gather(
    names: Iterable[str], exact: Mapping[str, torch.Tensor], found: Mapping[str, Found], rank: int
) -> SafetyFactors:
    """Put all entries together, and what they drop; a whole matrix is compressed here where that saves memory."""
    found, entries = dict(found), {}
    square = 0.0
    for name in names:
        if name in exact:
            entry = exact[name]
            norm_sq = float(entry.double().square().sum())
            if entry.ndim == 2 and norm_sq > 0 and rank * sum(entry.shape) < entry.numel():
                found[name] = Found(*factor(entry, rank=rank, energy=None), 0.0)
            else:
                entries[name], square = entry, square + norm_sq
        if name in found:
            entries[name] = found[name].factors
    residual, error = residual_of(found, square)
    by_name = {name: math.sqrt(f.dropped / f.square) for name, f in found.items() if f.square > 0}
    return SafetyFactors(entries, residual, error, by_name)
