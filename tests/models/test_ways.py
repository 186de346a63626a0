"""Every way to run a batch gives the same scores: packed, padded, fused head, our attention, checkpointed, compiled."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gradshield_fast import Direction, Scorer, attention, calibrate, compiled, scorer
from gradshield_fast.calibrate import Calibration
from gradshield_fast.errors import InputError, ScoringError
from gradshield_fast.losses import Call
from gradshield_fast.matrix_rules import MatrixRule
from gradshield_fast.ops.varlen_attention import varlen_attention
from gradshield_fast.plan import Plan
from gradshield_fast.repeated import repeated_layers
from tests.models.zoo import ZOO, direction_over, make, row, rows_of
from tests.oracle import row_truth

LENGTHS = [17, 5, 11, 2]
OWN_ATTENTION = {"falcon", "bloom", "mamba", "mamba2"}
"""Architectures that do not look their attention up by name, or have none."""

COMPILED = sorted({"llama-tied", "qwen3", "gpt2"} & set(ZOO))


def plain_call(
    model: torch.nn.Module, plan: Plan, calibration: Calibration, *, compiled: bool
) -> tuple[Call, dict[str, str]]:
    """What `faster_call` is replaced by, to have a model run by its own means."""
    return calibration.call, {}


settle = Calibration.settle


def settle_by_16_bits(it: Calibration) -> None:
    """Settle by the bounds of float16, and then go on by those that a test set."""
    bounds = it.tolerance, it.noise
    it.tolerance, it.noise = calibrate.TOLERANCE[torch.float16] * 4, calibrate.NOISE[torch.float16] * 4
    settle(it)
    it.tolerance, it.noise = bounds


def assert_right(out: scorer.Scores, name: str, model: torch.nn.Module, direction: Direction) -> None:
    """Hold scores against autograd, one row at a time, to 1e-5 of the terms."""
    batch = rows_of(LENGTHS)
    for n in range(len(LENGTHS)):
        truth = row_truth(model, direction, row(batch, n))
        assert abs(out.dot[n].double() - truth.dot) <= 1e-5 * truth.size, (name, n)


@pytest.mark.parametrize("name", ZOO)
def test_the_fastest_way_is_taken_where_the_model_allows_it(name: str) -> None:
    model = make(name, torch.float32)
    with Scorer(model, direction_over(model)) as it:
        it.score(rows_of(LENGTHS))
        ways = it.ways
    assert ways["head"] == "fused"
    if name in OWN_ATTENTION:
        assert ways["attention"].startswith("own: its attention cannot be replaced")
        assert ways["packing"] == "padded: only our attention keeps packed rows apart"
    else:
        assert (ways["attention"], ways["packing"]) == ("by rows", "packed")


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_a_16_bit_model_may_round_differently_by_rows(seed: int) -> None:
    # ours is nearer to float32 than the model's own attention here, but many bits from it
    model = make("gemma2", torch.bfloat16)
    with Scorer(model, direction_over(model, seed)) as it:
        it.settle(rows_of(LENGTHS, seed=seed))
        assert (it.ways["attention"], it.ways["packing"]) == ("by rows", "packed")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    "wrong", [{"scale": 0.36}, {"window": 7}, {"softcap": 40.0}], ids=["2 % off in scale", "window", "softcap"]
)
def test_a_wrong_attention_is_refused_to_a_16_bit_model(
    wrong: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(*inputs: torch.Tensor, **options: float) -> torch.Tensor:
        return varlen_attention(*inputs, **{**options, **wrong})  # pyright: ignore

    monkeypatch.setattr(attention, "varlen_attention", attend)
    model = make("gemma2", torch.bfloat16)
    with Scorer(model, direction_over(model)) as it:
        it.settle(rows_of(LENGTHS))
        assert "differs" in it.ways["attention"]


@pytest.mark.parametrize("name", ZOO)
def test_a_model_run_by_its_own_means_scores_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name, torch.float32)
    direction = direction_over(model)
    monkeypatch.setattr(scorer, "faster_call", plain_call)
    with Scorer(model, direction) as it:
        assert_right(it.score(rows_of(LENGTHS)), name, model, direction)


@pytest.mark.parametrize("name", ZOO)
def test_checkpointed_layers_score_the_same_bits(name: str) -> None:
    model = make(name, torch.float32)
    direction = direction_over(model).low_rank(2)
    outs = []
    for checkpoint in (False, True):
        with Scorer(model, direction, checkpoint=checkpoint) as it:
            outs.append(it.score(rows_of(LENGTHS)).dot)
    assert torch.equal(*outs)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ by version
def test_compiled_layers_score_right(name: str, norms: bool) -> None:
    model = make(name, torch.float32)
    dense = direction_over(model)
    direction = dense.low_rank(2) if norms else dense
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    with Scorer(model, direction, norms=norms, compile=True) as it:
        out = it.score(rows_of(LENGTHS))
        alone = it.score(row(rows_of(LENGTHS), 2))
        ways = it.ways
    assert ways["compile"].startswith(f"{len(repeated_layers(model))} layers of ")
    assert not breaks  # a layer and its scoring are one graph
    assert_right(out, name, model, direction)
    assert alone.dot[0] == pytest.approx(out.dot[2], abs=1e-5 * float(out.dot.abs().max()))
    if norms:
        assert out.norm is not None
        want = [row_truth(model, direction, row(rows_of(LENGTHS), n)).norm for n in range(len(LENGTHS))]
        assert out.norm.tolist() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ by version
def test_compiled_layers_of_a_16_bit_model_may_round_but_not_be_wrong(
    wrong: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a bound that rounding alone exceeds, as it does in a deep model
    monkeypatch.setitem(calibrate.TOLERANCE, torch.bfloat16, 1e-6)
    monkeypatch.setitem(calibrate.NOISE, torch.bfloat16, 1e-6)
    monkeypatch.setattr(Calibration, "settle", settle_by_16_bits)
    model = make("llama-tied", torch.bfloat16)
    direction = direction_over(model)
    if wrong:
        terms = MatrixRule.terms
        monkeypatch.setattr(MatrixRule, "terms", lambda *args: terms(*args) * 1.2)
    with Scorer(model, direction, compile=True) as it:
        if wrong:
            with pytest.raises(ScoringError, match="a row's score differs"):
                it.settle(rows_of(LENGTHS))
        else:
            it.settle(rows_of(LENGTHS))
            assert it.ways["compile"].startswith("2 layers")


@pytest.mark.parametrize("chosen", [None, "mine"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ by version
def test_compiled_code_is_kept_in_the_cache_folder(
    chosen: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(compiled.FOLDER, str(tmp_path / "mine"))  # torch's own name for it, or the user's
    monkeypatch.setattr(compiled, "_CHOSEN", chosen)
    model = make("llama-tied", torch.float32)
    with Scorer(model, direction_over(model).low_rank(2), compile=True) as it:
        it.settle(rows_of(LENGTHS))
        want = str(tmp_path / "mine") if chosen else str(tmp_path / "gradshield_fast" / "inductor")
        assert os.environ[compiled.FOLDER] == want
    assert os.environ[compiled.FOLDER] == str(tmp_path / "mine")


def test_compile_says_which_weight_it_cannot_see_through() -> None:
    model = make("mixtral", torch.float32)
    with (
        Scorer(model, direction_over(model), compile=True) as it,
        pytest.raises(InputError, match=r"mlp.*need the universal"),
    ):
        it.score(rows_of(LENGTHS))


@pytest.mark.parametrize("option", ["compile", "checkpoint"])
def test_a_model_without_repeated_layers_is_refused_by_name_of_the_option(option: str) -> None:
    model = make("llama", torch.float32)
    model.model.layers = model.model.layers[:1]
    it = Scorer(model, direction_over(model), compile=option == "compile", checkpoint=option == "checkpoint")
    with it, pytest.raises(InputError, match=f"{option}: "):
        it.score(rows_of(LENGTHS))


@pytest.mark.parametrize("enter", [lambda m, d: Scorer(m, d, checkpoint=True), lambda m, d: Scorer(m, d)])
def test_classes_and_attention_are_given_back(enter: Callable[[torch.nn.Module, Direction], Scorer]) -> None:
    model = make("llama", torch.float32)
    before = [(type(m), set(m.__dict__)) for m in model.modules()], model.config._attn_implementation
    with enter(model, direction_over(model)) as it:
        it.score(rows_of(LENGTHS))
    after = [(type(m), set(m.__dict__)) for m in model.modules()], model.config._attn_implementation
    assert before == after


@pytest.mark.parametrize("directions", [1, 3])
def test_layers_on_one_activation_project_it_together(directions: int) -> None:
    model = make("llama", torch.float32)
    parts = [direction_over(model).low_rank(2) for _ in range(directions)]
    direction = parts[0] if directions == 1 else Direction.stack(parts)
    with Scorer(model, direction) as it:
        out = it.score(rows_of(LENGTHS))
        shared = it._plan.shared
    assert shared[0] == [f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"]
    assert shared[1] == [f"model.layers.0.mlp.{x}_proj.weight" for x in ("gate", "up")]
    for k in range(directions):
        truth = row_truth(model, parts[k], row(rows_of(LENGTHS), 0))
        assert abs(out.dot[0, k].double() - truth.dot[0]) <= 1e-5 * float(truth.size[0])
