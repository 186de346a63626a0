"""A run's folder: every row once, the scores of the scorer itself, and the same files however often it was stopped."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import BAD_LINES, corpus, lines, row

from gradshield_fast import Direction, Scorer, safety
from gradshield_fast.chat import ChatEncoder
from gradshield_fast.errors import InputError, ScoringError, UnalignedModelError
from gradshield_fast.loading import load_model
from gradshield_fast.memory import Choice
from gradshield_fast.pipeline import engine, options
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.options import (
    CorpusOptions,
    CutOptions,
    DirectionOptions,
    ModelOptions,
    RunOptions,
    ScoringOptions,
)
from gradshield_fast.pipeline.parts import read_parts
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.run import recut, run
from gradshield_fast.pipeline.summary import excerpts, summarize

COLUMNS = ["row", "id", "fihs", "grad_norm", "loss", "tokens", "response_tokens", "status", "reason"]


@pytest.fixture(scope="module")
def direction(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random direction over every weight of the tiny model."""
    model, _ = load_model(str(tiny_model), device="cpu")
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(w.shape, generator=generator) for name, w in model.named_parameters()}
    path = tmp_path_factory.mktemp("direction") / "d.safetensors"
    Direction(tensors).save(path)
    return path


@pytest.fixture
def asked(tiny_model: Path, direction: Path, tmp_path: Path) -> RunOptions:
    return RunOptions(
        corpus=CorpusOptions(corpus(tmp_path / "corpus.jsonl", 50)),
        model=ModelOptions(str(tiny_model), device="cpu"),
        out=tmp_path / "run",
        direction=DirectionOptions(files=(direction,)),
        scoring=ScoringOptions(batch_tokens=256, part_rows=8),
    )


def files(folder: Path) -> dict[str, bytes]:
    """Everything a run leaves that must not depend on where it was stopped; safetensors orders its header by chance."""
    aside = ("run.json", ".lock", "direction.safetensors")
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in aside]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_scores_are_the_scorers_own(asked: RunOptions) -> None:
    assert run(asked)
    model, tokenizer = load_model(asked.model.name, device="cpu")
    encoder = ChatEncoder(tokenizer)
    table = pq.read_table(RunFolder(asked.out).scores)
    assert table.column_names == COLUMNS
    assert table["row"].to_pylist() == list(range(50))
    assert table["id"].to_pylist() == [f"r{n}" for n in range(50)]
    with Scorer(model, Direction.load(asked.out / "direction.safetensors", model)) as scorer:
        for number in (0, 13, 49):
            encoded = encoder.encode(row(number)["messages"])
            alone = scorer.score({"input_ids": [encoded.input_ids], "labels": [encoded.labels]})
            assert table["fihs"][number].as_py() == pytest.approx(float(alone.dot[0, 0]), rel=1e-3, abs=1e-3)
            assert table["loss"][number].as_py() == pytest.approx(float(alone.loss[0]), rel=1e-5)
            assert table["tokens"][number].as_py() == len(encoded.input_ids)
            assert table["response_tokens"][number].as_py() == encoded.response_tokens
    assert table["grad_norm"].null_count == 50


def test_every_row_is_in_exactly_one_output_byte_for_byte(asked: RunOptions) -> None:
    good = lines(row(number) for number in range(12)).splitlines()
    bad = list(BAD_LINES.values())
    mixed = [line for pair in zip(good, bad * 2, strict=False) for line in pair]
    asked.corpus.path.write_bytes(b"\n".join(mixed) + b"\r\n\n")
    asked = replace(asked, corpus=replace(asked.corpus, max_row_bytes=4000))
    run(asked)
    kept, dropped = ((asked.out / f"{name}.jsonl").read_bytes().splitlines() for name in ("kept", "dropped"))
    unscored = [json.loads(line) for line in (asked.out / "unscored.jsonl").read_bytes().splitlines()]
    assert sorted(kept + [line.rstrip(b"\r") for line in dropped]) == sorted(good)
    assert [entry["row"] for entry in unscored] == list(range(1, 24, 2))
    assert [entry["status"] for entry in unscored] == list(BAD_LINES) * 2
    assert all(entry["reason"] for entry in unscored)
    manifest = json.loads((asked.out / "run.json").read_text())
    assert manifest["counts"]["kept"] + manifest["counts"]["dropped"] + manifest["counts"]["unscored"] == 24


def test_rows_above_the_threshold_are_dropped_and_no_others(asked: RunOptions) -> None:
    run(asked)
    cut = json.loads((asked.out / "threshold.json").read_text())
    scores = pq.read_table(RunFolder(asked.out).scores)
    above = [i for i, s in zip(scores["id"].to_pylist(), scores["fihs"].to_pylist(), strict=True) if s > cut["value"]]
    dropped = [json.loads(line)["id"] for line in (asked.out / "dropped.jsonl").read_bytes().splitlines()]
    assert dropped == above


