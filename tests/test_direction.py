from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gradshield_fast import Direction, Scorer
from gradshield_fast.errors import InputError
from gradshield_fast.fingerprint import model_fingerprint
from gradshield_fast.lowrank import LowRank, factor
from tests.models.zoo import direction_over, make, rows_of


def low_rank_matrix(rows: int, cols: int, spectrum: list[float]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(rows, len(spectrum), generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(cols, len(spectrum), generator=generator, dtype=torch.float64))[0]
    return u @ torch.diag(torch.tensor(spectrum, dtype=torch.float64)) @ v.T


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (400, 12), (12, 400)])
def test_low_rank_is_the_best_approximation_and_reports_what_it_dropped(shape: tuple[int, int]) -> None:
    r = low_rank_matrix(*shape, [5, 3, 1, 0.5, 0.1])
    direction = Direction({"w": r}).low_rank(2)
    entry = direction.parts[0]["w"]
    assert isinstance(entry, LowRank)
    assert entry.rank == 2
    dropped, total = 1 + 0.25 + 0.01, 25 + 9 + 1 + 0.25 + 0.01
    torch.testing.assert_close((entry.dense() - r).square().sum().item(), dropped, rtol=1e-9, atol=0)
    assert direction.residual == pytest.approx((dropped / total) ** 0.5, rel=1e-9)
    assert direction.norm[0] == pytest.approx((total - dropped) ** 0.5, rel=1e-9)
    torch.testing.assert_close(entry.q.T @ entry.q, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(("energy", "rank"), [(0.5, 1), (0.7, 1), (0.75, 2), (0.97, 3), (0.9999, 5), (1.0, 5)])
def test_energy_takes_the_smallest_rank_that_keeps_it(energy: float, rank: int) -> None:
    entry = Direction({"w": low_rank_matrix(60, 60, [5, 3, 1, 0.5, 0.1])}).low_rank(energy=energy).parts[0]["w"]
    assert isinstance(entry, LowRank)
    assert entry.rank == rank


def test_randomised_factors_of_a_large_matrix_are_nearly_the_best() -> None:
    r = low_rank_matrix(300, 260, [2.0**-k for k in range(60)]) + 1e-3 * torch.randn(300, 260, dtype=torch.float64)
    exact = torch.linalg.svdvals(r)[8:].square().sum()
    again = [factor(r, rank=8, energy=None) for _ in range(2)]
    assert again[0][1] <= 1.001 * float(exact)
    assert torch.equal(again[0][0].p, again[1][0].p)


def test_vectors_small_and_zero_matrices_stay_dense() -> None:
    tensors = {"v": torch.randn(9), "m": torch.randn(4, 5), "zero": torch.zeros(90, 80), "e": torch.randn(3, 40, 40)}
    compressed = Direction(tensors).low_rank(3)
    assert all(isinstance(entry, torch.Tensor) for entry in compressed.parts[0].values())
    assert compressed.residual == 0


def test_precondition_divides_by_the_root_and_then_adds_eps() -> None:
    r, v = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 0.0, 1e-16])
    out = Direction({"w": r}).precondition({"w": v, "other": v}, eps=1e-8).parts[0]["w"]
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out, r / (v.sqrt() + 1e-8))
    assert float(out[1]) == pytest.approx(2e8)


