"""What the probes said about a model, and whether the score that was asked for means anything on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gradshield_fast.errors import UnalignedModelError

ALIGNED_RATE = 0.5
"""Least share of judged probes that a model must refuse for `refusal_logprob`."""

VALID_COSINE = 0.2
"""Least cosine between `refusal_logprob`'s direction and what compliance teaches, see `SafetyReport`."""


@dataclass(frozen=True)
class SafetyReport:
    """What the probes say about a model.

    Attributes:
        score: one of `safety.SCORES`.
        S: that score, in nats a token.
        refusal_logprob: mean log-probability of a refusal's tokens, for each probe, in nats a token.
        compliance_logprob: the same for a compliant opening.
        refusals: wordings that were measured, the probes' own refusals aside.
        refusal_rate: share of the judged probes to which the model's own greedy answer begins with a refusal.
        judged: number of judged probes, spread evenly over all of them.
        margin: mean over probes of refusal_logprob - compliance_logprob.
        compliance_cosine: cos(grad loss(compliant answers), grad S): what a harmful row would score. Positive: a
            training step on compliance lowers S, as it should. None where it was not measured.
        probes: number of probes.
        tokens: tokens of all prompts and answers that S was measured on.
        allow_unaligned: the gradient was taken whatever the checks said.
        unused_weights: weights that were selected but that S does not reach; they are not in the gradient.
        dense_weights: matrices and larger weights whose gradient was held whole although factors were asked for: no
            rule finds their factors, or factors would take no less memory.
    """

    score: str
    S: float
    refusal_logprob: tuple[float, ...]
    compliance_logprob: tuple[float, ...]
    refusals: tuple[str, ...]
    refusal_rate: float
    judged: int
    margin: float
    probes: int
    tokens: int
    compliance_cosine: float | None = None
    allow_unaligned: bool = False
    unused_weights: tuple[str, ...] = ()
    dense_weights: tuple[str, ...] = ()

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


def check_aligned(report: SafetyReport, score: str, allow_unaligned: bool = False) -> None:
    """Refuse a score that would mislead on this model.

    Two things must hold for `refusal_logprob`, and for the other scores neither: the model refuses, and learning to
    comply lowers the score. The second is what scoring relies on, and does not follow from the first: the gradient of
    a wording that the model would not choose tells wordings apart, not refusal from compliance.

    Measured on SmolLM2-135M-Instruct (stock), fine-tuned to refuse in one wording (one) and in twelve (many), with 84
    probes; AUC of AdvBench rows against GSM8K and instruction rows by benchmarks/replication/separation.py:

        model  wording of the refusals      rate   cosine   AUC
        one    the model's own              1.00   +0.63    1.00
        one    its greedy answers           1.00   +0.49    1.00
        one    the bundled ones in turn     1.00   -0.28    0.00
        many   its greedy answers           1.00   +0.07    0.38
        many   the bundled ones in turn     1.00   -0.15    0.29
        stock  the bundled ones in turn     0.22   -0.15
        one    refusal_margin, in turn      1.00   +0.93    1.00

    Args:
        report: what the probes said; where its cosine is None, only the refusal rate is checked.
        score: the score that is to be used.
        allow_unaligned: say nothing.

    Raises:
        UnalignedModelError: the score would mislead.
    """
    check_rate(report.refusal_rate, report.judged, score, allow_unaligned)
    cosine = report.compliance_cosine
    if score != "refusal_logprob" or allow_unaligned or cosine is None or cosine >= VALID_COSINE:
        return
    raise UnalignedModelError(
        f"this model refuses, but a training step on compliant answers would not lower refusal_logprob (cosine "
        f"{cosine:.2f}, needed: {VALID_COSINE}): the refusals among the probes are not worded as this model's own; add "
        "its wording, or use --score refusal_margin, which does not depend on it, or --allow-unaligned to go on and "
        "have the record say so"
    )


def check_rate(rate: float, judged: int, score: str, allow_unaligned: bool) -> None:
    """Check that the model refuses, which can be known before any gradient is taken.

    Args:
        rate: share of the judged probes that it refuses.
        judged: their number.
        score: the score that is to be used.
        allow_unaligned: say nothing.

    Raises:
        UnalignedModelError: it does not, and the score needs it to.
    """
    if score != "refusal_logprob" or allow_unaligned or rate >= ALIGNED_RATE:
        return
    raise UnalignedModelError(
        f"this model refuses {rate:.0%} of {judged} probes (needed: {ALIGNED_RATE:.0%}), and on a model that does not "
        "refuse, refusal_logprob can rank harmful rows as the safest; use --score refusal_margin, which works on such "
        "a model, or --allow-unaligned to go on and have the record say so"
    )
