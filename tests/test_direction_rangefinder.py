"""A direction that is low-rank from the start: against the dense gradient, in what it holds, and in what it admits."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy_tokenizers import STYLES, toy_tokenizer
from transformers import AutoModelForCausalLM

from gradshield_fast import Direction, SafetyProbes, Scorer, head_sketch, rangefinder, safety
from gradshield_fast.capture import frozen
from gradshield_fast.errors import InputError, UnalignedModelError
from gradshield_fast.head_sketch import add_head
from gradshield_fast.lowrank import LowRank
from gradshield_fast.rangefinder import HELD_OUT, RangeFinder, residual_of
from gradshield_fast.safety import SCORES, safety_gradient
from gradshield_fast.safety_factors import safety_factors
from gradshield_fast.sketches import Sketch, sketching, uses_of
from tests.models.zoo import ZOO

# peft asks for an attribute that transformers has renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

PROBES = SafetyProbes(
    prompts=("Add the numbers of a secret.", "What is it?", "Classify me, and my friend, and all the capitals."),
    refusals=("I cannot fulfill this request.", "I am sorry."),
    compliances=("Sure, here is", "Sure:"),
)
MARGIN: dict[str, Any] = {"score": "refusal_margin", "batch_tokens": 100}


@pytest.fixture
def tokenizer() -> Any:
    return toy_tokenizer(STYLES["chatml"][0], eos="<|im_end|>")


def zoo_model(name: str, dtype: torch.dtype = torch.float64, **sizes: int) -> Any:
    """A model of the zoo with a vocabulary and a context that fit the toy tokenizer."""
    torch.manual_seed(1)
    config = ZOO[name]()
    for key, size in sizes.items():
        setattr(config, key, size)
    config.vocab_size, config.max_position_embeddings = 700, 256
    model = AutoModelForCausalLM.from_config(config).to(dtype).train()
    for key, weight in model.named_parameters():
        scale_of_one = weight.ndim == 1 and "norm" in key and key.endswith("weight")
        weight.data.normal_(0, 0.3 if weight.ndim > 1 else 0.2).add_(float(scale_of_one))
    return model


def dense_of(entry: torch.Tensor | LowRank) -> torch.Tensor:
    return entry.dense() if isinstance(entry, LowRank) else entry


def off(entries: dict[str, Any], gradient: dict[str, torch.Tensor]) -> float:
    """True relative distance of a direction from the gradient over all weights."""
    lost = sum(float((dense_of(entries[n]).double() - g.double()).square().sum()) for n, g in gradient.items())
    return (lost / sum(float(g.double().square().sum()) for g in gradient.values())) ** 0.5


@pytest.mark.parametrize("passes", [2, 3, 4])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen2", "opt"])
def test_factors_are_nearly_the_best(name: str, passes: int, tokenizer: Any) -> None:
    model = zoo_model(name)
    gradient, want = safety_gradient(model, tokenizer, PROBES, **MARGIN)
    found, report = safety_factors(model, tokenizer, PROBES, rank=4, passes=passes, **MARGIN)
    assert dataclasses.replace(report, dense_weights=()) == want
    assert [n for n in report.dense_weights if "embed_positions" not in n] == []  # a subclass that adds an offset
    assert list(found.entries) == list(gradient)
    best = Direction(gradient).low_rank(4)
    assert {n for n, e in found.entries.items() if isinstance(e, LowRank)} == {
        n for n, e in best.parts[0].items() if isinstance(e, LowRank)
    }
    residual = off(found.entries, gradient)
    assert best.residual * (1 - 1e-9) <= residual <= (1.1 if passes == 2 else 1.01) * best.residual
    assert abs(found.residual - residual) <= 5 * found.residual_error
    for key, entry in found.entries.items():
        if isinstance(entry, LowRank):
            torch.testing.assert_close(entry.q.T @ entry.q, torch.eye(entry.rank, dtype=torch.float64))
        else:
            torch.testing.assert_close(entry, gradient[key])


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "falcon"])
def test_a_sketch_is_the_gradient_times_its_columns(name: str, right: bool) -> None:
    model = zoo_model(name)
    ids = torch.randint(0, 97, (2, 11), generator=torch.Generator().manual_seed(0))  # 0 is the padding row
    weights: dict[str, Any] = {n: w for n, w in model.named_parameters() if w.ndim == 2}
    uses = uses_of(model, weights)
    assert uses.keys() == weights.keys()
    model.eval()
    model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    want = {n: w.grad for n, w in weights.items()}
    model.zero_grad()
    sketches = {}
    for n in uses:
        columns = torch.randn(weights[n].shape[1 if right else 0], 3, dtype=torch.float64)
        sketches[n] = Sketch(tuple(weights[n].shape), columns, right=right)
    with frozen(model), torch.enable_grad(), sketching(model, uses, sketches):
        for _ in range(2):
            model(input_ids=ids).logits.logsumexp(-1).sum().backward()
    for n, sketch in sketches.items():
        product = (want[n] if right else want[n].T) @ sketch.columns
        torch.testing.assert_close(sketch.total, 2 * product, rtol=1e-8, atol=1e-8 * float(product.abs().max()))
        assert weights[n].grad is None


@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.5, 2.0)])
def test_the_heads_share_in_blocks_is_autograds(
    right: bool, scale: float, softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_sketch, "BLOCK", 64 * 5)
    h, w = torch.randn(5, 7, dtype=torch.float64), torch.randn(150, 7, dtype=torch.float64, requires_grad=True)
    labels, share = torch.tensor([0, 63, 64, 149, 20]), torch.rand(5, dtype=torch.float64)
    z = scale * (h @ w.T)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    (share * torch.nn.functional.cross_entropy(z, labels, reduction="none")).sum().backward()
    assert w.grad is not None
    sketch = Sketch((150, 7), torch.randn(7 if right else 150, 3, dtype=torch.float64), right=right)
    for _ in range(2):
        add_head(sketch, h, w, labels, share, scale=scale, softcap=softcap)
    torch.testing.assert_close(sketch.total, 2 * (w.grad if right else w.grad.T) @ sketch.columns)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2"])
@pytest.mark.parametrize("score", SCORES)
def test_the_models_own_head_runs_in_no_pass_and_nothing_changes(
    name: str, score: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo_model(name, torch.float32)
    sizes: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda m, a, y: sizes.append(y[..., 0].numel()) if torch.is_grad_enabled() else None
    )
    options: dict[str, Any] = {"score": score, "allow_unaligned": True, "rank": 2, "batch_tokens": 100}
    found, report = safety_factors(model, tokenizer, PROBES, **options)
    assert [n for n in sizes if n] == sizes[:1]  # the trial alone
    monkeypatch.setattr(safety, "fused_answers", lambda *_: None)
    plain, want = safety_factors(model, tokenizer, PROBES, **options)
    assert report.refusal_logprob == pytest.approx(want.refusal_logprob, rel=1e-4)
    if score == "refusal_logprob":
        assert report.compliance_cosine == pytest.approx(want.compliance_cosine, rel=1e-2)
    for key, entry in found.entries.items():
        torch.testing.assert_close(
            dense_of(entry), dense_of(plain.entries[key]), rtol=1e-2, atol=1e-3 * float(dense_of(entry).abs().max())
        )
    alone, _ = safety_factors(model, tokenizer, PROBES, weights="lm_head|embed_tokens", **options)
    for key, entry in alone.entries.items():
        torch.testing.assert_close(
            dense_of(entry), dense_of(plain.entries[key]), rtol=1e-2, atol=1e-3 * float(dense_of(entry).abs().max())
        )


@pytest.mark.parametrize(("name", "weights"), [("qwen2", "mlp|norm"), ("gemma2", "mlp|norm"), ("qwen2", None)])
def test_the_dense_gradient_takes_the_fused_head_where_its_weight_is_left_out(
    name: str, weights: str | None, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = zoo_model(name, torch.float32)
    sizes: list[int] = []
    model.lm_head.register_forward_hook(
        lambda m, a, y: sizes.append(y[..., 0].numel()) if torch.is_grad_enabled() else None
    )
    gradient, _ = safety_gradient(model, tokenizer, PROBES, weights=weights, **MARGIN)
    assert bool(any(sizes)) == (weights is None)
    monkeypatch.setattr(safety, "fused_answers", lambda *_: None)
    plain, _ = safety_gradient(model, tokenizer, PROBES, weights=weights, **MARGIN)
    for key, g in gradient.items():
        torch.testing.assert_close(g, plain[key], rtol=1e-3, atol=1e-4 * float(g.abs().max()))


class _Sizes(TorchDispatchMode):
    """The shapes of all tensors that are made, the views of weights aside."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in self.owned:
                self.shapes.add(tuple(x.shape))
        return out


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "qwen2"])
def test_no_gradient_of_a_matrix_is_ever_made(name: str, tokenizer: Any) -> None:
    # sizes that no activation of these short answers has
    sizes_of = {"n_embd": 88} if name == "gpt2" else {"hidden_size": 88, "intermediate_size": 136, "head_dim": 22}
    model = zoo_model(name, torch.float32, **sizes_of)
    matrices = {n: tuple(w.shape) for n, w in model.named_parameters() if w.ndim == 2}
    watched = {s for n, s in matrices.items() if 2 * sum(s) < s[0] * s[1]}
    watched |= {(b, a) for a, b in watched} | {(a * b,) for a, b in watched}
    options: dict[str, Any] = {"allow_unaligned": True, "batch_tokens": 1}
    with _Sizes(model) as sizes:
        _, report = safety_factors(model, tokenizer, PROBES, rank=2, **options)
    assert report.dense_weights == ()
    assert not sizes.shapes & watched
    with _Sizes(model) as sizes:
        safety_gradient(model, tokenizer, PROBES, **options)
    assert set(matrices.values()) <= sizes.shapes