def test_precondition_is_the_first_step_of_adam() -> None:
    """<grad, r / (sqrt(v) + eps)> is minus the change of S under torch's Adam without momentum, to first order."""
    w = torch.nn.Parameter(torch.randn(6, dtype=torch.float64))
    optimiser = torch.optim.Adam([w], lr=1e-3, betas=(0.0, 0.999), eps=1e-4)
    w.grad = torch.randn(6, dtype=torch.float64)
    before = w.detach().clone()
    optimiser.step()
    v = optimiser.state[w]["exp_avg_sq"] / (1 - 0.999)  # bias-corrected
    r = torch.randn(6, dtype=torch.float64)
    scored = (w.grad * Direction({"w": r}).precondition({"w": v}, eps=1e-4).parts[0]["w"]).sum()  # pyright: ignore
    torch.testing.assert_close((w.detach() - before) @ r, -1e-3 * scored)


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ({}, "no entry for weight 'w'"),
        ({"w": torch.ones(2)}, r"'w' is \(3,\), but its entry in the second moment is \(2,\)"),
        ({"w": torch.tensor([1.0, -1.0, 1.0])}, "negative or not finite in weight 'w'"),
        ({"w": torch.tensor([1.0, float("nan"), 1.0])}, "negative or not finite"),
    ],
)
def test_a_wrong_second_moment_is_named(moment: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Direction({"w": torch.ones(3)}).precondition(moment)


def test_second_moment_file(tmp_path: Path) -> None:
    save_file({"w": torch.full((3,), 4.0)}, tmp_path / "v.safetensors")
    out = Direction({"w": torch.ones(3)}).precondition(tmp_path / "v.safetensors", eps=0).parts[0]["w"]
    assert torch.equal(out, torch.full((3,), 0.5))  # pyright: ignore[reportArgumentType]
    (tmp_path / "v.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(InputError, match=r"v\.safetensors: cannot read the second moment"):
        Direction({"w": torch.ones(3)}).precondition(tmp_path / "v.safetensors")


def test_save_and_load_give_the_same_bits(tmp_path: Path) -> None:
    stacked = Direction.stack(
        [
            Direction({"w": torch.randn(40, 50), "b": torch.randn(3)}, meta={"score": "refusal_logprob"}).low_rank(2),
            Direction({"w": torch.randn(40, 50)}),
        ]
    )
    path = tmp_path / "d.safetensors"
    stacked.save(path)
    loaded = Direction.load(path)
    assert loaded.count == 2
    assert loaded.meta == json.loads(json.dumps(stacked.meta))
    assert (loaded.residual, loaded.residuals) == (stacked.residual, stacked.residuals)
    for one, two in zip(stacked.parts, loaded.parts, strict=True):
        assert one.keys() == two.keys()
        for name, entry in one.items():
            other = two[name]
            if isinstance(entry, LowRank):
                assert isinstance(other, LowRank)
                assert torch.equal(entry.p, other.p)
                assert torch.equal(entry.q, other.q)
            else:
                assert torch.equal(entry, other)  # pyright: ignore[reportArgumentType]
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_any_safetensors_file_of_tensors_is_a_direction(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2, 2, dtype=torch.bfloat16)}, tmp_path / "plain.safetensors")
    entry = Direction.load(tmp_path / "plain.safetensors").parts[0]["w"]
    assert isinstance(entry, torch.Tensor)
    assert entry.dtype == torch.float32


def test_a_direction_of_another_model_is_refused(tmp_path: Path) -> None:
    model = make("qwen2", torch.float32)
    direction = direction_over(model)
    direction.meta["model"] = model_fingerprint(model)
    direction.save(tmp_path / "d.safetensors")
    assert Direction.load(tmp_path / "d.safetensors", model).names
    assert Direction.load(tmp_path / "d.safetensors", make("qwen2", torch.float32).to(torch.bfloat16)).names
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.1)
    with pytest.raises(InputError, match=r"d\.safetensors: direction: it was made for a model with other weights"):
        Direction.load(tmp_path / "d.safetensors", model)
    with pytest.raises(InputError, match="made for a model with other weights"):
        Scorer(model, direction)


def test_wrong_names_and_shapes_are_named() -> None:
    model = make("qwen2", torch.float32)
    with pytest.raises(
        InputError, match=r"no weight 'layers.0.mlp.up_proj.weight'.*'model.layers.0.mlp.up_proj.weight'"
    ):
        Scorer(model, Direction({"layers.0.mlp.up_proj.weight": torch.randn(48, 32)}))
    with pytest.raises(InputError, match=r"is \(48, 32\) in the model, but \(32, 48\) in the direction"):
        Scorer(model, Direction({"model.layers.0.mlp.up_proj.weight": torch.randn(32, 48)}))


