"""The fused head's share of the norm: against autograd, in blocks of any size, and without a matrix of logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradshield_fast import Scorer, attention, head_norm
from gradshield_fast.errors import ScoringError
from gradshield_fast.head_columns import Lookups
from gradshield_fast.ops import linear_cross_entropy
from gradshield_fast.ops.linear_cross_entropy import reference
from tests.models.zoo import ZOO, direction_over, make, row, rows_of
from tests.oracle import row_truth

LENGTHS = [17, 5, 11, 2]
COUNTS = [3, 0, 9, 1, 40, 4]
VOCABULARY, D = 301, 12
CASES = {
    "plain": (1.0, None),
    "scaled": (0.3, None),
    "capped": (1.0, 3.0),
    "both": (-1.7, 2.0),
}


@pytest.fixture(params=["one by one", "batched"], autouse=True)
def _in_both_forms(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples one after another, as on a CPU, and side by side, as on a GPU."""
    monkeypatch.setattr(head_norm, "BATCHED", frozenset({"cpu"} if request.param == "batched" else ()))


def head_case(dtype: torch.dtype, *, sure: bool = False) -> dict[str, Any]:
    """Hidden states of rows with COUNTS labels; for a sure model the labels' logits tower above all others."""
    generator = torch.Generator().manual_seed(5)
    tokens = sum(COUNTS)
    h, weight = torch.randn(tokens, D, generator=generator), torch.randn(VOCABULARY, D, generator=generator)
    labels = torch.randint(VOCABULARY, (tokens,), generator=generator)
    if sure:
        weight = torch.nn.functional.normalize(weight)
        h = weight[labels] * (60 + 40 * torch.rand(tokens, 1, generator=generator))
    ids = [torch.randint(VOCABULARY, (n + 5,), generator=generator) for n in range(len(COUNTS))]
    ids[2][:4] = labels[4]  # a word that is looked up more than once
    return {
        "h": h.to(dtype),
        "weight": weight.to(dtype),
        "labels": labels,
        "token_weight": torch.rand(tokens, generator=generator),
        "counts": torch.tensor(COUNTS),
        "lookups": Lookups(torch.cat(ids), torch.tensor([0, *[len(i) for i in ids]]).cumsum(0)),
    }


def run(case: dict[str, Any], scale: float = 1.0, softcap: float | None = None) -> head_norm.HeadNorm:
    """What the scorer does: the loss by its op, then the norm."""
    loss = linear_cross_entropy(case["h"], case["weight"], case["labels"], scale=scale, softcap=softcap).loss
    return head_norm.head_norm(**case, loss=loss, scale=scale, softcap=softcap)


def gradients(case: dict[str, Any], scale: float = 1.0, softcap: float | None = None) -> torch.Tensor:
    """Each row's gradient of the weight in float64, on the same rounded inputs."""
    h, weight = case["h"].double(), case["weight"].double()
    label = torch.nn.functional.one_hot(case["labels"], VOCABULARY).bool()
    z = h @ weight.T * scale
    slope = torch.full_like(z, scale)
    if softcap is not None:
        bent = torch.tanh(z / softcap)
        z, slope = softcap * bent, scale * (1 - bent * bent)
    p = z.softmax(1)
    # 1 - p of a sure model's label, as the sum of the others
    g = torch.where(label, -p.masked_fill(label, 0).sum(1, keepdim=True), p) * slope
    g *= case["token_weight"].double()[:, None]
    return torch.stack([x.T @ y for x, y in zip(g.split(COUNTS), h.split(COUNTS), strict=True)])


def assert_right(out: head_norm.HeadNorm, case: dict[str, Any], truth: torch.Tensor, rel: float) -> None:
    """Hold norms, and the inner product with a tied embedding, against the gradients themselves."""
    assert out.norm_sq.tolist() == pytest.approx(truth.square().sum((1, 2)).tolist(), rel=rel, abs=0)
    lookups = case["lookups"]
    g = torch.randn(len(lookups.ids), D, generator=torch.Generator().manual_seed(6))
    example = torch.arange(len(COUNTS)).repeat_interleave(lookups.bounds.diff())
    terms = truth[example, lookups.ids] * g
    want = torch.segment_reduce(terms.sum(1), "sum", lengths=lookups.bounds.diff())
    size = torch.segment_reduce(terms.abs().sum(1), "sum", lengths=lookups.bounds.diff())
    assert ((out.inner("head", lookups.ids, g) - want).abs() <= rel * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("scale", "softcap"), CASES.values(), ids=CASES.keys())
