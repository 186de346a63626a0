"""What a run scores: cosine, stacked directions, cuts drawn anew, what cannot be scored, and options."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import BAD_LINES, lines, row

from gradshield_fast import Direction, Scorer, safety
from gradshield_fast.errors import InputError, ScoringError, UnalignedModelError
from gradshield_fast.loading import load_model
from gradshield_fast.pipeline import cutting, engine, options
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.options import (
    CutOptions,
    DirectionOptions,
    RunOptions,
    ScoringOptions,
)
from gradshield_fast.pipeline.run import recut, run
from gradshield_fast.pipeline.summary import excerpts, summarize
from tests.pipeline.folder_files import StopAt, read_parts


def test_cosine_divides_by_both_norms(asked: RunOptions, tmp_path: Path) -> None:
    run(replace(asked, scoring=replace(asked.scoring, norms=True), cut=None))
    cosine = replace(asked, out=tmp_path / "cos", scoring=replace(asked.scoring, normalize="cosine"), cut=None)
    run(cosine)
    dot, cos = read_parts(RunFolder(asked.out), 7), read_parts(RunFolder(cosine.out), 7)
    length = Direction.load(asked.out / "direction.safetensors").norm[0]
    assert cos.fihs[:, 0] == pytest.approx(dot.fihs[:, 0] / (dot.grad_norm * length), rel=1e-4)
    assert np.abs(cos.fihs).max() <= 1.0


def test_cosine_of_nothing_is_nothing() -> None:
    values = engine.cosine(np.array([[0.0], [2.0], [np.nan]]), np.array([0.0, 4.0, 1.0]), np.array([0.5]))
    assert values[:2, 0].tolist() == [0.0, 1.0]
    assert np.isnan(values[2, 0])


def test_stacked_directions_have_a_column_each(asked: RunOptions, direction: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.safetensors"
    loaded = Direction.load(direction)
    Direction({name: loaded.parts[0][name] for name in loaded.names[:5]}).save(half)
    both = replace(asked, direction=DirectionOptions(files=(direction, half)), cut=CutOptions(direction=1))
    run(both)
    table = pq.read_table(RunFolder(both.out).scores)
    assert table.column_names[2:4] == ["fihs", "fihs_1"]
    cut = json.loads((both.out / "threshold.json").read_text())
    assert cut["column"] == "fihs_1"
    above = sum(score > cut["value"] for score in table["fihs_1"].to_pylist())
    assert len((both.out / "dropped.jsonl").read_bytes().splitlines()) == above
    with pytest.raises(InputError, match="direction-index"):
        recut(both.out, CutOptions(direction=2))


def test_the_threshold_can_be_drawn_anew_and_the_corpus_may_have_moved(asked: RunOptions, tmp_path: Path) -> None:
    run(replace(asked, cut=None))
    (tmp_path / "elsewhere").mkdir()
    moved = Path(asked.corpus.path).rename(tmp_path / "elsewhere" / Path(asked.corpus.path).name)
    with pytest.raises(InputError, match="not found"):
        recut(asked.out, CutOptions())
    recut(asked.out, CutOptions(value=-1e30), moved)
    assert (asked.out / "kept.jsonl").read_bytes() == b""
    assert (asked.out / "dropped.jsonl").read_bytes() == moved.read_bytes()
    recut(asked.out, CutOptions(value=1e30), moved)
    assert (asked.out / "kept.jsonl").read_bytes() == moved.read_bytes()
    moved.write_bytes(moved.read_bytes().replace(b"capitals", b"Capitals"))
    with pytest.raises(InputError, match="has changed"):
        recut(asked.out, CutOptions(), moved)


def test_a_run_that_is_not_scored_has_no_threshold(asked: RunOptions, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(asked, StopAt(20))
    with pytest.raises(InputError, match="not scored to its end"):
        recut(asked.out, CutOptions())
    with pytest.raises(InputError, match="holds no run"):
        recut(tmp_path / "nowhere", CutOptions())


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A scorer that runs out of memory on more than two rows, or on a long one."""
    real, sizes = Scorer.score, []

    def score(self: Scorer, batch: Any) -> Any:
        rows, tokens = batch["input_ids"].shape
        sizes.append(rows)
        if rows > 2 or tokens > 75:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return real(self, batch)

    monkeypatch.setattr(Scorer, "score", score)
    return sizes