def test_what_is_held_between_passes_keeps_to_the_formula() -> None:
    weights = {"a": torch.empty(60, 50), "b": torch.empty(40, 90), "small": torch.empty(10, 30)}
    modules = {n: torch.nn.Linear(w.shape[1], w.shape[0], bias=False) for n, w in weights.items()}
    model = torch.nn.ModuleDict(modules)
    owned: dict[str, Any] = {n: m.weight for n, m in modules.items()}
    uses = uses_of(model, owned)
    finder = RangeFinder(model, owned, uses, rank=4)
    formula = sum(4 * (min(4 + 16, *w.shape) + HELD_OUT) * sum(w.shape) for w in weights.values())
    with frozen(model), torch.enable_grad():
        for _ in range(4):
            with finder.next_pass():
                sum(m(torch.randn(7, m.in_features)).sum() for m in modules.values()).backward()  # pyright: ignore
            held = {}
            for f in finder._finders.values():
                assert f.sketch is not None
                for x in (f.sketch.columns, f.sketch.total, *(f.held or ())):
                    assert x is not None
                    held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            assert sum(held.values()) <= formula
    assert set(finder.result(1.0)) == set(weights)


def one_layer(seed: int, monkeypatch: pytest.MonkeyPatch, passes: int) -> tuple[Any, torch.Tensor]:
    monkeypatch.setattr(rangefinder, "SEED", seed)
    layer = torch.nn.Linear(60, 50, bias=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -2, 60, dtype=torch.float64)
    a, g = (torch.randn(80, d, generator=generator, dtype=torch.float64) * scale[:d] for d in (60, 50))
    owned: dict[str, Any] = {"weight": layer.weight}
    finder = RangeFinder(layer, owned, uses_of(layer, owned), rank=3)
    with frozen(layer), torch.enable_grad():
        for _ in range(passes):
            with finder.next_pass():
                layer(a).backward(g)
    return finder.result(0.5)["weight"], 0.5 * g.T @ a


