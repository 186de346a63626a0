"""The proxy safety score S(theta) of a model, its gradient, and whether it means anything on the model at hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from gradshield_fast.answers import AnswerEncoder
from gradshield_fast.batches import padded_batch
from gradshield_fast.capture import frozen
from gradshield_fast.chat import Encoded
from gradshield_fast.errors import InputError
from gradshield_fast.fused_answers import FusedAnswers, fused_answers
from gradshield_fast.losses import eager_experts
from gradshield_fast.packing import pack
from gradshield_fast.probes import SafetyProbes
from gradshield_fast.refusal import refuses
from gradshield_fast.response_logprob import answer_means, place_of
from gradshield_fast.safety_report import SafetyReport, check_aligned, check_rate
from gradshield_fast.weight_gradients import GradientCosine, GradientSum, chosen_weights, each_gradient

__all__ = ["SafetyProbes", "SafetyReport", "check_aligned", "safety_gradient", "safety_score"]

SCORES = ("refusal_logprob", "refusal_margin", "compliance_logprob")

JUDGED = 32
"""Probes, spread over all, whose greedy answer is judged: it bounds the cost, and the rate to steps of 3 %."""

COMPARED = 12
"""Probes, spread over all, on which the wordings of a refusal are compared."""

COSINE_ROWS = 16
"""Answers whose gradients are averaged before the cosine is taken, whatever the batches of the rest."""

Progress = Callable[[int, int], None]


def safety_score(
    model: torch.nn.Module,
    tokenizer: Any,
    probes: SafetyProbes,
    *,
    score: str = "refusal_margin",
    batch_tokens: int = 2048,
    refusals_per_probe: int = 1,
    progress: Progress | None = None,
) -> SafetyReport:
    """Measure how likely a model is to refuse its probes; forward passes only.

        refusal_logprob    S = mean over probes p of  R(p) = mean over t of log p(refusal_t | p, refusal_<t)
        refusal_margin     S = mean over probes p of  R(p) - C(p),  C the same for a compliant opening
        compliance_logprob S = mean over probes p of  -C(p)

    Unless a probe brings its own refusal, `refusal_logprob` measures the wording that the model itself favours, the
    largest mean R on a few of the probes: among several, its gradient tells wordings apart instead of refusal from
    compliance. `refusal_margin` has the compliant answer to tell apart from, and deals all wordings to the probes in
    turn, so that none of them counts by its own words. Only the words of an answer count, never the end of the turn.
    Whether the model refuses is read off its own greedy answers, see `gradshield_fast.refusal`; the log-probability of
    given words does not tell.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        probes: what to ask, and how a refusal and compliance read.
        score: which of them is `S`; R and C are measured for all.
        batch_tokens: tokens a forward pass may hold, padding included; a longer probe goes alone.
        refusals_per_probe: how many wordings are measured on each probe; R is their mean.
        progress: called with (answers done, answers in all): compared, judged and measured ones.

    Returns:
        The report.

    Raises:
        InputError: an option is wrong, a probe cannot be encoded, or a log-probability is not finite.

    Source: arXiv:2605.14194 (S as the log-probability of refusals); the margin and the choice of wording are ours.
    """
    with frozen(model), eager_experts(model), torch.no_grad():
        meter = Meter(model, tokenizer, probes, score, batch_tokens, refusals_per_probe, progress)
        rate = meter.judge()
        refusals, compliances = meter.refusals(), meter.compliances()
        values = meter.measure(refusals), meter.measure(compliances)
    return meter.report(rate, refusals, compliances, *values)


def safety_gradient(
    model: torch.nn.Module,
    tokenizer: Any,
    probes: SafetyProbes,
    *,
    score: str = "refusal_margin",
    weights: str | None = None,
    batch_tokens: int = 2048,
    refusals_per_probe: int = 1,
    allow_unaligned: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, torch.Tensor], SafetyReport]:
    """Take the gradient of the safety score with respect to the weights: the reference direction r = grad S.

    For `refusal_logprob` the model is checked (`check_aligned`): that it refuses, before any backward pass; and with
    one more pass over the compliant answers that training on them would lower S. Gradients are summed over batches in
    float32, whatever the model's dtype, and each weight's own gradient is freed as soon as it is added. The model's
    modes, flags and gradients are as before when this returns or raises.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        probes: what to ask, and how a refusal and compliance read.
        score: one of `SCORES`, see `safety_score`.
        weights: regular expression, searched in the names of `model.named_parameters()`; a tied weight is found under
            each of its names. None: the weights that require grad where others do not (PEFT), else all.
        batch_tokens: tokens a pass may hold, padding included; a longer probe goes alone.
        refusals_per_probe: how many wordings are measured on each probe; R is their mean.
        allow_unaligned: go on where `check_aligned` would raise; the report says so.
        progress: called with (answers done, answers in all): compared, judged and measured ones.

    Returns:
        Weight's name -> Float32[Tensor, "<the weight's shape>"] on the weight's device, in nats/token/weight (float64
        for a float64 weight), and the report. A selected weight that S does not reach is in the report, not in the
        gradient.

    Raises:
        UnalignedModelError: `refusal_logprob` would mislead on this model.
        InputError: an option is wrong, a probe cannot be encoded, no weight matches, or the gradient is zero or not
            finite.

    Source: arXiv:2605.14194.
    """
    chosen = chosen_weights(model, weights)
    total, cosine = GradientSum(), None
    with frozen(model), eager_experts(model):
        with torch.no_grad():
            meter = Meter(model, tokenizer, probes, score, batch_tokens, refusals_per_probe, progress)
            rate = meter.judge()
            check_rate(*rate, score, allow_unaligned)
            refusals, compliances = meter.refusals(), meter.compliances()
            meter.fuse(refusals[:COMPARED], chosen.values())
            values = meter.measure(refusals) if score == "compliance_logprob" else []
        with torch.enable_grad(), each_gradient(chosen, total):
            if score != "compliance_logprob":
                values = meter.measure(refusals, sign=1)
            if score != "refusal_logprob":
                rest = meter.measure(compliances, sign=-1)
        gradient = {name: total.sums[name].div_(len(probes)) for name in chosen if name in total.sums}
        check_gradient(gradient, score)
        if score == "refusal_logprob":
            cosine = GradientCosine(gradient)
            with torch.enable_grad(), each_gradient(chosen, cosine):
                rest, cosine = meter.measure_cosine(compliances, cosine)
    report = dataclasses.replace(
        meter.report(rate, refusals, compliances, values, rest),
        compliance_cosine=cosine,
        allow_unaligned=allow_unaligned and score == "refusal_logprob",
        unused_weights=tuple(name for name in chosen if name not in gradient),
    )
    check_aligned(report, score, allow_unaligned)
    return gradient, report


@dataclass(frozen=True)
class Answer:
    """One prompt with one answer; share is its part in the mean over the probe's answers."""

    probe: int
    share: float
    encoded: Encoded