def test_a_batch_that_does_not_fit_is_halved(asked: RunOptions, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    run(replace(asked, cut=None))
    sizes = request.getfixturevalue("small_memory")
    small = replace(asked, out=tmp_path / "small", cut=None)
    run(small)
    assert max(sizes) > 2
    a, b = read_parts(RunFolder(asked.out), 7), read_parts(RunFolder(small.out), 7)
    long = a.tokens > 75
    assert 0 < long.sum() < 50
    assert [status for status, is_long in zip(b.status, long, strict=True) if is_long] == ["out_of_memory"] * long.sum()
    assert np.abs(a.fihs - b.fihs)[~long].max() <= 1e-4 * np.abs(a.fihs).max()
    manifest = json.loads((small.out / "run.json").read_text())
    assert manifest["sessions"][0]["halved_batches"] > 0


def test_a_row_that_is_not_finite_is_named_and_its_neighbours_are_scored(
    asked: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(replace(asked, cut=None))
    real = load_model

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        model, tokenizer = real(*args, **kwargs)
        token = tokenizer("7", add_special_tokens=False)["input_ids"][0]
        with torch.no_grad():
            model.model.embed_tokens.weight[token] = float("nan")
        return model, tokenizer

    monkeypatch.setattr("gradshield_fast.pipeline.worker.load_model", poisoned)
    other = replace(asked, out=tmp_path / "poisoned")
    run(other)
    a, b = read_parts(RunFolder(asked.out), 7), read_parts(RunFolder(other.out), 7)
    seven = np.array(["7" in str(number) for number in range(50)])
    assert [s == "non_finite" for s in b.status] == seven.tolist()
    assert np.isnan(b.fihs[seven]).all()
    assert np.abs(a.fihs - b.fihs)[~seven].max() <= 1e-4 * np.abs(a.fihs).max()
    unscored = [json.loads(line) for line in (other.out / "unscored.jsonl").read_bytes().splitlines()]
    assert [entry["id"] for entry in unscored] == [f"r{n}" for n in np.flatnonzero(seven)]


def test_a_model_with_a_nan_weight_is_one_line(asked: RunOptions, nan_model: Path) -> None:
    with pytest.raises(ScoringError, match="not finite"):
        run(replace(asked, model=replace(asked.model, name=str(nan_model))))
    assert not (asked.out / "kept.jsonl").exists()


def test_a_corpus_without_one_good_row_keeps_none(asked: RunOptions) -> None:
    Path(asked.corpus.path).write_bytes(b"\n".join(BAD_LINES[name] for name in ("bad_json", "bad_row", "no_response")))
    run(asked)
    assert (asked.out / "kept.jsonl").read_bytes() == (asked.out / "dropped.jsonl").read_bytes() == b""
    assert len((asked.out / "unscored.jsonl").read_bytes().splitlines()) == 3
    assert json.loads((asked.out / "threshold.json").read_text())["value"] is None
    assert summarize(asked.out, top=3).top == []


def test_more_scores_than_are_held_are_cut_by_a_histogram(asked: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    run(asked)
    exact = json.loads((asked.out / "threshold.json").read_text())
    scores = read_parts(RunFolder(asked.out), 7).fihs
    monkeypatch.setattr(cutting, "EXACT_SCORES", 20)
    recut(asked.out, CutOptions())
    cut = json.loads((asked.out / "threshold.json").read_text())
    assert (cut["kind"], cut["n"]) == (exact["kind"], exact["n"])
    assert abs(cut["value"] - exact["value"]) <= 1e-3 * np.ptp(scores)


def test_rows_are_cut_to_the_context_and_not_beyond(asked: RunOptions) -> None:
    long = [{"prompt": "x " * 400, "response": "y"}, {"prompt": "x", "response": "y " * 400}]
    Path(asked.corpus.path).write_bytes(lines([*long, row(1)]))
    run(asked)
    scores = read_parts(RunFolder(asked.out), 1)
    assert scores.status == ["no_response_after_truncation", "truncated", "ok"]
    assert scores.tokens.max() == 256
    with pytest.raises(InputError, match="context of 256"):
        run(replace(asked, out=asked.out / "x", scoring=replace(asked.scoring, max_length=257)))


def test_direction_is_built_from_probes_compressed_and_kept(asked: RunOptions, tmp_path: Path) -> None:
    probes = tmp_path / "probes.json"
    texts = {"prompts": ["Do harm.", "Hurt."], "refusals": ["I cannot."], "compliances": ["Sure, here is"]}
    probes.write_text(json.dumps(texts))
    asked = replace(asked, direction=DirectionOptions(probes=probes, score="refusal_margin", rank=2))
    run(asked)
    made = Direction.load(asked.out / "direction.safetensors")
    assert 0.0 < made.residual < 1.0
    manifest = json.loads((asked.out / "run.json").read_text())
    assert manifest["direction"]["residual"] == made.residual
    assert manifest["direction"]["meta"]["safety"]["score"] == "refusal_margin"
    dense = replace(asked, out=tmp_path / "dense", direction=replace(asked.direction, rank=0))
    run(dense)
    assert Direction.load(dense.out / "direction.safetensors").residual == 0.0


def test_a_score_that_would_mislead_stops_the_run(asked: RunOptions, tmp_path: Path) -> None:
    probes = tmp_path / "probes.json"
    probes.write_text(json.dumps({"prompts": ["x"], "refusals": ["I cannot."], "compliances": ["Sure, here is"]}))
    build = DirectionOptions(probes=probes, score="refusal_logprob", rank=2)
    with pytest.raises(UnalignedModelError, match="refusal_margin"):
        run(replace(asked, direction=build))
    allowed = replace(asked, out=tmp_path / "allowed", direction=replace(build, allow_unaligned=True))
    run(allowed)
    manifest = json.loads((allowed.out / "run.json").read_text())
    assert manifest["direction"]["meta"]["options"]["allow_unaligned"] is True


def test_a_direction_with_wrong_names_or_shapes(asked: RunOptions, tmp_path: Path) -> None:
    wrong = {"names": {"model.nothing.weight": torch.ones(3)}, "shapes": {"lm_head.weight": torch.ones(3, 3)}}
    for what, tensors in wrong.items():
        path = tmp_path / f"{what}.safetensors"
        Direction(tensors).save(path)
        bad = replace(asked, out=tmp_path / what, direction=DirectionOptions(files=(path,)))
        with pytest.raises(InputError, match=next(iter(tensors))):
            run(bad)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda: DirectionOptions(score="kindness"), "--score"),
        (lambda: DirectionOptions(rank=2, energy=0.5), "one of them"),
        (lambda: DirectionOptions(rank=-1), "--rank"),
        (lambda: DirectionOptions(files=(Path("d"),), weights="x"), "--weights"),
        (lambda: ScoringOptions(normalize="l1"), "--normalize"),
        (lambda: ScoringOptions(loss_reduction="max"), "--loss-reduction"),
        (lambda: ScoringOptions(batch_tokens=0), "--batch-tokens"),
        (lambda: CutOptions(alpha=1.0, value=1.0), "one of them"),
        (lambda: CutOptions(value=float("nan")), "--threshold"),
        (lambda: CutOptions(direction=-1), "--direction-index"),
    ],
)
def test_options_are_checked_before_anything_is_read(make: Callable[[], object], part: str) -> None:
    with pytest.raises(InputError, match=part):
        make()


def test_the_safety_scores_are_those_of_the_library() -> None:
    assert (*safety.SCORES, "identity_margin") == options.SAFETY_SCORES


def test_excerpts_are_one_line_of_the_rows_that_were_asked_for(asked: RunOptions) -> None:
    texts = excerpts(asked.corpus, [3, 40], chars=40)
    assert list(texts) == [3, 40]
    assert texts[3].startswith("Question 3:")
    assert all("\n" not in text and len(text) <= 44 for text in texts.values())
