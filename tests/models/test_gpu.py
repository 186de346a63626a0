"""Whole models on a GPU: every way to score there against autograd in float64 on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gradshield_fast import Direction, Scorer
from gradshield_fast.repeated import repeated_layers
from tests.models.zoo import ZOO, direction_over, make, row, rows_of
from tests.oracle import Truth, row_truth

pytestmark = pytest.mark.gpu

LENGTHS = [17, 5, 11, 2, 30, 9, 14, 21]
BOUND = 1e-5
SIXTEEN_BITS = sorted({"llama-tied", "qwen3", "mistral", "gpt2"} & set(ZOO))
COMPILED = sorted({"llama-tied", "qwen3", "gpt2"} & set(ZOO))


@pytest.fixture(autouse=True)
def _own_measurements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def truths(name: str, dtype: torch.dtype, direction: Direction) -> list[Truth]:
    """Autograd's answer for each row, in float64 on the CPU, of a model with weights of some dtype."""
    exact = make(name, dtype).double()
    return [row_truth(exact, direction, row(rows_of(LENGTHS), n)) for n in range(len(LENGTHS))]


def worst(scores: torch.Tensor, want: list[Truth]) -> float:
    """The largest error of a row, in units of the sum of its terms' magnitudes."""
    return max(float(((got.cpu().double() - x.dot).abs() / x.size).max()) for got, x in zip(scores, want, strict=True))


@pytest.mark.parametrize("name", ZOO)
def test_float32_agrees_with_autograd_in_float64(name: str) -> None:
    model = make(name, torch.float32)
    direction = direction_over(model)
    want = truths(name, torch.float32, direction)
    with Scorer(model.cuda(), direction, norms=True) as it:
        out = it.score(rows_of(LENGTHS))
        again = it.score(rows_of(LENGTHS))
    assert out.valid.all()
    assert out.dot.device.type == "cuda"
    assert worst(out.dot, want) <= BOUND
    assert torch.equal(out.dot, again.dot)
    assert out.norm is not None
    assert out.norm.tolist() == pytest.approx([x.norm for x in want], rel=1e-4)
    assert out.loss.tolist() == pytest.approx([x.loss for x in want], rel=1e-4)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_a_named_backend_scores_a_whole_model(backend: str, rank: int | None) -> None:
    if backend == "triton":
        pytest.importorskip("triton", reason="Triton is not installed")
    model = make("llama-tied", torch.float32)
    dense = direction_over(model)
    direction = dense if rank is None else dense.low_rank(rank)
    want = truths("llama-tied", torch.float32, direction)
    with Scorer(model.cuda(), direction, backend=backend, norms=True, token_scores=True) as it:
        out = it.score(rows_of(LENGTHS))
    assert {ran for op, ran in out.backends.items() if op != "varlen_attention"} == {backend}
    assert worst(out.dot, want) <= BOUND
    assert out.token_dot is not None
    assert worst(out.token_dot.sum(1), want) <= BOUND


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_16_bit_models_run_packed_and_correlate_with_float64(name: str, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    direction = direction_over(model)
    want = torch.cat([x.dot for x in truths(name, dtype, direction)])
    with Scorer(model.cuda(), direction, norms=True) as it:
        out = it.score(rows_of(LENGTHS))
        ways = it.ways
    assert out.valid.all()
    assert out.dot.dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([out.dot[:, 0].cpu().double(), want]))[0, 1]) > 0.99
    assert ways["head"] == "fused"
    assert ways["packing"] == "packed", ways


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("name", COMPILED)
@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ by version
def test_compiled_layers_score_right(name: str, norms: bool, dtype: torch.dtype) -> None:
    model = make(name, dtype)
    direction = direction_over(model).low_rank(2)
    want = truths(name, dtype, direction)
    breaks = torch._dynamo.utils.counters["graph_break"]
    breaks.clear()
    with Scorer(model.cuda(), direction, norms=norms, compile=True) as it:
        out = it.score(rows_of(LENGTHS))
        ways = it.ways
    assert ways["compile"].startswith(f"{len(repeated_layers(model))} layers of ")
    assert not breaks
    if dtype == torch.float32:
        assert worst(out.dot, want) <= BOUND
    else:
        both = torch.stack([out.dot[:, 0].cpu().double(), torch.cat([x.dot for x in want])])
        assert float(torch.corrcoef(both)[0, 1]) > 0.99
    if norms:
        assert out.norm is not None
        rel = 1e-4 if dtype == torch.float32 else 0.2
        assert out.norm.tolist() == pytest.approx([x.norm for x in want], rel=rel)


@pytest.mark.parametrize("name", SIXTEEN_BITS)
def test_checkpointed_layers_score_the_same_bits(name: str) -> None:
    outs = []
    for checkpoint in (False, True):
        model = make(name, torch.bfloat16).cuda()
        with Scorer(model, direction_over(model).low_rank(2), checkpoint=checkpoint) as it:
            outs.append(it.score(rows_of(LENGTHS)).dot)
    assert torch.equal(*outs)


def test_verify_passes_on_a_gpu() -> None:
    model = make("qwen3", torch.float32).cuda()
    with Scorer(model, direction_over(model), verify=True) as it:
        assert it.score(rows_of(LENGTHS)).valid.all()


def test_work_goes_to_the_current_stream() -> None:
    model = make("llama", torch.float32).cuda()
    direction = direction_over(model)
    with Scorer(model, direction) as it:
        it.settle(rows_of(LENGTHS))
        batch = {key: value.cuda() for key, value in rows_of(LENGTHS).items()}
        want = it.score(batch).dot
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            late = {key: torch.ones_like(value) for key, value in batch.items()}
            torch.cuda._sleep(20_000_000)
            for key, value in batch.items():
                late[key].copy_(value)
            got = it.score(late).dot
        stream.synchronize()
    assert torch.equal(got, want)