def test_what_cannot_be_a_direction_is_refused() -> None:
    with pytest.raises(InputError, match="no tensors"):
        Direction({})
    with pytest.raises(InputError, match="'w' has NaN"):
        Direction({"w": torch.tensor([1.0, float("nan")])})
    with pytest.raises(InputError, match="'w' must be a floating-point tensor"):
        Direction({"w": torch.ones(2, dtype=torch.int64)})
    one = Direction({"w": torch.randn(40, 40)})
    for options in ({}, {"rank": 2, "energy": 0.5}, {"rank": 0}, {"energy": 1.5}):
        with pytest.raises(InputError, match=r"low_rank"):
            one.low_rank(**options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="low-rank already"):
        one.low_rank(2).low_rank(1)
    with pytest.raises(InputError, match="precondition it, then compress"):
        one.low_rank(2).precondition({"w": torch.ones(40, 40)})
    with pytest.raises(InputError, match="different shapes"):
        Direction.stack([one, Direction({"w": torch.randn(4, 4)})])
    with pytest.raises(InputError, match="different models"):
        Direction.stack([Direction({"w": torch.ones(2)}, meta={"model": m}) for m in ("a", "b")])
    with pytest.raises(InputError, match="empty list"):
        Direction.stack([])


def test_the_same_direction_is_saved_as_the_same_bytes(tmp_path: Path) -> None:
    direction = Direction({"w": torch.ones(4, 3), "b": torch.ones(4)}, meta={"a": 1, "b": [2]})
    saved = set()
    for n in range(8):
        direction.save(tmp_path / f"{n}.safetensors")
        saved.add((tmp_path / f"{n}.safetensors").read_bytes())
    assert len(saved) == 1


def test_files_that_are_not_directions_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nothing\.safetensors: no such direction file"):
        Direction.load(tmp_path / "nothing.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(InputError, match=r"broken\.safetensors: not a readable direction file"):
        Direction.load(tmp_path / "broken.safetensors")
    save_file(
        {"0/p/w": torch.ones(2, 2)},
        tmp_path / "half.safetensors",
        {"format": "gradshield_fast.direction.1", "direction": '{"count": 1}'},
    )
    with pytest.raises(InputError, match=r"half\.safetensors: not a readable direction file"):
        Direction.load(tmp_path / "half.safetensors")


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match="No space left on device"):
        Direction({"w": torch.ones(2)}).save(tmp_path / "d.safetensors")
    assert not list(tmp_path.iterdir())


def test_fihs_sign_a_step_along_a_positive_row_lowers_the_score() -> None:
    """<grad loss, grad S> > 0 means that a descent step on the row lowers S: checked by taking the step."""
    model = make("qwen2")
    score_batch, batch = rows_of([11], seed=5), rows_of([9, 12, 7, 10], seed=6)

    def score() -> torch.Tensor:
        logits = model(input_ids=score_batch["input_ids"]).logits[0, :-1]
        return -torch.nn.functional.cross_entropy(logits, score_batch["labels"][0, 1:])

    model.eval()
    weights = dict(model.named_parameters())
    grads = torch.autograd.grad(score(), list(weights.values()))
    with Scorer(model, Direction(dict(zip(weights, grads, strict=True)))) as scorer:
        fihs = scorer.score(batch).dot[:, 0]
    before = float(score().detach())
    for n in range(4):
        logits = model(input_ids=batch["input_ids"][n : n + 1]).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, batch["labels"][n, 1:])
        steps = torch.autograd.grad(loss, list(weights.values()))
        with torch.no_grad():
            for w, g in zip(weights.values(), steps, strict=True):
                w -= 1e-4 * g
            change = float(score().detach()) - before
            for w, g in zip(weights.values(), steps, strict=True):
                w += 1e-4 * g
        assert change == pytest.approx(-1e-4 * float(fihs[n]), rel=0.05, abs=1e-6)
