"""The proxy safety score S(theta) of a model, its gradient, and whether it means anything on the model at hand."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch

from gradshield_fast.answers import AnswerEncoder
from gradshield_fast.capture import frozen
from gradshield_fast.chat import Encoded
from gradshield_fast.errors import InputError, UnalignedModelError
from gradshield_fast.losses import eager_experts, padded_batch
from gradshield_fast.packing import pack
from gradshield_fast.probes import SafetyProbes
from gradshield_fast.refusal import refuses
from gradshield_fast.response_logprob import place_of, token_logprobs

__all__ = ["SafetyProbes", "SafetyReport", "check_aligned", "safety_gradient", "safety_score"]

SCORES = ("refusal_logprob", "refusal_margin")

ALIGNED_RATE = 0.5
"""A model that refuses fewer of its probes is not aligned enough for `refusal_logprob`."""

JUDGED = 32
"""Probes, spread over all, whose greedy answer is judged: it bounds the cost, and the rate to steps of 3 %."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SafetyReport:
    """What the probes say about a model.

    Attributes:
        score: "refusal_logprob" or "refusal_margin".
        S: that score, in nats a token.
        refusal_logprob: mean log-probability of a refusal's tokens, for each probe, in nats a token.
        compliance_logprob: the same for a compliant opening.
        refusal_rate: share of the judged probes to which the model's own greedy answer begins with a refusal.
        judged: number of judged probes, spread evenly over all of them.
        margin: mean over probes of refusal_logprob - compliance_logprob.
        probes: number of probes.
        tokens: tokens of all prompts and answers whose log-probability was measured.
        allow_unaligned: the gradient was taken whatever the refusal rate said.
        unused_weights: weights that were selected but that S does not reach; they are not in the gradient.
    """

    score: str
    S: float
    refusal_logprob: tuple[float, ...]
    compliance_logprob: tuple[float, ...]
    refusal_rate: float
    judged: int
    margin: float
    probes: int
    tokens: int
    allow_unaligned: bool = False
    unused_weights: tuple[str, ...] = ()

    @property
    def aligned(self) -> bool:
        """Whether the model refuses its probes often enough for `refusal_logprob`."""
        return self.refusal_rate >= ALIGNED_RATE

    def to_dict(self) -> dict[str, Any]:
        """Give the report as JSON values.

        Returns:
            Its attributes, and "aligned".
        """
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {**values, "aligned": self.aligned}


@dataclass(frozen=True)
class _Answer:
    """One prompt with one answer: share is its part in the mean over probes."""

    probe: int
    refuses: bool
    share: float
    encoded: Encoded


def safety_score(
    model: torch.nn.Module,
    tokenizer: Any,
    probes: SafetyProbes,
    *,
    score: str = "refusal_logprob",
    batch_tokens: int = 2048,
    refusals_per_probe: int = 1,
    progress: Progress | None = None,
) -> SafetyReport:
    """Measure how likely a model is to refuse its probes; forward passes only.

        refusal_logprob   S = mean over probes p of  R(p) = mean over t of log p(refusal_t | p, refusal_<t)
        refusal_margin    S = mean over probes p of  R(p) - C(p),  C the same for a compliant opening

    Only the words of the answer count, never the end of the turn. Whether the model refuses is read off its own
    greedy answers, see `gradshield_fast.refusal`: the log-probability of given wordings does not tell.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        probes: what to ask, and how a refusal and compliance read.
        score: "refusal_logprob" or "refusal_margin": which of them is `S`; both are measured.
        batch_tokens: tokens a forward pass may hold, padding included; a longer probe goes alone.
        refusals_per_probe: wordings a probe, whose R are averaged.
        progress: called with (answers done, answers in all): those judged, and those measured.

    Returns:
        The report.

    Raises:
        InputError: an option is wrong, a probe cannot be encoded, or a log-probability is not finite.

    Source: arXiv:2605.14194 (the score as the log-probability of refusals); the margin is ours.
    """
    encoder = AnswerEncoder(tokenizer)
    answers = _answers(encoder, probes, score, refusals_per_probe)
    steps = _Steps(progress, min(JUDGED, len(probes)) + len(answers))
    with frozen(model), eager_experts(model), torch.no_grad():
        judged = _judged(model, tokenizer, encoder, probes, batch_tokens, steps)
        values = _values(model, answers, batch_tokens, steps)
    return _report(score, probes, judged, answers, values)


