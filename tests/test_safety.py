"""S(theta) and its gradient against a plain loop, one answer at a time, and what the model looks like afterwards."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from toy_tokenizers import STYLES, toy_tokenizer

from gradshield_fast.answers import AnswerEncoder
from gradshield_fast.batches import padded_batch
from gradshield_fast.errors import InputError, ScoringError
from gradshield_fast.response_logprob import token_logprobs
from gradshield_fast.safety import SCORES, safety_gradient, safety_score
from tests.toy_safety import PROBES, close, plain_score, state, toy_model


@pytest.fixture
def tokenizer() -> Any:
    return toy_tokenizer(STYLES["chatml"][0], eos="<|im_end|>")


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("per_probe", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
def test_score_is_the_definition(kind: str, per_probe: int, score: str, tokenizer: Any):
    model = toy_model(kind)
    report = safety_score(model, tokenizer, PROBES, score=score, refusals_per_probe=per_probe)
    # models of transformers compute some of this in float32, whatever their dtype
    want = plain_score(model.eval(), tokenizer, score, per_probe).item()
    assert math.isclose(report.S, want, rel_tol=1e-6)
    assert report.probes == len(report.refusal_logprob) == len(report.compliance_logprob) == 3
    assert report.margin == pytest.approx(sum(report.refusal_logprob) / 3 - sum(report.compliance_logprob) / 3)


@pytest.mark.parametrize("batch_tokens", [1, 100, 4096])
def test_score_does_not_depend_on_the_batches(batch_tokens: int, tokenizer: Any):
    model = toy_model()
    want = safety_score(model, tokenizer, PROBES)
    got = safety_score(model, tokenizer, PROBES, batch_tokens=batch_tokens)
    assert got.refusal_logprob == pytest.approx(want.refusal_logprob, rel=1e-6)
    assert got.compliance_logprob == pytest.approx(want.compliance_logprob, rel=1e-6)


@pytest.mark.parametrize("style", sorted(STYLES))
def test_only_the_words_of_an_answer_count(style: str):
    template, options = STYLES[style]
    toy = toy_tokenizer(template, **options)
    for text in (*PROBES.refusals, *PROBES.compliances):
        encoded = AnswerEncoder(toy).encode(PROBES.prompts[0], text, "here")
        measured = [t for t in encoded.labels if t != -100]
        assert toy.decode(measured).strip() == text
        assert encoded.labels[-1] == encoded.input_ids[-1]
        assert encoded.response_tokens == len(measured)
        start = AnswerEncoder(toy).start(PROBES.prompts[0], text, "here")
        assert start + measured == encoded.input_ids


def test_the_head_runs_at_answer_tokens_only(tokenizer: Any):
    model = toy_model().eval()
    batch = padded_batch(
        {"input_ids": torch.arange(1, 13).reshape(2, 6), "labels": torch.tensor([[-100, 2, 3] + [-100] * 3] * 2)},
        torch.device("cpu"),
        None,
    )
    seen = []
    model.lm_head.register_forward_hook(lambda m, a, out: seen.append(tuple(out.shape)))
    values, rows = token_logprobs(model, batch)
    assert seen == [(1, 4, 700)]
    assert rows.tolist() == [0, 0, 1, 1]
    model.get_output_embeddings = lambda: None  # a model whose head cannot be found
    assert torch.equal(token_logprobs(model, batch)[0], values)
    assert seen[-1] == (2, 6, 700)


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning:UserWarning")
def test_a_model_that_adds_tokens_of_its_own_is_refused(tokenizer: Any):
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(toy_model(dtype=torch.float32), config)
    with pytest.raises(ScoringError, match="prompt tuning"):
        safety_score(model, tokenizer, PROBES)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("per_probe", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_gradient_is_that_of_the_definition(tied: bool, per_probe: int, score: str, tokenizer: Any):
    model = toy_model(tied=tied)
    gradient, report = safety_gradient(
        model, tokenizer, PROBES, score=score, refusals_per_probe=per_probe, allow_unaligned=True, batch_tokens=150
    )
    want = plain_score(model.eval(), tokenizer, score, per_probe)
    want.backward()
    assert math.isclose(report.S, want.item(), rel_tol=1e-6)
    assert set(gradient) == {name for name, _ in model.named_parameters()}
    assert report.unused_weights == ()
    for name, weight in model.named_parameters():
        close(gradient[name], weight.grad, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_gradient_is_summed_in_float32(dtype: torch.dtype, tokenizer: Any):
    model = toy_model(dtype=dtype)
    gradient, _ = safety_gradient(
        model, tokenizer, PROBES, score="refusal_logprob", allow_unaligned=True, batch_tokens=1
    )
    want, _ = safety_gradient(model.double(), tokenizer, PROBES, score="refusal_logprob", allow_unaligned=True)
    for name, g in gradient.items():
        assert g.dtype == torch.float32
        close(g.double(), want[name], 1e-4 if dtype == torch.float32 else 0.1)
    flat = torch.cat([g.double().flatten() for g in gradient.values()])
    truth = torch.cat([want[name].flatten() for name in gradient])
    assert float(torch.cosine_similarity(flat, truth, dim=0)) > 0.999


def test_one_weight_gradient_is_alive_at_a_time(tokenizer: Any):
    model = toy_model()
    alive = []
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(
            lambda _: alive.append(sum(p.grad is not None for p in model.parameters()))
        )
    safety_gradient(model, tokenizer, PROBES, score="refusal_margin")
    assert set(alive) == {1}


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_as_before(fails: bool, tokenizer: Any):
    model = toy_model()
    model.model.layers[1].eval()
    model.model.norm.weight.requires_grad_(False)
    own = torch.full_like(model.model.layers[0].mlp.up_proj.weight, 3.0)
    model.model.layers[0].mlp.up_proj.weight.grad = own
    before = state(model)
    calls = []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        # 3 answers are judged, 6 compared, then 3 refusals and 3 compliances measured with a backward pass
        if fails and done > 10:
            raise KeyboardInterrupt

    def run() -> None:
        safety_gradient(
            model, tokenizer, PROBES, score="refusal_logprob", allow_unaligned=True, batch_tokens=1, progress=progress
        )

    if fails:
        with pytest.raises(KeyboardInterrupt):
            run()
    else:
        run()
    assert calls == [(i, 15) for i in range(3, 12 if fails else 16)]
    after = state(model)
    assert model.model.layers[0].mlp.up_proj.weight.grad is own
    for old, new in zip(before, after, strict=True):
        assert json.dumps(old, default=str) == json.dumps(new, default=str)


def test_weights_are_chosen_by_name(tokenizer: Any):
    model = toy_model()
    go = lambda pattern: safety_gradient(model, tokenizer, PROBES, score="refusal_margin", weights=pattern)[0]  # noqa: E731
    whole = go(None)
    some = go(r"layers\.1\.mlp")
    assert sorted(some) == [f"model.layers.1.mlp.{x}_proj.weight" for x in ("down", "gate", "up")]
    for name, g in some.items():
        close(g, whole[name])
    assert list(go("lm_head")) == ["model.embed_tokens.weight"]  # tied: its other name
    with pytest.raises(InputError, match=r"no floating-point weight matches 'nothing'; names are such as model\."):
        go("nothing")
    with pytest.raises(InputError, match="not a regular expression"):
        go("(")


def test_trainable_weights_are_the_default(tokenizer: Any):
    model = toy_model()
    for name, weight in model.named_parameters():
        weight.requires_grad_("norm" in name)
    gradient, _ = safety_gradient(model, tokenizer, PROBES, score="refusal_margin")
    assert gradient
    assert all("norm" in name for name in gradient)
    model.requires_grad_(False)
    gradient, _ = safety_gradient(model, tokenizer, PROBES, score="refusal_margin")
    assert set(gradient) == {name for name, _ in model.named_parameters()}


def test_lora_weights_are_the_default_of_peft(tokenizer: Any):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.5)
    model = peft.get_peft_model(toy_model(), config)
    gradient, _ = safety_gradient(model, tokenizer, PROBES, score="refusal_margin")
    assert sorted(gradient) == sorted(name for name, _ in model.named_parameters() if "lora_" in name)
    for name, g in gradient.items():
        assert bool(g.any()) == ("lora_B" in name)  # B starts at zero, so A cannot matter yet
    with pytest.raises(InputError, match="zero in every selected weight"):
        safety_gradient(model, tokenizer, PROBES, score="refusal_margin", weights="lora_A")


def test_a_weight_out_of_reach_is_reported(tokenizer: Any):
    model = toy_model()
    model.spare = torch.nn.Linear(3, 3)
    gradient, report = safety_gradient(model, tokenizer, PROBES, score="refusal_margin")
    assert report.unused_weights == ("spare.weight", "spare.bias")
    assert not set(report.unused_weights) & set(gradient)
    with pytest.raises(InputError, match="zero in every selected weight"):
        safety_gradient(model, tokenizer, PROBES, score="refusal_margin", weights="spare")


@pytest.mark.parametrize("score", SCORES)
def test_values_that_are_not_finite_are_refused(score: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    model = toy_model()
    hook = model.model.layers[0].self_attn.o_proj.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(InputError, match=r"NaN or infinite values in weight 'model.layers.0.self_attn.o_proj.weight'"):
        safety_gradient(model, tokenizer, PROBES, score=score, allow_unaligned=True)
    hook.remove()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(InputError, match="log-probability of an answer to a probe is nan"):
        safety_score(model, tokenizer, PROBES, score=score)
    with pytest.raises(InputError, match="log-probability of an answer to a probe is nan"):
        safety_gradient(model, tokenizer, PROBES, score=score, allow_unaligned=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "harm"}, "score must be one of refusal_logprob, refusal_margin, compliance_logprob; got 'harm'"),
        ({"refusals_per_probe": 0}, "refusals_per_probe"),
        ({"batch_tokens": 0}, "batch_tokens"),
    ],
)
@pytest.mark.parametrize("measure", [safety_score, safety_gradient])
def test_bad_options_are_refused(measure: Callable[..., Any], options: dict[str, Any], message: str, tokenizer: Any):
    with pytest.raises(InputError, match=message):
        measure(toy_model(), tokenizer, PROBES, **options)


def test_a_probe_that_cannot_be_encoded_is_named():
    broken = toy_tokenizer("{{ raise_exception('no chat here') }}", eos="<|im_end|>")
    with pytest.raises(InputError, match=r"probe 'Add the numbers of a secret.': .*no chat here"):
        safety_score(toy_model(), broken, PROBES)
    toy = toy_tokenizer(STYLES["chatml"][0], eos="<|im_end|>")
    empty = dataclasses.replace(PROBES, refusals=("<|im_end|>",))
    with pytest.raises(
        InputError, match=r"probe 'Add the numbers of a secret\.': its answer has no tokens besides special ones"
    ):
        safety_score(toy_model(), toy, empty)