@pytest.mark.parametrize("passes", [2, 3])
def test_what_is_dropped_is_estimated_without_bias(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    errors, variances, last = [], [], 0.0
    for seed in range(200):
        found, gradient = one_layer(seed, monkeypatch, passes)
        last = float((found.factors.dense() - gradient).square().sum())
        errors.append(found.dropped / last - 1)
        variances.append(found.variance / last**2)
        if seed == 0:
            torch.testing.assert_close(found.square, float(gradient.square().sum()), rtol=0.2, atol=0)
            residual, _ = residual_of({"weight": found}, 0.0)
            assert residual == pytest.approx((last / float(gradient.square().sum())) ** 0.5, rel=0.5)
    e, v = torch.tensor(errors), torch.tensor(variances)
    assert abs(float(e.mean())) <= 4 * float(e.std()) / len(errors) ** 0.5
    assert float(v.mean()) == pytest.approx(float(e.var()), rel=0.4)


def test_the_same_again_gives_the_same_bits_whatever_else_is_selected(tokenizer: Any) -> None:
    model = zoo_model("llama-tied", torch.float32)
    go = lambda pattern: safety_factors(model, tokenizer, PROBES, rank=2, weights=pattern, **MARGIN)[0]  # noqa: E731
    first, again, some = go(None), go(None), go("mlp.up_proj")
    assert (first.residual, first.residual_error) == (again.residual, again.residual_error)
    for name, entry in first.entries.items():
        other = again.entries[name]
        assert torch.equal(dense_of(entry), dense_of(other))
        if name in some.entries:
            torch.testing.assert_close(dense_of(entry), dense_of(some.entries[name]), rtol=1e-3, atol=1e-6)
    assert len(some.entries) == 4 or all("up_proj" in name for name in some.entries)


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe", "mamba"])
def test_what_no_rule_covers_keeps_its_exact_gradient_and_is_named(name: str, tokenizer: Any) -> None:
    model = zoo_model(name)
    gradient, _ = safety_gradient(model, tokenizer, PROBES, **MARGIN)
    found, report = safety_factors(model, tokenizer, PROBES, rank=2, **MARGIN)
    whole = [n for n, e in found.entries.items() if isinstance(e, torch.Tensor)]
    assert set(report.dense_weights) >= {n for n in whole if gradient[n].ndim > 1}
    assert any("experts" in n or "conv1d" in n for n in report.dense_weights)
    for n in whole:
        torch.testing.assert_close(found.entries[n], gradient[n], rtol=1e-6, atol=1e-9)
    assert off(found.entries, gradient) <= 1.01 * Direction(gradient).low_rank(2).residual


class _Doubled(torch.nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def _subclass(model: Any) -> str:
    old = model.model.layers[0].mlp.up_proj
    new = _Doubled(old.in_features, old.out_features, bias=old.bias is not None, dtype=old.weight.dtype)
    new.load_state_dict(old.state_dict())
    model.model.layers[0].mlp.up_proj = new
    return "model.layers.0.mlp.up_proj.weight"


def _used_elsewhere(model: Any) -> str:
    layer = model.model.layers[0].mlp
    plain = layer.forward
    layer.forward = lambda x: plain(x) + torch.nn.functional.linear(x, layer.up_proj.weight[:32]) / 4
    return "model.layers.0.mlp.up_proj.weight"


def _foreign_hook(model: Any) -> str:
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda m, a, y: y * 3)
    return "model.layers.0.mlp.up_proj.weight"


def _patched(model: Any) -> str:
    layer = model.model.layers[0].mlp.up_proj
    layer.forward = lambda x: 3 * torch.nn.functional.linear(x, layer.weight)
    return "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("spoil", [_subclass, _used_elsewhere, _foreign_hook, _patched])
def test_a_weight_used_in_ways_that_its_class_does_not_tell_is_found(
    spoil: Callable[[Any], str], tokenizer: Any
) -> None:
    model = zoo_model("qwen2")
    weight = spoil(model)
    gradient, _ = safety_gradient(model, tokenizer, PROBES, **MARGIN)
    found, report = safety_factors(model, tokenizer, PROBES, rank=2, **MARGIN)
    assert report.dense_weights == (weight,)
    assert isinstance(found.entries[weight], LowRank)
    best = Direction(gradient).low_rank(2)
    assert off(found.entries, gradient) <= 1.01 * best.residual
    assert found.residuals[weight] == pytest.approx(best.residuals[weight])


def test_scores_are_those_of_the_compressed_direction(tokenizer: Any) -> None:
    model = zoo_model("llama-tied").eval()
    dense = Direction.from_probes(model, tokenizer, PROBES, **MARGIN)
    low = Direction.from_probes(model, tokenizer, PROBES, passes=4, rank=2, **MARGIN)
    ids = torch.randint(3, 700, (6, 9), generator=torch.Generator().manual_seed(0))
    scores = []
    for direction in (dense.low_rank(2), low):
        with Scorer(model, direction, verify=True) as scorer:
            scores.append(scorer.score({"input_ids": ids, "labels": ids}).dot[:, 0])
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-3, atol=1e-3 * float(scores[0].abs().max()))


