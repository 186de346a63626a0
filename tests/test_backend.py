"""This package as a backend: it conforms, it is exact, and it marks what it cannot score."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from toy_tokenizers import CHATML, toy_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from gradshield_fast import conformance
from gradshield_fast.backend import Backend, GradShieldFastBackend
from gradshield_fast.chat import ChatEncoder
from gradshield_fast.direction import Direction
from gradshield_fast.errors import InputError
from gradshield_fast.fingerprint import model_fingerprint
from gradshield_fast.probes import SafetyProbes

ROWS = [
    {"prompt": "What is the capital of France?", "response": "It is Paris."},
    {
        "messages": [
            {"role": "user", "content": "Add 12 and 30."},
            {"role": "assistant", "content": "The answer is 42."},
        ]
    },
    {"instruction": "Greet me.", "input": "", "output": "Hello there! So long, and thank you for the summary."},
    {"prompt": "Be short.", "completion": "Sure."},
    {
        "messages": [
            {"role": "system", "content": "Answer with a short summary."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Hello there!"},
            {"role": "user", "content": "Thank you."},
            {"role": "assistant", "content": "So long."},
        ]
    },
]
PROBES = {"prompts": ["Do harm.", "Hurt them all."], "refusals": ["I cannot."], "compliances": ["Sure, here is"]}


def tokenizer() -> Any:
    return toy_tokenizer(CHATML, eos="<|im_end|>")


def tiny_model(dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=640,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=False,
    )
    model: Any = LlamaForCausalLM(config)
    return model.to(dtype).eval()


def arrays(model: Any, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=tuple(w.shape)) for name, w in model.named_parameters()}


def ready(dtype: torch.dtype = torch.float64, **options: Any) -> GradShieldFastBackend:
    model = tiny_model(dtype)
    backend = GradShieldFastBackend(model, tokenizer(), **options)
    backend.use_direction(arrays(model))
    return backend


def tokens(backend: GradShieldFastBackend, row: dict[str, Any]) -> dict[str, list[int]]:
    encoded = backend._encode(row)
    return {"input_ids": encoded.input_ids, "labels": encoded.labels}


@pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("form", ["given, float64", "given, float32", "fitted"])
def test_conforms(check, form):
    model = tiny_model(torch.float64 if form.endswith("64") else torch.float32)
    check(
        conformance.Subject(
            make=lambda: GradShieldFastBackend(model, tokenizer()),
            examples=ROWS,
            direction=arrays(model) if form.startswith("given") else None,
            probes=PROBES,
            tolerance=1e-9 if form.endswith("64") else 1e-5,
        )
    )


def test_importing_is_light():
    conformance.check_import_is_light("gradshield_fast.backend")


def test_is_a_backend():
    backend: Backend = GradShieldFastBackend("no such model")
    assert isinstance(backend, Backend)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_scores_losses_and_norms_are_those_of_autograd(reduction):
    backend = ready(loss_reduction=reduction, verify=True)
    out = backend.score(ROWS, norms=True)
    model, encoder, direction = tiny_model(), ChatEncoder(tokenizer()), arrays(tiny_model())
    for n, row in enumerate(ROWS):
        messages = row.get("messages") or backend_messages(row)
        encoded = encoder.encode(messages)
        ids, labels = torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels])
        logits = model(input_ids=ids).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction=reduction)
        weights = dict(model.named_parameters())
        gradient = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        terms = {name: gradient[name] * torch.as_tensor(direction[name]) for name in weights}
        dot, size = (float(sum(f(t).sum() for t in terms.values())) for f in (torch.Tensor.clone, torch.Tensor.abs))
        assert abs(out["fihs"][n] - dot) <= 1e-9 * size
        assert out["loss"][n] == pytest.approx(loss.item(), rel=1e-10)
        norm = float(sum(g.square().sum() for g in gradient.values())) ** 0.5
        assert out["grad_norm"][n] == pytest.approx(norm, rel=1e-9)
        assert out["response_tokens"][n] == encoded.response_tokens
        assert out["tokens"][n] == len(encoded.input_ids)
    assert out["status"] == ["ok"] * len(ROWS)
    assert out["fihs"].dtype == np.float64


def backend_messages(row: dict[str, str]) -> list[dict[str, str]]:
    question, answer = row.get("prompt") or row["instruction"], row.get("response") or row.get("completion")
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer or row["output"]}]


def test_every_form_of_the_same_rows_scores_the_same():
    backend = ready(batch_tokens=64)
    want = backend.score(ROWS)["fihs"]
    rows = [tokens(backend, row) for row in ROWS]
    width = max(len(row["input_ids"]) for row in rows)

    def padded(fill: int, key: str, left: bool) -> np.ndarray:
        pads = [[fill] * (width - len(row["input_ids"])) for row in rows]
        values = [row[key] if key in row else [1] * len(row["input_ids"]) for row in rows]
        return np.array([p + v if left else v + p for p, v in zip(pads, values, strict=True)])

    forms: list[Any] = [rows, [{k: np.array(v) for k, v in row.items()} for row in rows]]
    for left in (False, True):
        batch = {
            "input_ids": padded(0, "input_ids", left),
            "labels": padded(-100, "labels", left),
            "attention_mask": padded(0, "attention_mask", left),
        }
        forms += [batch, {k: torch.as_tensor(v) for k, v in batch.items()}, {k: v.tolist() for k, v in batch.items()}]
    for form in forms:
        got = backend.score(form)
        assert got["status"] == ["ok"] * len(ROWS)
        np.testing.assert_allclose(got["fihs"], want, rtol=1e-9)


@pytest.mark.parametrize(
    ("row", "status", "reason"),
    [
        ("text", "bad_row", "must be a dict"),
        ({"input_ids": [5, 6]}, "bad_row", "needs labels"),
        ({"input_ids": [5, 6], "labels": [6]}, "bad_row", "labels has 1 entries, input_ids 2"),
        ({"input_ids": [5.5, 6], "labels": [-100, 6]}, "bad_row", "list of integers, got float64"),
        ({"input_ids": [[5, 6]], "labels": [[-100, 6]]}, "bad_row", r"shape \(1, 2\)"),
        ({"input_ids": [[5], [6, 7]], "labels": [-100, 6]}, "bad_row", "list of integers, got object"),
        ({"input_ids": None, "labels": [5]}, "bad_row", "needs input_ids"),
        ({"input_ids": [], "labels": []}, "empty", "no tokens"),
        ({"input_ids": [5, 6], "labels": [5, -100]}, "no_response", "nothing to learn"),
        ({"input_ids": [5, 640], "labels": [-100, 5]}, "bad_tokens", r"token 640 is not one of the model's 0\.\.639"),
        ({"input_ids": [5, 6], "labels": [-100, -5]}, "bad_tokens", "token -5"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 0, 1]}, "bad_row", "hole"),
        ({"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "attention_mask": [1, 1, 0]}, "bad_row", "padding"),
        ({"input_ids": [5, 6], "labels": [-100, 6], "attention_mask": [0, 0]}, "bad_row", "padding"),
        ({"prompt": "No answer"}, "bad_row", "expected"),
        ({"messages": [{"role": "user", "content": "?"}]}, "no_response", "no assistant turn"),
    ],
)
def test_a_row_that_cannot_be_scored_says_why(row, status, reason):
    out = ready().score([ROWS[0], row, ROWS[3]], norms=True)
    assert out["status"] == ["ok", status, "ok"]
    assert re.search(reason, out["reason"][1])
    for key in ("fihs", "loss", "grad_norm"):
        assert np.isnan(out[key]).tolist() == [False, True, False]


def test_rows_of_nan_are_marked_and_infect_nobody():
    backend = ready()
    clean = backend.score(ROWS)["fihs"]
    word = 639
    with torch.no_grad():
        backend._model.get_input_embeddings().weight[word] = torch.nan
    out = backend.score([*ROWS, {"input_ids": [word, 5, 6], "labels": [-100, 5, 6]}])
    assert out["status"] == ["ok"] * len(ROWS) + ["non_finite"]
    assert "loss" in out["reason"][-1]
    assert np.isnan([out["fihs"][-1], out["loss"][-1]]).all()
    np.testing.assert_allclose(out["fihs"][:-1], clean, rtol=1e-9)


def test_rows_are_cut_to_max_length():
    long = {"prompt": "Greet me.", "response": "Hello there! " * 30}
    full, short = ready(), ready(max_length=40)
    cut = {key: value[:40] for key, value in tokens(full, long).items()}
    want = full.score([cut])["fihs"]
    for row in (long, tokens(full, long)):
        out = short.score([row])
        assert (out["status"], out["tokens"].tolist()) == (["truncated"], [40])
        np.testing.assert_allclose(out["fihs"], want, rtol=1e-9)
    late = {"input_ids": [5] * 60, "labels": [-100] * 50 + [5] * 10}
    assert short.score([late])["status"] == ["no_response_after_truncation"]


def test_several_directions_give_several_columns():
    model = tiny_model()
    parts = [Direction({n: torch.as_tensor(r) for n, r in arrays(model, seed).items()}) for seed in (0, 1)]
    backend = GradShieldFastBackend(model, tokenizer())
    assert backend.use_direction(Direction.stack(parts))["directions"] == 2
    out = backend.score([*ROWS, {"bad": 1}])
    assert out["fihs"].shape == (len(ROWS) + 1, 2)
    assert np.isnan(out["fihs"][-1]).all()
    for k, part in enumerate(parts):
        backend.use_direction(part)
        np.testing.assert_allclose(backend.score(ROWS)["fihs"], out["fihs"][:-1, k], rtol=1e-9)
    with pytest.raises(InputError, match=r"shape \(6, 2\); choose a direction"):
        backend.decide(out["fihs"], 0.0)


def test_the_model_is_left_as_it_was():
    model = tiny_model().train()
    next(model.parameters()).requires_grad_(False)
    before = (model_fingerprint(model), [p.requires_grad for p in model.parameters()])
    backend = GradShieldFastBackend(model, tokenizer())
    backend.use_direction(arrays(model))
    backend.score(ROWS)
    assert (model_fingerprint(model), [p.requires_grad for p in model.parameters()]) == before
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules())


class TestDirections:
    def test_fitted_saved_and_used_again(self, tmp_path):
        model = tiny_model(torch.float32)
        backend = GradShieldFastBackend(model, tokenizer())
        seen = []
        told = backend.fit_direction(
            PROBES, allow_unaligned=True, progress=lambda done, total: seen.append((done, total))
        )
        assert told["meta"]["model"] == model_fingerprint(model)
        assert seen[-1][0] == seen[-1][1]
        assert backend.direction is not None
        backend.direction.save(tmp_path / "d.safetensors")
        other = GradShieldFastBackend(model, tokenizer())
        assert other.use_direction(tmp_path / "d.safetensors")["norm"] == pytest.approx(told["norm"])
        np.testing.assert_array_equal(other.score(ROWS)["fihs"], backend.score(ROWS)["fihs"])

    def test_is_the_direction_of_the_probes(self):
        model = tiny_model(torch.float32)
        want = Direction.from_probes(
            model, tokenizer(), SafetyProbes(**{k: tuple(v) for k, v in PROBES.items()}), allow_unaligned=True
        )
        backend = GradShieldFastBackend(model, tokenizer())
        for probes in (PROBES, SafetyProbes(**{k: tuple(v) for k, v in PROBES.items()})):
            assert backend.fit_direction(probes, allow_unaligned=True)["norm"] == want.norm

    def test_low_rank_is_near_and_says_how_near(self):
        model = tiny_model(torch.float32)
        backend = GradShieldFastBackend(model, tokenizer())
        backend.fit_direction(PROBES, allow_unaligned=True)
        dense = backend.score(ROWS, norms=True)
        told = backend.fit_direction(PROBES, allow_unaligned=True, energy=0.99)
        assert 0 < told["residual"] <= 0.1
        off = np.abs(backend.score(ROWS)["fihs"] - dense["fihs"])
        assert (off <= 1.01 * told["residual"] * told["norm"][0] * dense["grad_norm"]).all()

    def test_weights_by_regular_expression(self):
        model = tiny_model(torch.float32)
        told = GradShieldFastBackend(model, tokenizer()).fit_direction(PROBES, allow_unaligned=True, weights=r"mlp\.")
        assert told["weights"] == [name for name, _ in model.named_parameters() if "mlp." in name]

    @pytest.mark.parametrize(
        ("direction", "text"),
        [
            ({}, "no tensors"),
            ({"nowhere": np.ones(3)}, "no weight 'nowhere'"),
            ({"model.norm.weight": np.ones(3)}, r"\(32,\) in the model, but \(3,\)"),
            ({"model.norm.weight": np.full(32, np.nan)}, "NaN"),
            ({"model.norm.weight": ["a"] * 32}, "array of numbers"),
            ("nowhere.safetensors", "no such direction file"),
        ],
    )
    def test_that_do_not_fit_are_refused(self, direction, text):
        backend = ready()
        before = backend.score(ROWS)["fihs"]
        with pytest.raises(InputError, match=text):
            backend.use_direction(direction)
        np.testing.assert_array_equal(backend.score(ROWS)["fihs"], before)

    @pytest.mark.parametrize(
        ("probes", "text"),
        [
            ({"prompts": "Do harm."}, "prompts must be a list"),
            ({"prompts": []}, "'prompts' is empty"),
            ({}, "'prompts' is empty"),
            ({"prompts": ["Do harm."], "refusals": [3]}, "must be text"),
            ("nowhere.json", "no such probes file"),
        ],
    )
    def test_bad_probes_are_refused(self, probes, text):
        with pytest.raises(InputError, match=text):
            GradShieldFastBackend(tiny_model(torch.float32), tokenizer()).fit_direction(probes, allow_unaligned=True)


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"batch_tokens": 0}, "batch_tokens"),
            ({"loss_reduction": "max"}, "loss_reduction"),
        ],
    )
    def test_are_checked_at_once(self, options, text):
        with pytest.raises(InputError, match=text):
            GradShieldFastBackend(None, None, **options)

    def test_a_model_by_name_is_loaded_when_it_is_needed(self, tmp_path):
        model = tiny_model(torch.float32)
        model.save_pretrained(tmp_path)
        tokenizer().save_pretrained(tmp_path)
        by_name = GradShieldFastBackend(str(tmp_path), dtype="float32", device="cpu")
        assert by_name.capabilities()["backend"] == "gradshield_fast"
        assert isinstance(by_name._model, str)
        by_name.use_direction(arrays(model))
        object_given = GradShieldFastBackend(model, tokenizer())
        object_given.use_direction(arrays(model))
        np.testing.assert_array_equal(by_name.score(ROWS)["fihs"], object_given.score(ROWS)["fihs"])

    def test_a_name_that_leads_nowhere(self, tmp_path):
        backend = GradShieldFastBackend(str(tmp_path / "nowhere"))
        with pytest.raises(InputError, match="nowhere"):
            backend.use_direction({"w": np.ones(1)})
        with pytest.raises(InputError, match="leave tokenizer out"):
            GradShieldFastBackend("some/model", tokenizer())

    def test_without_a_tokenizer_tokens_can_be_scored(self):
        model = tiny_model()
        backend = GradShieldFastBackend(model)
        backend.use_direction(arrays(model))
        rows = [tokens(ready(), row) for row in ROWS]
        np.testing.assert_allclose(backend.score(rows)["fihs"], ready().score(ROWS)["fihs"], rtol=1e-9)
        with pytest.raises(InputError, match="need a tokenizer"):
            backend.score(ROWS)
        with pytest.raises(InputError, match="needs a tokenizer"):
            backend.fit_direction(PROBES)

    @pytest.mark.parametrize(
        ("examples", "text"),
        [
            ("text", "got str"),
            (3, "got int"),
            ({"prompt": ["a"]}, r"got \['prompt'\]"),
            ({"input_ids": [[1, 2]], "labels": [[1, 2], [1, 2]]}, "as many rows each"),
        ],
    )
    def test_examples_of_another_form(self, examples, text):
        with pytest.raises(InputError, match=text):
            ready().score(examples)

    @pytest.mark.parametrize("threshold", [float("nan"), float("inf")])
    def test_a_threshold_is_finite(self, threshold):
        with pytest.raises(InputError, match="finite"):
            ready().decide([1.0], threshold)
