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
import transformers
from toy_tokenizers import STYLES, toy_tokenizer

from gradshield_fast import SafetyProbes, safety
from gradshield_fast.answers import AnswerEncoder
from gradshield_fast.errors import InputError, ScoringError, UnalignedModelError
from gradshield_fast.batches import padded_batch
from gradshield_fast.packing import pack
from gradshield_fast.response_logprob import token_logprobs
from gradshield_fast.safety import SafetyReport, check_aligned, safety_gradient, safety_score

# peft asks for an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROBES = SafetyProbes(
    prompts=("Add the numbers of a secret.", "What is it?", "Classify me, and my friend, and all the capitals."),
    refusals=("I cannot fulfill this request.", "I am sorry."),
    compliances=("Sure, here is", "Sure:"),
)


def toy_model(kind: str = "llama", *, tied: bool = True, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    common: dict[str, Any] = {
        "vocab_size": 700,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,
        "pad_token_id": 0,
    }
    if kind == "llama":
        config = transformers.LlamaConfig(**common, attention_dropout=0.5)
    elif kind == "gemma2":  # softcaps its logits behind the head
        config = transformers.Gemma2Config(**common, final_logit_softcapping=2.0, sliding_window=256)
    else:
        config = transformers.GPT2Config(
            vocab_size=700, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=tied, initializer_range=0.3
        )
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").to(dtype).train()


@pytest.fixture
def tokenizer() -> Any:
    return toy_tokenizer(STYLES["chatml"][0], eos="<|im_end|>")


def mean_logprob(model: Any, tokenizer: Any, prompt: str, answer: str) -> torch.Tensor:
    """One answer alone, full logits, tokens counted from the text: the plain reading of the definition."""
    turns = [{"role": "user", "content": prompt}]
    start = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before = tokenizer(start, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([before + tokenizer(answer, add_special_tokens=False)["input_ids"]])
    logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    places = range(len(before), ids.shape[1])
    return torch.stack([logprobs[t - 1, ids[0, t]] for t in places]).mean()


def plain_score(model: Any, tokenizer: Any, score: str, per_probe: int = 1) -> torch.Tensor:
    def likely(text: str) -> float:
        return sum(mean_logprob(model, tokenizer, prompt, text).item() for prompt in PROBES.prompts)

    total = torch.zeros((), dtype=torch.float64)
    favoured = sorted(PROBES.refusals, key=likely, reverse=True)[:per_probe]
    wordings = PROBES.refusals
    for i, prompt in enumerate(PROBES.prompts):
        turn = [wordings[(i * per_probe + j) % len(wordings)] for j in range(per_probe)]
        refusals = turn if score == "refusal_margin" else favoured
        total = total + sum(mean_logprob(model, tokenizer, prompt, text) for text in refusals) / len(refusals)
        if score == "refusal_margin":
            total = total - mean_logprob(model, tokenizer, prompt, PROBES.compliance_of(i))
    return total / len(PROBES)


def close(got: torch.Tensor, want: torch.Tensor, relative: float = 1e-9) -> None:
    scale = float(want.abs().max())
    assert float((got - want).abs().max()) <= relative * scale


@pytest.mark.parametrize("score", ["refusal_logprob", "refusal_margin"])
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


@pytest.mark.parametrize("score", ["refusal_logprob", "refusal_margin"])
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
    gradient, _ = safety_gradient(model, tokenizer, PROBES, allow_unaligned=True, batch_tokens=1)
    want, _ = safety_gradient(model.double(), tokenizer, PROBES, allow_unaligned=True)
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


def state(model: Any) -> tuple[Any, ...]:
    return (
        {name: module.training for name, module in model.named_modules()},
        {name: p.requires_grad for name, p in model.named_parameters()},
        {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()},
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        [len(getattr(p, "_post_accumulate_grad_hooks", None) or {}) for p in model.parameters()],
    )


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
        safety_gradient(model, tokenizer, PROBES, allow_unaligned=True, batch_tokens=1, progress=progress)

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


@pytest.mark.parametrize("score", ["refusal_logprob", "refusal_margin"])
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
        ({"score": "harm"}, "score must be one of refusal_logprob, refusal_margin; got 'harm'"),
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
    report = safety_score(model, toy, PROBES)
    assert report.refusal_rate == 1
    assert report.judged == 3
    assert report.aligned
    assert report.margin > 1
    _, report = safety_gradient(model, toy, PROBES)
    assert report.aligned
    assert not report.allow_unaligned
    assert report.refusals == PROBES.refusals[:1]
    assert report.compliance_cosine is not None
    assert report.compliance_cosine > 0.2
    report = safety_score(toy_model(), tokenizer, PROBES)
    assert report.refusal_rate == 0
    assert not report.aligned


def test_an_unaligned_model_costs_no_pass_over_the_answers(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    measured = []
    monkeypatch.setattr(safety, "token_logprobs", lambda *a: measured.append(a) or token_logprobs(*a))
    model = toy_model()
    before = json.dumps(state(model), default=str)
    with pytest.raises(UnalignedModelError) as error:
        safety_gradient(model, tokenizer, PROBES)
    assert not measured
    assert json.dumps(state(model), default=str) == before
    for words in ("refuses 0% of 3 probes", "needed: 50%", "--score refusal_margin", "--allow-unaligned"):
        assert words in str(error.value)
    assert "\n" not in str(error.value)
    _, report = safety_gradient(model, tokenizer, PROBES, allow_unaligned=True)
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
        safety_gradient(*taught, foreign)
    _, report = safety_gradient(*taught, foreign, allow_unaligned=True)
    assert report.refusals == ()
    assert report.allow_unaligned


def test_the_cosine_is_that_of_what_compliance_teaches(taught: tuple[Any, Any]):
    model, toy = taught
    gradient, report = safety_gradient(model, toy, PROBES, weights="mlp", allow_unaligned=True)
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
    report = safety_score(*taught, PROBES)
    assert report.judged == 2
    assert report.probes == 3
