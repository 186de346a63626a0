"""Traps of hooking: frozen models, checkpointing, reused modules, tied weights, weights used where no rule looks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from gradshield_fast import Direction, Scorer
from gradshield_fast.errors import InputError, ScoringError
from tests.models.zoo import direction_over, make, row, rows_of
from tests.oracle import row_truth

LENGTHS = [9, 4, 7]
WIDTH = 8


class Tiny(nn.Module):
    """Embedding, one body, head: a causal model whose body a test chooses."""

    def __init__(self, body: nn.Module | Callable[[torch.Tensor], torch.Tensor], *, padding: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, WIDTH, padding_idx=padding)
        self.body = body
        self.head = nn.Linear(WIDTH, 97, bias=False)
        self.double()

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> SimpleNamespace:
        del use_cache
        x = self.embed(input_ids)
        return SimpleNamespace(logits=self.head(torch.tanh(self.body(x))))


def agree(model: nn.Module, direction: Direction, batch: dict[str, torch.Tensor], *, norms: bool = False) -> Scorer:
    """Score, and hold every row against autograd."""
    with Scorer(model, direction, norms=norms) as scorer:
        out = scorer.score(batch)
    for n in range(len(out.dot)):
        truth = row_truth(model, direction, row(batch, n))
        assert (abs(out.dot[n] - truth.dot) <= 1e-9 * truth.size).all()
        assert truth.size.min() > 0
        if out.norm is not None:
            assert float(out.norm[n]) == pytest.approx(truth.norm, rel=1e-9)
    return scorer


class Checkpointed(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.one, self.two, self.reentrant = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        run = lambda y: self.two(torch.tanh(self.one(y)))  # noqa: E731
        return checkpoint(run, x, use_reentrant=self.reentrant)  # pyright: ignore[reportReturnType]


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(torch.tanh(self.layer(self.norm(x)))))


class Functional(nn.Module):
    """Uses its child's weight without calling the child, and the other child both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.unseen, self.both = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.linear(x, self.unseen.weight, self.unseen.bias)
        return self.both(x) + x @ self.both.weight


class Scaled(nn.Linear):
    """A subclass that does more than its parent."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 3 * super().forward(input) + input @ self.weight


class Grouped(nn.Linear):
    """A subclass whose output is wider than its weight is tall: no shape fits the parent's rule."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        groups = input.unflatten(-1, (2, WIDTH // 2))
        return torch.einsum("...gi,gio->...go", groups, self.weight.view(2, WIDTH // 2, WIDTH // 2)).flatten(-2)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x)
        y *= 2
        return y.relu_()


class Permuted(nn.Module):
    """Tokens of all rows sorted by a key and scored in that order, as experts see them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.reshape(-1, x.shape[-1])
        order = flat[:, 0].detach().argsort()
        out = torch.empty_like(flat)
        out = out.index_copy(0, order, self.layer(flat[order]))
        return out.view_as(x)


class Routed(nn.Module):
    """Its router returns the logits and the weights that are made from them, and both are used."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            logits = x @ self.weight
            return logits, {"weights": logits.softmax(-1)}

    def __init__(self) -> None:
        super().__init__()
        self.router = self.Router()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits, made = self.router(x)
        return x * made["weights"] + 0.1 * logits


class Flattened(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.layer(x.reshape(-1, x.shape[-1]))).view_as(x)


class Positions(nn.Module):
    """A position embedding broadcast over the batch: its gradient mixes rows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.table(torch.arange(x.shape[1]))


class NoForwardMode(torch.autograd.Function):
    """y = x w, a custom function with a twice differentiable backward and no jvp."""

    @staticmethod
    def forward(ctx, x, w):  # type: ignore[override]
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx, g):  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.flatten(0, 1).T @ g.flatten(0, 1)


class OnceDifferentiable(NoForwardMode):
    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):  # type: ignore[override]
        x, w = ctx.saved_tensors
        return g @ w.T, x.flatten(0, 1).T @ g.flatten(0, 1)


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.randn(WIDTH, WIDTH)), function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function.apply(x, self.weight)  # pyright: ignore[reportReturnType]


class Convolution(nn.Module):
    """Causal depthwise convolution: channels before tokens, and padding that is cut off."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=2, groups=WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)


BODIES: dict[str, Callable[[], nn.Module]] = {
    "checkpoint": lambda: Checkpointed(False),
    "reentrant checkpoint": lambda: Checkpointed(True),
    "reused": Reused,
    "functional": Functional,
    "subclass": lambda: Scaled(WIDTH, WIDTH),
    "grouped subclass": lambda: Grouped(WIDTH // 2, WIDTH, bias=False),
    "in place": InPlace,
    "permuted": Permuted,
    "routed": Routed,
    "flattened": Flattened,
    "positions": Positions,
    "no forward mode": lambda: Custom(NoForwardMode),
    "once differentiable": lambda: Custom(OnceDifferentiable),
    "convolution": Convolution,
    "square Conv1D": lambda: Conv1D(WIDTH, WIDTH),
    "RMSNorm": lambda: nn.RMSNorm(WIDTH),
    "GroupNorm over channels": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH, bias=False)),
}


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