class StopAt(Reporter):
    """Interrupts a run once it has scored so many rows."""

    def __init__(self, rows: int) -> None:
        self.left = rows
        self.stages: list[str] = []

    def stage(self, title: str, total: int | None = None, unit: str = "rows", done: int = 0) -> None:
        self.stages.append(title)

    def advance(self, count: int, tokens: int = 0) -> None:
        if self.stages[-1] == "scoring":
            self.left -= count
            if self.left <= 0:
                raise KeyboardInterrupt


def test_a_run_that_is_stopped_and_goes_on_leaves_the_same_bytes(asked: RunOptions, tmp_path: Path) -> None:
    run(asked)
    stopped = replace(asked, out=tmp_path / "stopped")
    for rows in (1, 10, 30):
        with pytest.raises(KeyboardInterrupt):
            run(stopped, StopAt(rows))
    committed = sorted(path.name for path in RunFolder(stopped.out).scores.iterdir())
    assert 0 < len(committed) < 7
    assert not (stopped.out / "kept.jsonl").exists()
    before = {path: path.stat().st_mtime_ns for path in RunFolder(stopped.out).scores.iterdir()}
    assert run(stopped)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())
    assert files(stopped.out) == files(asked.out)
    assert not run(stopped)


def choosing(tokens: int) -> Callable[..., Choice]:
    return lambda scorer, longest: Choice(tokens, f"the test's choice for rows of {longest}")