def test_norms_agree_with_the_gradients_themselves(scale: float, softcap: float | None, dtype: torch.dtype) -> None:
    case = head_case(dtype)
    assert_right(run(case, scale, softcap), case, gradients(case, scale, softcap), 1e-5)


@pytest.mark.parametrize("words", [7, 64, 8192])
@pytest.mark.parametrize("elements", [1, 700, 1 << 22])
def test_blocks_may_have_any_size(words: int, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORDS", {"cpu": words}), ("ELEMENTS", {"cpu": elements}), ("FEWEST", 3)):
        monkeypatch.setattr(head_norm, name, value)
    case = head_case(torch.float32)
    assert_right(run(case), case, gradients(case), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_sure_model_keeps_the_digits_of_its_small_norm(dtype: torch.dtype) -> None:
    case = head_case(dtype, sure=True)
    loss = linear_cross_entropy(case["h"], case["weight"], case["labels"]).loss
    assert float(loss.median()) < 1e-7
    assert_right(run(case), case, gradients(case), 1e-4)


def test_a_row_of_nan_stays_alone_and_a_second_run_has_the_same_bits() -> None:
    case = head_case(torch.float32)
    first, again = run(case), run(case)
    assert torch.equal(first.norm_sq, again.norm_sq)
    case["h"][3:12] = torch.nan
    broken = run(case)
    well = torch.arange(len(COUNTS)) != 2
    assert broken.norm_sq.isnan().tolist() == [not x for x in well.tolist()]
    assert torch.equal(broken.norm_sq[well], first.norm_sq[well])
    assert broken.rows is not None
    assert first.rows is not None
    spared = well.repeat_interleave(case["lookups"].bounds.diff())
    assert torch.equal(broken.rows[spared], first.rows[spared])


def test_no_labels_at_all_is_a_norm_of_zero() -> None:
    none = torch.zeros(0, D)
    out = head_norm.head_norm(
        none, torch.ones(5, D), torch.zeros(0, dtype=torch.int64), none[:, 0], None, torch.tensor([0, 0])
    )
    assert out.norm_sq.tolist() == [0, 0]


def test_other_lookups_than_the_batch_are_refused() -> None:
    case = head_case(torch.float32)
    out, ids = run(case), case["lookups"].ids
    for other in (ids + 1, ids[1:], torch.ones(len(ids), VOCABULARY)):
        with pytest.raises(ScoringError, match=r"'head\.weight' is used by the head and by more"):
            out.inner("head.weight", other, torch.ones(len(other), D))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and look at what it gives."""
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= x.numel() * x.element_size():
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_no_tensor_holds_an_entry_for_each_label_and_word(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in (("WORDS", {"cpu": 16}), ("FEWEST", 16)):
        monkeypatch.setattr(head_norm, key, value)
    monkeypatch.setattr(reference, "BLOCK", 16)
    model = make(name, torch.float32)
    batch = rows_of([17] * 24)
    labelled = int((batch["labels"] != -100).sum())
    with Scorer(model, direction_over(model).low_rank(2), norms=True) as scorer:
        scorer.score(batch)
        with Largest() as seen:
            scorer.score(batch)
        assert scorer.ways["head"] == "fused"
    assert 0 < seen.elements < labelled * model.config.vocab_size


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", ZOO)
def test_norms_with_a_fused_head_agree_with_autograd(
    name: str, packed: bool, reduction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not packed:
        monkeypatch.setattr(attention, "why_not", lambda model: "this test pads")
    model = make(name, torch.float32)
    direction = direction_over(model)
    batch = rows_of(LENGTHS, side="left")
    with Scorer(model, direction, loss_reduction=reduction, norms=True) as scorer:
        out = scorer.score(batch)
        assert scorer.ways["head"] == "fused"
        assert packed or scorer.ways["packing"].startswith("padded")
    assert out.norm is not None
    want = [row_truth(model, direction, row(batch, n), reduction=reduction).norm for n in range(len(LENGTHS))]
    assert out.norm.tolist() == pytest.approx(want, rel=1e-4)