def test_a_direction_says_how_it_was_made_and_survives_the_disk(tokenizer: Any, tmp_path: Path) -> None:
    model = zoo_model("qwen2", torch.float32)
    made = Direction.from_probes(model, tokenizer, PROBES, passes=3, rank=2, **MARGIN)
    assert made.meta["low_rank"] | {"residual": 0, "residual_error": 0} == {
        "rank": 2,
        "passes": 3,
        "residual": 0,
        "residual_error": 0,
    }
    assert 0 < made.meta["low_rank"]["residual_error"] < made.residual < 1
    assert json.loads(json.dumps(made.meta)) == made.meta
    made.save(tmp_path / "d.safetensors")
    back = Direction.load(tmp_path / "d.safetensors", model)
    assert (back.residual, back.residuals) == (made.residual, made.residuals)
    with pytest.raises(InputError, match="low-rank already"):
        made.low_rank(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"passes": 0}, "passes"),
        ({"rank": 4}, r"a rank needs passes >= 2, got rank 4 and 1 passes; .*low_rank\(\)"),
        ({"rank": 0, "passes": 2}, "rank 0"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str, tokenizer: Any) -> None:
    with pytest.raises(InputError, match=message):
        Direction.from_probes(zoo_model("qwen2"), tokenizer, PROBES, **options)
    if options != {"rank": 4}:
        with pytest.raises(InputError, match="rank >= 1 and passes >= 2"):
            safety_factors(zoo_model("qwen2"), tokenizer, PROBES, **options)