def test_a_batch_size_is_chosen_once(asked: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(asked, out=tmp_path / "whole", scoring=replace(asked.scoring, batch_tokens=64))
    run(whole)
    auto = replace(asked, scoring=replace(asked.scoring, batch_tokens="auto"))
    monkeypatch.setattr("gradshield_fast.memory.choose_batch_tokens", choosing(64))
    with pytest.raises(KeyboardInterrupt):
        run(auto, StopAt(20))
    # more memory is free now, which must not matter
    monkeypatch.setattr("gradshield_fast.memory.choose_batch_tokens", choosing(4096))
    assert run(auto)
    record = json.loads((auto.out / "run.json").read_text())
    assert record["batches"]["tokens"] == 64
    assert record["identity"]["scoring"]["batch_tokens"] == "auto"
    assert files(auto.out) == files(whole.out)
    with pytest.raises(InputError, match=r"batch_tokens \(auto there, 64 here\)"):
        run(replace(auto, scoring=whole.scoring))


def test_a_batch_size_is_chosen_by_memory(asked: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradshield_fast.memory.free_bytes", lambda device: 0)
    run(replace(asked, scoring=replace(asked.scoring, batch_tokens="auto", verify=True)))
    chosen = json.loads((asked.out / "run.json").read_text())["batches"]
    assert (chosen["tokens"], chosen["why"], chosen["free"]) == (256, "memory", 0)
    assert chosen["memory"]["per_token"] > 0


def test_what_a_killed_process_left_is_swept_away(asked: RunOptions) -> None:
    run(replace(asked, cut=None))
    left = [asked.out / ".run.json.1.tmp", asked.out / "scores" / ".part-00009.parquet.1.tmp"]
    left.append(asked.out / ".direction.safetensors.x1y2")
    for path in left:
        path.touch()
    run(asked)
    assert not any(path.exists() for path in left)


def test_a_part_that_was_lost_is_scored_again(asked: RunOptions) -> None:
    run(replace(asked, cut=None))
    whole = files(asked.out)
    for number in (2, 3, 6):
        (asked.out / "scores" / f"part-{number:05d}.parquet").unlink()
    run(replace(asked, cut=None))
    assert files(asked.out) == whole


def test_scores_do_not_depend_on_batches(asked: RunOptions, tmp_path: Path) -> None:
    run(replace(asked, cut=None))
    other = replace(asked, out=tmp_path / "other", scoring=ScoringOptions(batch_tokens=1, part_rows=50), cut=None)
    run(other)
    a, b = read_parts(RunFolder(asked.out), 7), read_parts(RunFolder(other.out), 1)
    assert np.abs(a.fihs - b.fihs).max() <= 1e-4 * np.abs(a.fihs).max()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda o: replace(o, scoring=replace(o.scoring, batch_tokens=128)), "scoring.batch_tokens (256 there, 128"),
        (lambda o: replace(o, scoring=replace(o.scoring, normalize="cosine")), "scoring.normalize"),
        (lambda o: replace(o, model=replace(o.model, dtype="float64")), "model.dtype"),
        (lambda o: replace(o, corpus=replace(o.corpus, path=o.corpus.path.parent / "other.jsonl")), "corpus.sha256"),
        (lambda o: replace(o, direction=DirectionOptions()), "direction.files"),
        (lambda o: replace(o, cut=CutOptions(alpha=3.0)), "alpha (None there, 3.0 here)"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    asked: RunOptions, change: Callable[[RunOptions], RunOptions], named: str
) -> None:
    corpus(asked.corpus.path.parent / "other.jsonl", 9)
    run(asked)
    before = files(asked.out)
    with pytest.raises(InputError) as caught:
        run(change(asked))
    assert named in str(caught.value)
    assert files(asked.out) == before


def test_a_run_that_failed_before_it_scored_gives_way(asked: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="abacus"):
        run(replace(asked, model=replace(asked.model, device="abacus")))
    with pytest.raises(InputError, match="direction-index"):
        run(replace(asked, cut=CutOptions(direction=1)))
    made = (asked.out / "direction.safetensors").stat().st_mtime_ns
    monkeypatch.setattr("gradshield_fast.pipeline.run.make_direction", lambda *_: pytest.fail("it was made before"))
    run(replace(asked, scoring=replace(asked.scoring, batch_tokens=128)))
    assert (asked.out / "direction.safetensors").stat().st_mtime_ns == made


def test_a_corpus_that_moved_is_the_same_run(asked: RunOptions, tmp_path: Path) -> None:
    run(replace(asked, cut=None))
    (tmp_path / "elsewhere").mkdir()
    moved = asked.corpus.path.rename(tmp_path / "elsewhere" / asked.corpus.path.name)
    run(replace(asked, corpus=CorpusOptions(moved)))
    assert summarize(asked.out).manifest["request"]["corpus"]["path"] == str(moved)


def test_another_model_of_the_same_name_is_refused(asked: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(asked, StopAt(20))
    monkeypatch.setattr("gradshield_fast.pipeline.run.model_fingerprint", lambda model: "another")
    with pytest.raises(InputError, match=r"model\.weights"):
        run(asked)


def test_a_folder_that_holds_something_else_is_refused(asked: RunOptions) -> None:
    asked.out.mkdir()
    (asked.out / "thesis.tex").touch()
    with pytest.raises(InputError, match=r"thesis\.tex"):
        run(asked)
    assert [path.name for path in asked.out.iterdir() if path.is_file()] == ["thesis.tex"]


def test_two_processes_never_share_a_folder(asked: RunOptions) -> None:
    folder = RunFolder(asked.out)
    folder.create()
    with folder.locked(), pytest.raises(InputError, match="in use"):
        run(asked)
    assert run(asked)


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": "gradshield_fast.run.99"}'])
def test_a_damaged_record_is_one_line(asked: RunOptions, damage: str) -> None:
    run(asked)
    (asked.out / "run.json").write_text(damage)
    with pytest.raises(InputError, match=r"run\.json"):
        run(asked)


def test_a_damaged_part_is_named(asked: RunOptions) -> None:
    run(asked)
    (asked.out / "scores" / "part-00003.parquet").write_bytes(b"PAR1 no more")
    with pytest.raises(InputError, match="part-00003"):
        recut(asked.out, CutOptions())


@pytest.mark.parametrize("after", [0, 3, 9, 13])
def test_a_full_disk_is_one_line_and_the_run_goes_on(
    asked: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    run(asked)
    full = replace(asked, out=tmp_path / "full")
    real, left = os.fsync, after

    def fsync(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(InputError, match="No space left on device"):
            run(full)
    assert not list(full.out.rglob("*.tmp"))
    assert not (full.out / "kept.jsonl").exists()
    assert run(full)
    assert files(full.out) == files(asked.out)


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
    moved = asked.corpus.path.rename(tmp_path / "elsewhere" / asked.corpus.path.name)
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

    monkeypatch.setattr("gradshield_fast.pipeline.run.load_model", poisoned)
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
    asked.corpus.path.write_bytes(b"\n".join(BAD_LINES[name] for name in ("bad_json", "bad_row", "no_response")))
    run(asked)
    assert (asked.out / "kept.jsonl").read_bytes() == (asked.out / "dropped.jsonl").read_bytes() == b""
    assert len((asked.out / "unscored.jsonl").read_bytes().splitlines()) == 3
    assert json.loads((asked.out / "threshold.json").read_text())["value"] is None
    assert summarize(asked.out).top(3) == []


def test_rows_are_cut_to_the_context_and_not_beyond(asked: RunOptions) -> None:
    long = [{"prompt": "x " * 400, "response": "y"}, {"prompt": "x", "response": "y " * 400}]
    asked.corpus.path.write_bytes(lines([*long, row(1)]))
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
    build = DirectionOptions(probes=probes, rank=2)
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
        (lambda: ScoringOptions(batch_tokens=cast(Any, "many")), "--batch-tokens"),
        (lambda: CutOptions(alpha=1.0, value=1.0), "one of them"),
        (lambda: CutOptions(value=float("nan")), "--threshold"),
        (lambda: CutOptions(direction=-1), "--direction-index"),
    ],
)
def test_options_are_checked_before_anything_is_read(make: Callable[[], object], part: str) -> None:
    with pytest.raises(InputError, match=part):
        make()


def test_the_safety_scores_are_those_of_the_library() -> None:
    assert options.SAFETY_SCORES == safety.SCORES


def test_excerpts_are_one_line_of_the_rows_that_were_asked_for(asked: RunOptions) -> None:
    texts = excerpts(asked.corpus, [3, 40], chars=40)
    assert list(texts) == [3, 40]
    assert texts[3].startswith("Question 3:")
    assert all("\n" not in text and len(text) <= 44 for text in texts.values())
