"""Every architecture against autograd, one row at a time, with a direction over every parameter."""

from __future__ import annotations

import pytest
import torch

from gradshield_fast import Scorer
from tests.models.zoo import ZOO, direction_over, make, row, rows_of
from tests.oracle import row_truth

LENGTHS = [17, 5, 11, 2]
ALONE = {torch.float64: 1e-9, torch.float32: 1e-5}
# Most of these models work in float32 somewhere inside (softmax, rotary angles, routers) even as float64 models, and
# round differently in a batch of another shape: the loss itself moves by as much.
# Mamba 2 scans in float32: forward-mode and reverse-mode derivatives of the same values differ by that rounding.
SCANS_IN_FLOAT32 = 1e-8
IN_BATCH = {torch.float64: 1e-7, torch.float32: 1e-5}


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_scores_norms_and_losses_agree_with_autograd(name: str, dtype: torch.dtype, norms: bool) -> None:
    model = make(name, dtype)
    direction = direction_over(model)
    batch = rows_of(LENGTHS)
    with Scorer(model, direction, norms=norms) as scorer:
        together = scorer.score(batch)
        alone = [scorer.score(row(batch, n)) for n in range(len(LENGTHS))]
    assert together.valid.all()
    for n, single in enumerate(alone):
        truth = row_truth(model, direction, row(batch, n))
        bound = max(ALONE[dtype], SCANS_IN_FLOAT32) if name == "mamba2" else ALONE[dtype]
        assert abs(single.dot[0].double() - truth.dot) <= bound * truth.size
        assert abs(together.dot[n].double() - truth.dot) <= IN_BATCH[dtype] * truth.size
        assert float(together.loss[n]) == pytest.approx(truth.loss, rel=1e-6 if dtype == torch.float64 else 1e-4)
        if norms:
            assert single.norm is not None
            assert together.norm is not None
            rel = 1e-6 if dtype == torch.float64 else 1e-4
            assert [float(single.norm[0]), float(together.norm[n])] == pytest.approx([truth.norm] * 2, rel=rel)


@pytest.mark.parametrize("name", ZOO)
def test_verify_passes_at_the_promised_bound(name: str) -> None:
    model = make(name)
    with Scorer(model, direction_over(model), verify=True) as scorer:
        assert scorer.score(rows_of(LENGTHS)).valid.all()


@pytest.mark.parametrize(
    "name", sorted({"llama-tied", "qwen3", "gemma3", "gpt2", "falcon", "qwen3-moe", "mamba"} & set(ZOO))
)
def test_bfloat16_scores_correlate_with_float64(name: str) -> None:
    batch = rows_of([17, 5, 11, 2, 9, 14, 16, 8], seed=3)
    scores = []
    for dtype in (torch.float64, torch.bfloat16):
        model = make(name, torch.bfloat16).to(dtype)
        with Scorer(model, direction_over(model)) as scorer:
            out = scorer.score(batch)
        assert out.dot.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        scores.append(out.dot[:, 0].double())
    assert float(torch.corrcoef(torch.stack(scores))[0, 1]) > 0.98


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_reduction(reduction: str) -> None:
    model = make("qwen2")
    direction = direction_over(model)
    batch = rows_of(LENGTHS)
    with Scorer(model, direction, loss_reduction=reduction) as scorer:
        out = scorer.score(batch)
    for n in range(len(LENGTHS)):
        truth = row_truth(model, direction, row(batch, n), reduction=reduction)
        assert abs(out.dot[n] - truth.dot) <= 1e-7 * truth.size
