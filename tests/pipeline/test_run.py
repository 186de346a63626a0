"""A run's folder: every row once, the scores of the scorer itself, and the same files however often it was stopped."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny import BAD_LINES, corpus, lines, row

from gradshield_fast import Direction, Scorer
from gradshield_fast.chat import ChatEncoder
from gradshield_fast.errors import InputError
from gradshield_fast.loading import load_model
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.options import (
    CorpusOptions,
    CutOptions,
    DirectionOptions,
    RunOptions,
)
from gradshield_fast.pipeline.run import recut, run
from gradshield_fast.pipeline.summary import summarize
from tests.pipeline.folder_files import COLUMNS, StopAt, files, read_parts


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
    Path(asked.corpus.path).write_bytes(b"\n".join(mixed) + b"\r\n\n")
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
    other = replace(
        asked, out=tmp_path / "other", scoring=replace(asked.scoring, batch_tokens=1, part_rows=50), cut=None
    )
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
    corpus(Path(asked.corpus.path).parent / "other.jsonl", 9)
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
    monkeypatch.setattr("gradshield_fast.pipeline.worker.make_direction", lambda *_: pytest.fail("it was made before"))
    run(replace(asked, scoring=replace(asked.scoring, batch_tokens=128)))
    assert (asked.out / "direction.safetensors").stat().st_mtime_ns == made


def test_a_corpus_that_moved_is_the_same_run(asked: RunOptions, tmp_path: Path) -> None:
    run(replace(asked, cut=None))
    (tmp_path / "elsewhere").mkdir()
    moved = Path(asked.corpus.path).rename(tmp_path / "elsewhere" / Path(asked.corpus.path).name)
    run(replace(asked, corpus=CorpusOptions(moved)))
    assert summarize(asked.out).record["request"]["corpus"]["path"] == str(moved)


def test_another_model_of_the_same_name_is_refused(asked: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(asked, StopAt(20))
    monkeypatch.setattr("gradshield_fast.pipeline.worker.model_fingerprint", lambda model: "another")
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