def state(model: Any) -> list[Any]:
    return [
        *((n, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in model.named_modules()),
        *((n, p.requires_grad, p.grad is None) for n, p in model.named_parameters()),
        *(len(getattr(p, "_post_accumulate_grad_hooks", None) or {}) for p in model.parameters()),
    ]


@pytest.mark.parametrize("fails", [None, 11, 16])
def test_the_model_is_as_before_and_every_pass_is_counted(fails: int | None, tokenizer: Any) -> None:
    model = zoo_model("llama-tied", torch.float32)
    before, calls = state(model), []

    def progress(done: int, total: int) -> None:
        calls.append((done, total))
        if fails is not None and done >= fails:
            raise KeyboardInterrupt

    options: dict[str, Any] = {"rank": 2, "allow_unaligned": True, "batch_tokens": 1, "progress": progress}
    if fails:
        with pytest.raises(KeyboardInterrupt):
            safety_factors(model, tokenizer, PROBES, **options)
    else:
        safety_factors(model, tokenizer, PROBES, **options)
    # 3 answers are judged, 6 compared, 3 refusals measured in each of 3 passes, 3 compliances
    assert calls == [(i, 21) for i in range(3, (fails or 21) + 1)]
    assert state(model) == before


def test_the_check_of_alignment_sees_the_same(tokenizer: Any) -> None:
    model = zoo_model("llama-tied", torch.float32)
    options: dict[str, Any] = {"score": "refusal_logprob", "allow_unaligned": True}
    _, want = safety_gradient(model, tokenizer, PROBES, **options)
    _, report = safety_factors(model, tokenizer, PROBES, rank=12, **options)
    assert want.compliance_cosine is not None
    assert report.compliance_cosine == pytest.approx(want.compliance_cosine, rel=0.2)
    assert report.allow_unaligned
    with pytest.raises(UnalignedModelError):
        safety_factors(model, tokenizer, PROBES, score="refusal_logprob", rank=2)


def test_a_half_precision_model_is_summed_in_float32(tokenizer: Any) -> None:
    model = zoo_model("llama-tied", torch.bfloat16)
    found, _ = safety_factors(model, tokenizer, PROBES, rank=12, **MARGIN)
    gradient, _ = safety_gradient(model.double(), tokenizer, PROBES, **MARGIN)
    assert {dense_of(e).dtype for e in found.entries.values()} == {torch.float32}
    assert off(found.entries, gradient) < 0.1 + Direction(gradient).low_rank(12).residual


def test_lora_factors_are_no_smaller_and_stay_whole(tokenizer: Any) -> None:
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    model = peft.get_peft_model(zoo_model("qwen2"), config)
    gradient, _ = safety_gradient(model, tokenizer, PROBES, **MARGIN)
    found, report = safety_factors(model, tokenizer, PROBES, rank=2, **MARGIN)
    assert report.dense_weights == tuple(found.entries)
    assert found.residual == found.residual_error == 0
    for name, entry in found.entries.items():
        torch.testing.assert_close(entry, gradient[name])


def test_a_weight_out_of_reach_is_reported(tokenizer: Any) -> None:
    model = zoo_model("qwen2")
    model.spare = torch.nn.Linear(40, 40, dtype=torch.float64)
    found, report = safety_factors(model, tokenizer, PROBES, rank=2, **MARGIN)
    assert report.unused_weights == ("spare.weight", "spare.bias")
    assert not set(report.unused_weights) & set(found.entries)
    with pytest.raises(InputError, match="zero in every selected weight"):
        safety_factors(model, tokenizer, PROBES, rank=2, weights="spare", **MARGIN)