class Meter:
    """Measures answers to one model's probes; the model is frozen and in evaluation mode.

    Attributes:
        fused: what runs head and loss in one where gradients are taken; None: the model's own head.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: Any,
        probes: SafetyProbes,
        score: str,
        batch_tokens: int,
        per_probe: int,
        progress: Progress | None,
        passes: int = 1,
    ) -> None:
        """Check the options and count the answers that will be measured.

        Args:
            model: the model.
            tokenizer: its tokenizer.
            probes: what to ask.
            score: which score the gradient is of.
            batch_tokens: tokens a pass may hold.
            per_probe: wordings that are measured on each probe.
            progress: called with (answers done, answers in all).
            passes: how often the answers that make up the score are gone through.

        Raises:
            InputError: an option is wrong.
        """
        if score not in SCORES:
            raise InputError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
        if per_probe < 1:
            raise InputError(f"refusals_per_probe must be at least 1, got {per_probe}")
        self._model, self._tokenizer, self._probes, self._score = model, tokenizer, probes, score
        self._batch_tokens, self._progress = batch_tokens, progress
        self._device, self._vocabulary = place_of(model)
        self._encoder = AnswerEncoder(tokenizer)
        self.fused: FusedAnswers | None = None
        self._used: tuple[str, ...] = ()
        self._per_probe = min(per_probe, len(probes.refusals))
        self._own = [probes.own_refusals[i] if probes.own_refusals else "" for i in range(len(probes))]
        deals = score != "refusal_logprob"
        self._compares = not deals and self._per_probe < len(probes.refusals) and not all(self._own)
        self._done = 0
        self._total = min(JUDGED, len(probes)) + len(probes)
        refusals = sum(1 if own else self._per_probe for own in self._own)
        self._total += refusals * (1 if score == "compliance_logprob" else passes)
        self._total += (passes - 1) * (len(probes) if deals else 0)
        self._total += min(COMPARED, len(probes)) * len(probes.refusals) if self._compares else 0

    def judge(self) -> tuple[float, int]:
        """Refusal rate, and the number of probes that it is taken over."""
        some = self._probes.subset(min(JUDGED, len(self._probes)))
        wordings = [*some.refusals, *filter(None, some.own_refusals)]
        starts = [self._encoder.start(prompt, wordings[0], _quoted(prompt)) for prompt in some.prompts]
        refused = refuses(self._model, self._tokenizer, starts, wordings, batch_tokens=self._batch_tokens)
        self.step(len(some))
        return sum(refused) / len(some), len(some)

    def refusals(self) -> list[Answer]:
        """The refusals to measure: each probe's own, or those that the model favours, or all of them in turn."""
        wordings = self._probes.refusals
        if self._compares:
            prompts = self._probes.subset(min(COMPARED, len(self._probes))).prompts
            tries = [self._answer(i, p, w) for i, w in enumerate(wordings) for p in prompts]
            values = self.measure(tries)
            means = [math.fsum(values[i : i + len(prompts)]) for i in range(0, len(tries), len(prompts))]
            wordings = tuple(w for _, w in sorted(zip(means, wordings, strict=True), key=lambda pair: -pair[0]))
        count = self._per_probe
        deals = self._score != "refusal_logprob"
        if not all(self._own):
            self._used = wordings if deals else wordings[:count]
        answers = []
        for i, (prompt, own) in enumerate(zip(self._probes.prompts, self._own, strict=True)):
            turn = [wordings[(i * count + j) % len(wordings)] for j in range(count)] if deals else self._used
            texts = (own,) if own else turn
            answers += [self._answer(i, prompt, text, 1 / len(texts)) for text in texts]
        return answers

    def compliances(self) -> list[Answer]:
        """The compliant openings to measure, dealt to the probes in turn."""
        prompts = enumerate(self._probes.prompts)
        return [self._answer(i, prompt, self._probes.compliance_of(i)) for i, prompt in prompts]

    def measure(self, answers: Sequence[Answer], *, sign: int = 0) -> list[float]:
        """Mean log-probability of each answer's tokens; with a sign, a backward pass a batch of sign * sum of them.

        The mean over probes is taken by the caller, in float32: small factors would underflow in a float16 backward.
        """
        values = [math.nan] * len(answers)
        items = ((i, answer.encoded) for i, answer in enumerate(answers))
        for batch in pack(items, batch_tokens=self._batch_tokens, window=max(1, len(answers))):
            means = self._means(vars(batch))
            if sign and means.requires_grad:
                shares = means.new_tensor([sign * answers[i].share for i in batch.positions])
                (means * shares).sum().backward()
            for i, value in zip(batch.positions.tolist(), means.detach().tolist(), strict=True):
                values[i] = _finite(value)
            self.step(len(means))
        return values

    def trial(self, answer: Answer) -> torch.Tensor:
        """One answer's mean log-probability, with its graph where gradients are on; it does not count as done."""
        (batch,) = pack([(0, answer.encoded)], batch_tokens=self._batch_tokens)
        return self._means(vars(batch))

    def fuse(self, answers: Sequence[Answer], weights: Collection[torch.Tensor]) -> None:
        """Run head and loss in one from now on, where that gives the same and the head's gradient is not asked for.

        Args:
            answers: a few answers to compare on.
            weights: the weights whose gradient autograd is to bring.
        """
        (batch,) = pack(enumerate(a.encoded for a in answers), batch_tokens=1 << 62, window=len(answers))
        found = fused_answers(self._model, padded_batch(vars(batch), self._device, self._vocabulary))
        if found is not None and not any(found.head.module.weight is weight for weight in weights):
            self.fused = found

    def measure_cosine(self, answers: Sequence[Answer], cosine: GradientCosine) -> tuple[list[float], float]:
        """As `measure`, and the mean cosine of their losses' gradients with the direction."""
        values, cosines = [math.nan] * len(answers), []
        items = ((i, answer.encoded) for i, answer in enumerate(answers))
        packed = pack(items, batch_tokens=self._batch_tokens, window=max(1, len(answers)), max_rows=COSINE_ROWS)
        for batch in packed:
            means = self._means(vars(batch))
            if means.requires_grad:
                (-means.sum()).backward()
            cosines += [cosine.finish()] * len(means)
            for i, value in zip(batch.positions.tolist(), means.detach().tolist(), strict=True):
                values[i] = _finite(value)
            self.step(len(means))
        return values, math.fsum(cosines) / len(cosines)

    def report(
        self,
        rate: tuple[float, int],
        refusals: Sequence[Answer],
        compliances: Sequence[Answer],
        refusal_values: Sequence[float],
        compliance_values: Sequence[float],
    ) -> SafetyReport:
        """Put the measured values together."""
        n = len(self._probes)
        refusal = [0.0] * n
        for answer, value in zip(refusals, refusal_values, strict=True):
            refusal[answer.probe] += answer.share * value
        margin = math.fsum(r - c for r, c in zip(refusal, compliance_values, strict=True)) / n
        means = {
            "refusal_logprob": math.fsum(refusal) / n,
            "refusal_margin": margin,
            "compliance_logprob": -math.fsum(compliance_values) / n,
        }
        return SafetyReport(
            score=self._score,
            S=means[self._score],
            refusal_logprob=tuple(refusal),
            compliance_logprob=tuple(compliance_values),
            refusals=self._used,
            refusal_rate=rate[0],
            judged=rate[1],
            margin=margin,
            probes=n,
            tokens=sum(len(answer.encoded.input_ids) for answer in (*refusals, *compliances)),
        )

    def _answer(self, probe: int, prompt: str, text: str, share: float = 1.0) -> Answer:
        return Answer(probe, share, self._encoder.encode(prompt, text, _quoted(prompt)))

    def _means(self, batch: dict[str, Any]) -> torch.Tensor:
        padded = padded_batch(batch, self._device, self._vocabulary)
        if self.fused is not None and torch.is_grad_enabled():
            return self.fused.means(padded)
        return answer_means(self._model, padded)

    def step(self, count: int) -> None:
        """Count answers as done."""
        self._done += count
        if self._progress is not None:
            self._progress(self._done, self._total)


def _finite(value: float) -> float:
    if math.isfinite(value):
        return value
    raise InputError(
        f"the model's log-probability of an answer to a probe is {value}; load the model in float32 or bfloat16, "
        "and check that its weights are whole"
    )


def _quoted(prompt: str) -> str:
    return f"probe {prompt[:40]!r}"


def check_gradient(gradient: Mapping[str, torch.Tensor], score: str) -> None:
    """Refuse a gradient that says nothing.

    Args:
        gradient: weight's name -> gradient, or one side of its factors.
        score: the score that it is of.

    Raises:
        InputError: it is zero or not finite.
    """
    for name, g in gradient.items():
        if not bool(torch.isfinite(g).all()):
            raise InputError(
                f"{score}: its gradient has NaN or infinite values in weight '{name}'; "
                "load the model in float32 or bfloat16"
            )
    if not any(bool(g.any()) for g in gradient.values()):
        raise InputError(
            f"{score}: its gradient is zero in every selected weight; select weights that the answers depend on"
        )
