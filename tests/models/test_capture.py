"""Traps of hooking: frozen models, checkpointing, reused modules, tied weights, weights used where no rule looks."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from gradshield_fast import Direction, Scorer
from gradshield_fast.errors import InputError, ScoringError
from tests.models.bodies import (
    BODIES,
    LENGTHS,
    WIDTH,
    Tiny,
    agree,
)
from tests.models.zoo import direction_over, make, row, rows_of
from tests.oracle import row_truth


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_bodies_that_trip_hooks_score_right(body: str, norms: bool) -> None:
    torch.manual_seed(0)
    model = Tiny(BODIES[body]())
    for weight in model.parameters():
        weight.data.normal_()
    agree(model, direction_over(model), rows_of(LENGTHS), norms=norms)


def test_the_rule_that_ran_is_in_the_record() -> None:
    torch.manual_seed(0)
    used = {}
    for body in ("no forward mode", "once differentiable", "permuted", "square Conv1D", "routed"):
        model = Tiny(BODIES[body]())
        scorer = agree(model, direction_over(model), rows_of(LENGTHS))
        used[body] = [m for name, m in scorer.methods.items() if name.startswith("body") and "bias" not in name]
    assert used == {
        "no forward mode": [["double_vjp @ body"]],
        "once differentiable": [["row_vjp @ body"]],
        "permuted": [["jvp @ body"]],
        "square Conv1D": [["conv1d @ body"]],
        "routed": [["jvp @ body.router"]],
    }


def test_frozen_model_scores_and_comes_back_as_it_was() -> None:
    model = make("llama-tied").requires_grad_(False)
    model.train()
    next(model.parameters()).requires_grad_(True)
    flags = [w.requires_grad for w in model.parameters()]
    agree(model, direction_over(model), rows_of(LENGTHS))
    assert [w.requires_grad for w in model.parameters()] == flags
    assert all(w.grad is None for w in model.parameters())
    assert all(m.training for m in model.modules())
    assert not any(m._forward_hooks for m in model.modules())


def test_gradients_the_user_had_are_kept() -> None:
    model = make("qwen2")
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.grad = torch.full_like(weight, 7)
    agree_direction = direction_over(model, pattern="mlp")
    with Scorer(model, agree_direction, verify=True) as scorer:
        scorer.score(rows_of(LENGTHS))
    assert weight.grad is not None
    assert (weight.grad == 7).all()


def test_hooks_and_flags_are_gone_after_an_exception() -> None:
    model = make("qwen2")

    def interrupted() -> None:
        with Scorer(model, direction_over(model)) as scorer:
            scorer.score(rows_of(LENGTHS))
            assert any(m._forward_hooks for m in model.modules())
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(m._forward_hooks for m in model.modules())
    assert all(w.requires_grad for w in model.parameters())


def test_gradient_checkpointing_of_transformers() -> None:
    model = make("llama")
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model.train()
    agree(model, direction_over(model), rows_of(LENGTHS))


@pytest.mark.parametrize("norms", [False, True])
def test_any_subset_of_the_weights(norms: bool) -> None:
    model = make("mistral")
    for pattern in ("layers.1.mlp.down_proj", "norm", "embed_tokens", "lm_head", "layers.0.self_attn", "bias"):
        direction = direction_over(model, pattern=pattern) if pattern != "bias" else None
        if direction is not None:
            agree(model, direction, rows_of(LENGTHS), norms=norms)


def test_tied_weight_answers_to_either_name_once() -> None:
    model = make("llama-tied")
    r = torch.randn(97, 32, dtype=torch.float64)
    batch = rows_of(LENGTHS)
    outs = []
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        with Scorer(model, Direction({name: r}), norms=True) as scorer:
            outs.append(scorer.score(batch))
    assert torch.equal(outs[0].dot, outs[1].dot)
    agree(model, Direction({"lm_head.weight": r}), batch, norms=True)


def test_both_names_of_a_tied_weight_are_refused() -> None:
    model = make("llama-tied")
    r = torch.randn(97, 32, dtype=torch.float64)
    with pytest.raises(InputError, match="are one weight in the model"):
        Scorer(model, Direction({"lm_head.weight": r, "model.embed_tokens.weight": r}))


def test_padding_row_of_an_embedding_has_no_gradient() -> None:
    torch.manual_seed(0)
    model = Tiny(nn.Identity(), padding=5)
    batch = rows_of(LENGTHS)
    batch["input_ids"][0, 2] = 5
    agree(model, direction_over(model, pattern="embed"), batch, norms=True)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("zero_b", [False, True])
def test_lora_through_peft(use_dora: bool, zero_b: bool) -> None:
    peft = pytest.importorskip("peft")
    model = make("qwen2")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_dora=use_dora, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).double()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.0 if zero_b else 0.3)
    direction = Direction(
        {n: torch.randn(w.shape, dtype=torch.float64) for n, w in model.named_parameters() if w.requires_grad}
    )
    assert all("lora" in name for name in direction.names)
    agree(model, direction, rows_of(LENGTHS))


def test_low_rank_and_stacked_directions_score_like_their_dense_forms() -> None:
    model = make("gpt2")
    one, two = direction_over(model, 1), direction_over(model, 2, pattern="mlp")
    stacked = Direction.stack([one.low_rank(3), two, one, two.low_rank(energy=0.7)])
    dense = [
        Direction({n: e if isinstance(e, torch.Tensor) else e.dense() for n, e in part.items()})
        for part in stacked.parts
    ]
    batch = rows_of(LENGTHS)
    with Scorer(model, stacked, token_scores=True) as scorer:
        together = scorer.score(batch)
    for k, direction in enumerate(dense):
        with Scorer(model, direction) as scorer:
            alone = scorer.score(batch)
        torch.testing.assert_close(together.dot[:, k], alone.dot[:, 0], rtol=1e-9, atol=1e-9)
    agree(model, stacked, batch, norms=True)


def test_an_expert_that_calibration_never_saw_is_still_scored_right() -> None:
    """Experts kept as separate layers see any number of tokens; one that fires late must not be misread."""

    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
            self.late = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            flat, out = x.reshape(-1, WIDTH), torch.zeros_like(x).reshape(-1, WIDTH)
            second = (flat[:, 0] > 0) & torch.tensor(self.late)
            for k, chosen in enumerate((~second, second)):
                at = chosen.nonzero()[:, 0]
                if len(at):
                    out = out.index_add(0, at, self.experts[k](flat[at]))
            return out.view_as(x)

    torch.manual_seed(0)
    model = Tiny(Experts())
    direction, batch = direction_over(model), rows_of(LENGTHS)
    with Scorer(model, direction) as scorer:
        scorer.score(batch)
        model.body.late = True  # pyright: ignore[reportArgumentType]
        out = scorer.score(batch)
        for n in range(len(LENGTHS)):
            truth = row_truth(model, direction, row(batch, n))
            assert abs(out.dot[n] - truth.dot) <= 1e-9 * truth.size


def test_positions_that_do_not_count_from_zero_are_left_to_the_model() -> None:
    """RoBERTa's positions begin after its padding id; passing 0, 1, 2 would score another function."""

    class Offset(Tiny):
        def __init__(self) -> None:
            super().__init__(nn.Identity())
            self.table = nn.Embedding(32, WIDTH).double()

        def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
            self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, use_cache: bool = False
        ) -> SimpleNamespace:
            if position_ids is None:
                position_ids = torch.arange(2, 2 + input_ids.shape[1]).expand_as(input_ids)
            x = torch.tanh(self.embed(input_ids) + self.table(position_ids))
            return SimpleNamespace(logits=self.head(x))

    torch.manual_seed(0)
    model = Offset()
    agree(model, direction_over(model), rows_of(LENGTHS))


def test_a_model_that_mixes_rows_is_refused() -> None:
    class Mixing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.mean(0, keepdim=True)

    torch.manual_seed(0)
    model = Tiny(Mixing())
    with Scorer(model, direction_over(model)) as scorer, pytest.raises(ScoringError, match="batch mates"):
        scorer.score(rows_of(LENGTHS))


def test_an_input_changed_in_place_after_the_call_is_refused_by_name() -> None:
    class Overwriting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held = (x * 1).detach()
            y = self.layer(held)
            held.zero_()
            return x + y

    torch.manual_seed(0)
    model = Tiny(Overwriting())
    with (
        Scorer(model, direction_over(model)) as scorer,
        pytest.raises(ScoringError, match=r"modified by an inplace operation"),
    ):
        scorer.score(rows_of(LENGTHS))


def test_a_compiled_model_is_refused_with_advice() -> None:
    model = make("qwen2")
    wrapped = SimpleNamespace(_orig_mod=model)
    with pytest.raises(InputError, match=r"torch\.compile"):
        Scorer(wrapped, direction_over(model))  # pyright: ignore[reportArgumentType]
