"""Whether a model refuses at all: the score means nothing on one that does not."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest
import torch
from toy_tokenizers import STYLES, toy_tokenizer

from gradshield_fast import safety
from gradshield_fast.answers import AnswerEncoder
from gradshield_fast.batches import padded_batch
from gradshield_fast.errors import UnalignedModelError
from gradshield_fast.packing import pack
from gradshield_fast.response_logprob import answer_means, token_logprobs
from gradshield_fast.safety import SafetyReport, check_aligned, safety_gradient, safety_score
from tests.toy_safety import PROBES, mean_logprob, state, toy_model


@pytest.fixture
def tokenizer() -> Any:
    return toy_tokenizer(STYLES["chatml"][0], eos="<|im_end|>")


@pytest.fixture(scope="module")
def taught() -> tuple[Any, Any]:
    """A toy that has learnt to refuse its probes, all with one wording."""
    toy = toy_tokenizer(STYLES["chatml"][0], eos="<|im_end|>")
    model = toy_model(dtype=torch.float32).eval()
    encoder = AnswerEncoder(toy)
    rows = [(i, encoder.encode(p, PROBES.refusals[0], "row")) for i, p in enumerate(PROBES.prompts)]
    (batch,) = pack(rows, batch_tokens=4096)
    padded = padded_batch(vars(batch), torch.device("cpu"), None)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        (-token_logprobs(model, padded)[0].mean()).backward()
        optimizer.step()
    return model, toy


def test_a_model_that_refuses_is_told_from_one_that_does_not(taught: tuple[Any, Any], tokenizer: Any):
    model, toy = taught
    report = safety_score(model, toy, PROBES, score="refusal_logprob")
    assert report.refusal_rate == 1
    assert report.judged == 3
    assert report.aligned
    assert report.margin > 1
    _, report = safety_gradient(model, toy, PROBES, score="refusal_logprob")
    assert report.aligned
    assert not report.allow_unaligned
    assert report.refusals == PROBES.refusals[:1]
    assert report.compliance_cosine is not None
    assert report.compliance_cosine > 0.2
    report = safety_score(toy_model(), tokenizer, PROBES, score="refusal_logprob")
    assert report.refusal_rate == 0
    assert not report.aligned


def test_an_unaligned_model_costs_no_pass_over_the_answers(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    measured = []
    monkeypatch.setattr(safety, "answer_means", lambda *a: measured.append(a) or answer_means(*a))
    model = toy_model()
    before = json.dumps(state(model), default=str)
    with pytest.raises(UnalignedModelError) as error:
        safety_gradient(model, tokenizer, PROBES, score="refusal_logprob")
    assert not measured
    assert json.dumps(state(model), default=str) == before
    for words in ("refuses 0% of 3 probes", "needed: 50%", "--score refusal_margin", "--allow-unaligned"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    _, report = safety_gradient(model, tokenizer, PROBES, score="refusal_logprob", allow_unaligned=True)
    assert report.to_dict()["allow_unaligned"] is True
    assert report.to_dict()["aligned"] is False
    _, report = safety_gradient(model, tokenizer, PROBES, score="refusal_margin")
    assert report.to_dict()["allow_unaligned"] is False


@pytest.mark.parametrize(
    ("rate", "cosine", "score", "allowed", "message"),
    [
        (0.0, 0.6, "refusal_logprob", False, "refuses 0% of 32"),
        (0.49, None, "refusal_logprob", False, "refuses 49% of 32"),
        (0.5, None, "refusal_logprob", False, None),
        (1.0, 0.2, "refusal_logprob", False, None),
        (1.0, 0.19, "refusal_logprob", False, r"cosine 0\.19, needed: 0\.2"),
        (1.0, -0.5, "refusal_logprob", False, "add its wording"),
        (0.0, -0.5, "refusal_logprob", True, None),
        (0.0, -0.5, "refusal_margin", False, None),
    ],
)
def test_check_aligned(rate: float, cosine: float | None, score: str, allowed: bool, message: str | None):
    report = SafetyReport(score, -1.0, (-1.0,), (-2.0,), ("No.",), rate, 32, 1.0, 1, 9, cosine)
    assert json.loads(json.dumps(report.to_dict()))["refusal_rate"] == rate
    if message:
        with pytest.raises(UnalignedModelError, match=message):
            check_aligned(report, score, allowed)
    else:
        check_aligned(report, score, allowed)


def test_a_wording_that_is_not_the_models_own_is_refused(taught: tuple[Any, Any]):
    foreign = dataclasses.replace(PROBES, own_refusals=("This is not it.", "No, so long.", "Classify it."))
    with pytest.raises(UnalignedModelError, match="not worded as this model"):
        safety_gradient(*taught, foreign, score="refusal_logprob")
    _, report = safety_gradient(*taught, foreign, score="refusal_logprob", allow_unaligned=True)
    assert report.refusals == ()
    assert report.allow_unaligned


def test_the_cosine_is_that_of_what_compliance_teaches(taught: tuple[Any, Any]):
    model, toy = taught
    gradient, report = safety_gradient(model, toy, PROBES, score="refusal_logprob", weights="mlp", allow_unaligned=True)
    model.zero_grad()
    loss = -sum(mean_logprob(model, toy, p, PROBES.compliance_of(i)) for i, p in enumerate(PROBES.prompts))
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    taught_by_compliance = torch.cat([model.get_parameter(name).grad.flatten() for name in gradient])
    model.zero_grad()
    r = torch.cat([g.flatten() for g in gradient.values()])
    want = torch.cosine_similarity(taught_by_compliance, r, dim=0).item()
    assert report.compliance_cosine is not None
    assert math.isclose(report.compliance_cosine, want, rel_tol=1e-3)
    assert safety_gradient(model, toy, PROBES, score="refusal_margin")[1].compliance_cosine is None


def test_only_some_of_many_probes_are_judged(taught: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safety, "JUDGED", 2)
    report = safety_score(*taught, PROBES, score="refusal_logprob")
    assert report.judged == 2
    assert report.probes == 3