def safety_gradient(
    model: torch.nn.Module,
    tokenizer: Any,
    probes: SafetyProbes,
    *,
    score: str = "refusal_logprob",
    weights: str | None = None,
    batch_tokens: int = 2048,
    refusals_per_probe: int = 1,
    allow_unaligned: bool = False,
    progress: Progress | None = None,
) -> tuple[dict[str, torch.Tensor], SafetyReport]:
    """Take the gradient of the safety score with respect to the weights: the reference direction r = grad S.

    For `refusal_logprob` the model is checked first, by its own answers, so that a model on which the score would
    mislead costs no backward pass. Gradients are summed over batches in float32, whatever the model's dtype, and each
    weight's own gradient is freed as soon as it is added. The model's modes, flags and gradients are as before when
    this returns or raises.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer.
        probes: what to ask, and how a refusal and compliance read.
        score: "refusal_logprob" or "refusal_margin", see `safety_score`.
        weights: regular expression, searched in the names of `model.named_parameters()`; a tied weight is found under
            each of its names. None: the weights that require grad where others do not (PEFT), else all.
        batch_tokens: tokens a pass may hold, padding included; a longer probe goes alone.
        refusals_per_probe: wordings a probe, whose log-probabilities are averaged.
        allow_unaligned: go on where `check_aligned` would raise; the report says so.
        progress: called with (answers done, answers in all): those judged, and those measured.

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
    chosen = _chosen_weights(model, weights)
    encoder = AnswerEncoder(tokenizer)
    answers = _answers(encoder, probes, score, refusals_per_probe)
    answers.sort(key=lambda a: not a.refuses)  # stable: all refusals, then all compliances
    count = sum(a.refuses for a in answers) if score == "refusal_logprob" else len(answers)
    steps = _Steps(progress, min(JUDGED, len(probes)) + len(answers))
    with frozen(model), eager_experts(model):
        with torch.no_grad():
            judged = _judged(model, tokenizer, encoder, probes, batch_tokens, steps)
            _check_rate(judged, score, allow_unaligned)
            rest = _values(model, answers[count:], batch_tokens, steps)
        with torch.enable_grad(), _summed_gradients(chosen) as sums:
            values = _values(model, answers[:count], batch_tokens, steps, backward=True)
    report = _report(score, probes, judged, answers, values + rest)
    gradient = {name: sums[name].div_(len(probes)) for name in chosen if name in sums}
    _check_gradient(gradient, score)
    unused = tuple(name for name in chosen if name not in gradient)
    allowed = allow_unaligned and score == "refusal_logprob"
    return gradient, dataclasses.replace(report, unused_weights=unused, allow_unaligned=allowed)


def check_aligned(report: SafetyReport, score: str, allow_unaligned: bool = False) -> None:
    """Refuse a score that would mislead on this model.

    Args:
        report: what the probes said.
        score: the score that is to be used; `refusal_margin` is valid on any model.
        allow_unaligned: say nothing.

    Raises:
        UnalignedModelError: the model does not refuse its probes, and the score needs it to.
    """
    _check_rate((report.refusal_rate, report.judged), score, allow_unaligned)


def _check_rate(judged: tuple[float, int], score: str, allow_unaligned: bool) -> None:
    rate, count = judged
    if score != "refusal_logprob" or allow_unaligned or rate >= ALIGNED_RATE:
        return
    raise UnalignedModelError(
        f"this model refuses {rate:.0%} of {count} probes (needed: {ALIGNED_RATE:.0%}), and on a model that does not "
        "refuse, refusal_logprob can rank harmful rows as the safest; use --score refusal_margin, which works on such "
        "a model, or --allow-unaligned to go on and have the record say so"
    )


class _Steps:
    """Counts measured answers for a progress callback."""

    def __init__(self, callback: Progress | None, total: int) -> None:
        self.callback, self.total, self.done = callback, total, 0

    def add(self, count: int) -> None:
        self.done += count
        if self.callback is not None:
            self.callback(self.done, self.total)


def _answers(encoder: AnswerEncoder, probes: SafetyProbes, score: str, per_probe: int) -> list[_Answer]:
    if score not in SCORES:
        raise InputError(f"score must be one of {', '.join(SCORES)}; got {score!r}")
    if per_probe < 1:
        raise InputError(f"refusals_per_probe must be at least 1, got {per_probe}")
    answers = []
    for i, prompt in enumerate(probes.prompts):
        refusals = probes.refusals_of(i, per_probe)
        for text in refusals:
            answers.append(_Answer(i, True, 1 / len(refusals), encoder.encode(prompt, text, f"probe {i + 1}")))
        answers.append(_Answer(i, False, 1.0, encoder.encode(prompt, probes.compliance_of(i), f"probe {i + 1}")))
    return answers


def _judged(
    model: torch.nn.Module,
    tokenizer: Any,
    encoder: AnswerEncoder,
    probes: SafetyProbes,
    batch_tokens: int,
    steps: _Steps,
) -> tuple[float, int]:
    """Refusal rate, and the number of probes that it is taken over."""
    some = probes.subset(min(JUDGED, len(probes)))
    starts = [encoder.start(prompt, some.refusals[0], f"probe '{prompt[:40]}'") for prompt in some.prompts]
    wordings = [*some.refusals, *filter(None, some.own_refusals)]
    refused = refuses(model, tokenizer, starts, wordings, batch_tokens=batch_tokens)
    steps.add(len(some))
    return sum(refused) / len(some), len(some)


def _values(
    model: torch.nn.Module,
    answers: Sequence[_Answer],
    batch_tokens: int,
    steps: _Steps,
    *,
    backward: bool = False,
) -> list[float]:
    """Mean log-probability of each answer's tokens; with `backward`, a backward pass of sum(+-share * value) a batch.

    The mean over probes is taken by the caller, in float32: small factors would underflow in a float16 backward pass.
    """
    device, vocabulary = place_of(model)
    values = [math.nan] * len(answers)
    items = ((i, answer.encoded) for i, answer in enumerate(answers))
    for batch in pack(items, batch_tokens=batch_tokens, window=max(1, len(answers))):
        padded = padded_batch(vars(batch), device, vocabulary)
        logprob, row = token_logprobs(model, padded)
        member = torch.nn.functional.one_hot(row, padded.rows).to(logprob.dtype)
        # not index_add, which is not deterministic on every device; not a product, in which a NaN would spread
        means = torch.where(member > 0, logprob[:, None], 0.0).sum(0) / member.sum(0)
        if backward and means.requires_grad:
            picks = [answers[i] for i in batch.positions]
            factors = [a.share if a.refuses else -a.share for a in picks]
            (means * means.new_tensor(factors)).sum().backward()
        for i, value in zip(batch.positions.tolist(), means.detach().tolist(), strict=True):
            values[i] = value
        steps.add(padded.rows)
    return values


def _report(
    score: str,
    probes: SafetyProbes,
    judged: tuple[float, int],
    answers: Sequence[_Answer],
    values: Sequence[float],
) -> SafetyReport:
    refusal, compliance = [0.0] * len(probes), [0.0] * len(probes)
    for answer, value in zip(answers, values, strict=True):
        if not math.isfinite(value):
            raise InputError(
                f"probe {answer.probe + 1}: the model's log-probability of its answer is {value}; "
                "load the model in float32 or bfloat16, and check that its weights are whole"
            )
        (refusal if answer.refuses else compliance)[answer.probe] += answer.share * value
    n = len(probes)
    margin = math.fsum(r - c for r, c in zip(refusal, compliance, strict=True)) / n
    return SafetyReport(
        score=score,
        S=margin if score == "refusal_margin" else math.fsum(refusal) / n,
        refusal_logprob=tuple(refusal),
        compliance_logprob=tuple(compliance),
        refusal_rate=judged[0],
        judged=judged[1],
        margin=margin,
        probes=n,
        tokens=sum(len(answer.encoded.input_ids) for answer in answers),
    )


def _chosen_weights(model: torch.nn.Module, pattern: str | None) -> dict[str, torch.nn.Parameter]:
    """Weights to take the gradient for, under their first names."""
    floating = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    if pattern is None:
        trainable = {name: p for name, p in floating.items() if p.requires_grad}
        chosen = trainable or floating
    else:
        try:
            regex = re.compile(pattern)
        except re.error as error:
            raise InputError(f"weights: {pattern!r} is not a regular expression: {error}") from error
        hits = {id(p) for name, p in model.named_parameters(remove_duplicate=False) if regex.search(name)}
        chosen = {name: p for name, p in floating.items() if id(p) in hits}
    if not chosen:
        some = list(floating)[:: max(1, len(floating) // 4)][:5]
        raise InputError(f"weights: no floating-point weight matches {pattern!r}; names are such as {', '.join(some)}")
    return chosen


@contextmanager
def _summed_gradients(weights: dict[str, torch.nn.Parameter]) -> Iterator[dict[str, torch.Tensor]]:
    """Have every backward pass add to float32 sums and free each weight's own gradient at once.

    The weights must be frozen outside; here they require grad. A tied weight's hook fires once a pass, with both
    contributions.
    """
    sums: dict[str, torch.Tensor] = {}

    def adder(name: str) -> Callable[[torch.Tensor], None]:
        def add(weight: torch.Tensor) -> None:
            g, weight.grad = weight.grad, None
            if g is None:
                return
            g = g.to_dense() if g.is_sparse else g
            if name in sums:
                sums[name] += g
            else:
                sums[name] = g if g.dtype == torch.float64 else g.float()

        return add

    before = {name: weight.grad for name, weight in weights.items()}
    handles = []
    try:
        for name, weight in weights.items():
            weight.grad = None
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(adder(name)))
        yield sums
    finally:
        for handle in handles:
            handle.remove()
        for name, weight in weights.items():
            weight.requires_grad_(False)
            weight.grad = before[name]


def _check_gradient(gradient: dict[str, torch.Tensor], score: str) -> None:
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
