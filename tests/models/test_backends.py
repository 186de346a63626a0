"""The Scorer on each backend: the same scores, and a result that says what ran."""

from __future__ import annotations

import pytest
import torch

from gradshield_fast import Scorer, scorer
from gradshield_fast.errors import BackendUnavailable, InputError
from gradshield_fast.ops import native
from tests.models.zoo import direction_over, make, rows_of

LENGTHS = [9, 4, 17]
needs_native = pytest.mark.skipif(native.extension is None, reason=native.missing)


@needs_native
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rank", [None, 2])
def test_native_gives_the_reference_scores(
    name: str, dtype: torch.dtype, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if dtype == torch.bfloat16:
        # a fused head may round what it hands back differently on each backend, and a bfloat16 model carries that on:
        # with its own head and attention it gives both the same activations and gradients
        monkeypatch.setattr(scorer, "faster_call", lambda model, plan, calibration, **_: (calibration.call, {}))
    model = make(name, torch.float32).to(dtype)
    direction, batch = direction_over(model), rows_of(LENGTHS)
    direction = direction if rank is None else direction.low_rank(rank=rank)
    out = {}
    for backend in ("native", "reference"):
        with Scorer(model, direction, backend=backend, norms=True) as it:
            out[backend] = it.score(batch)
        # attention is the model's own work, not scoring, and takes what is best whatever the backend
        assert {ran for op, ran in out[backend].backends.items() if op != "varlen_attention"} == {backend}
    fast, slow = out["native"], out["reference"]
    assert fast.norm is not None
    assert slow.norm is not None
    # |s| <= norm * ||r||: what the sum of terms is of the order of
    size = slow.norm[:, None] * torch.tensor(direction.norm, dtype=torch.float32)
    assert ((fast.dot - slow.dot).abs() <= 1e-5 * size).all()
    torch.testing.assert_close(fast.norm, slow.norm, rtol=1e-5, atol=0)


def test_the_result_says_what_ran() -> None:
    model = make("llama", torch.float32)
    batch = rows_of(LENGTHS)
    with Scorer(model, direction_over(model)) as it:
        assert it.backends == {}
        ran = it.score(batch).backends
    assert set(ran) == {"embedding_dot", "ghost_dot", "scale_dot", "linear_cross_entropy", "varlen_attention"}
    assert set(ran.values()) <= {"native", "reference"}


def test_a_named_backend_that_cannot_score_the_model_raises_before_anything_runs() -> None:
    model = make("llama", torch.float64)
    direction = direction_over(model)
    with pytest.raises(BackendUnavailable, match="ghost_dot: backend 'triton' cannot score this model: "):
        Scorer(model, direction, backend="triton")
    with pytest.raises(BackendUnavailable, match=r"float64 runs on the reference|extension"):
        Scorer(model, direction, backend="native")
    with pytest.raises(InputError, match="backend must be one of auto"):
        Scorer(model, direction, backend="cuda")


@needs_native
def test_a_refusal_in_the_middle_is_not_taken_for_a_rule_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    from gradshield_fast.ops.ghost_dot import kernel_native

    model = make("llama", torch.float32)
    with Scorer(model, direction_over(model), backend="native") as scorer:
        monkeypatch.setattr(kernel_native, "why_not", lambda *inputs: "not on a Tuesday")
        with pytest.raises(BackendUnavailable, match="not on a Tuesday"):
            scorer.score(rows_of(LENGTHS))
