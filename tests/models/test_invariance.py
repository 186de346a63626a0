"""A row's score is its own: not its batch mates', not its place, not its padding; and the same bits again."""

from __future__ import annotations

import pytest
import torch

from gradshield_fast import Scorer
from gradshield_fast.errors import InputError, ScoringError
from tests.models.zoo import ZOO, direction_over, make, row, rows_of
from tests.oracle import row_truth

LENGTHS = [17, 5, 11, 2]


@pytest.mark.parametrize("name", ZOO)
def test_alone_in_any_batch_in_any_order_padded_on_either_side(name: str) -> None:
    model = make(name, torch.float32)
    direction = direction_over(model)
    batch = rows_of(LENGTHS)
    left = rows_of(LENGTHS, side="left", width=23)
    order = torch.tensor([2, 0, 3, 1])
    with Scorer(model, direction, token_scores=False) as scorer:
        together = scorer.score(batch).dot
        again = scorer.score(batch).dot
        padded_left = scorer.score(left).dot
        shuffled = scorer.score({key: value[order] for key, value in batch.items()}).dot
        alone = torch.cat([scorer.score(row(batch, n)).dot for n in range(len(LENGTHS))])
        pair = scorer.score({key: value[1:3] for key, value in batch.items()}).dot
    size = torch.stack([row_truth(model, direction, row(batch, n)).size for n in range(len(LENGTHS))])
    assert torch.equal(together, again)
    for other in (padded_left, alone, shuffled[torch.argsort(order)]):
        assert ((other - together).abs() <= 1e-5 * size).all()
    assert ((pair - together[1:3]).abs() <= 1e-5 * size[1:3]).all()


@pytest.mark.parametrize("name", [name for name in ZOO if not name.startswith("mamba")])
@pytest.mark.parametrize("side", ["right", "left"])
def test_token_scores_sum_to_the_row_and_stay_at_its_tokens(name: str, side: str) -> None:
    model = make(name)
    direction = direction_over(model)
    batch = rows_of(LENGTHS, side=side, width=20)
    with Scorer(model, direction, token_scores=True) as scorer:
        out = scorer.score(batch)
    assert out.token_dot is not None
    assert out.token_dot.shape == (4, 20, 1)
    scale = out.token_dot.abs().sum(1)
    assert ((out.token_dot.sum(1) - out.dot).abs() <= 1e-9 * scale).all()
    assert (out.token_dot[batch["attention_mask"] == 0] == 0).all()
    for n in range(4):
        truth = row_truth(model, direction, row(batch, n))
        assert abs(out.dot[n] - truth.dot) <= 1e-7 * truth.size


def test_token_scores_of_a_recurrent_model_come_from_its_mixer() -> None:
    model = make("mamba")
    direction = direction_over(model)
    batch = rows_of(LENGTHS)
    with Scorer(model, direction, token_scores=True) as scorer:
        out = scorer.score(batch)
    assert out.token_dot is not None
    torch.testing.assert_close(out.token_dot.sum(1), out.dot, rtol=1e-7, atol=1e-7)


def test_position_terms_of_a_linear_layer_are_g_r_a() -> None:
    model = make("qwen2")
    name = "model.layers.0.mlp.down_proj.weight"
    direction = direction_over(model, pattern=name)
    batch = rows_of([9])
    with Scorer(model, direction, token_scores=True) as scorer:
        out = scorer.score(batch)
    seen = {}
    layer = model.get_submodule("model.layers.0.mlp.down_proj")
    layer.register_forward_hook(
        lambda _m, args, y: (seen.update(a=args[0]), y.register_hook(lambda g: seen.update(g=g)))[0]
    )
    model.eval()
    logits = model(input_ids=batch["input_ids"]).logits[0, :-1]
    torch.nn.functional.cross_entropy(logits, batch["labels"][0, 1:]).backward()
    terms = (seen["g"] @ direction.parts[0][name] * seen["a"]).sum(-1)  # pyright: ignore[reportOperatorIssue]
    assert out.token_dot is not None
    torch.testing.assert_close(out.token_dot[..., 0], terms.detach())


def test_a_row_without_labels_is_not_valid_and_leaves_the_others_alone() -> None:
    model = make("llama-tied")
    direction = direction_over(model)
    batch = rows_of(LENGTHS)
    with Scorer(model, direction, norms=True) as scorer:
        before = scorer.score(batch)
        batch["labels"][1] = -100
        after = scorer.score(batch)
    assert after.valid.tolist() == [True, False, True, True]
    assert torch.isnan(after.dot[1]).all()
    assert torch.isnan(after.loss[1])
    torch.testing.assert_close(after.dot[[0, 2, 3]], before.dot[[0, 2, 3]])


def test_a_row_with_a_nan_loss_is_not_valid_and_leaves_the_others_alone() -> None:
    model = make("qwen2", torch.float32)
    batch = rows_of(LENGTHS)
    used = set(batch["input_ids"][[0, 2, 3]].flatten().tolist())
    poison = next(t for t in batch["input_ids"][1].tolist() if t not in used)
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = float("nan")
    with Scorer(model, direction_over(model, pattern="mlp")) as scorer:
        scorer.score(row(batch, 0))
        out = scorer.score(batch)
    assert out.valid.tolist() == [True, False, True, True]
    assert torch.isfinite(out.dot[[0, 2, 3]]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.pop("labels"), "key 'labels' is missing"),
        (lambda b: b.update(labels=b["labels"][:, :-1]), r"labels is \(4, 16\), but input_ids is \(4, 17\)"),
        (lambda b: b.update(input_ids=b["input_ids"].float()), "must be integers"),
        (lambda b: b["attention_mask"].__setitem__((0, 3), 0), "mask of row 0 has a hole"),
        (lambda b: b["attention_mask"].__setitem__(2, 0), "row 2 has"),
        (lambda b: b["labels"].__setitem__((1, 9), 5), "row 1 has a label at a padding position"),
        (lambda b: b["input_ids"].__setitem__((3, 1), 97), "row 3 holds 97, but the model knows 0..96"),
        (lambda b: b["labels"].__setitem__((3, 1), -5), "row 3 holds -5"),
        (lambda b: b.update({k: v[:0] for k, v in b.items()}), "empty"),
    ],
)
def test_a_malformed_batch_names_the_row(change, message: str) -> None:
    model = make("qwen2", torch.float32)
    batch = rows_of(LENGTHS)
    change(batch)
    with Scorer(model, direction_over(model)) as scorer, pytest.raises(InputError, match=message):
        scorer.score(batch)


def test_scoring_outside_the_scope_is_refused() -> None:
    model = make("qwen2", torch.float32)
    scorer = Scorer(model, direction_over(model))
    with pytest.raises(ScoringError, match="inside `with Scorer"):
        scorer.score(rows_of([4]))
