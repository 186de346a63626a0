"""Rows that say the same, in whole runs: one score, and the same files however they were run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny import BAD_LINES, lines, row

from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.options import EngineOptions, RunOptions
from gradshield_fast.pipeline.run import recut, run
from gradshield_fast.pipeline.summary import summarize
from tests.pipeline.folder_files import StopAt, files, read_parts


@pytest.fixture
def repeated(asked: RunOptions) -> RunOptions:
    """Rows 0 to 11, three times; the second time under other ids and in another form; one bad row, twice."""
    rows = [row(number) for number in range(12)]
    other = [
        {"id": f"x{n}", "prompt": r["messages"][0]["content"], "response": r["messages"][1]["content"]}
        for n, r in enumerate(rows)
    ]
    bad = BAD_LINES["bad_json"] + b"\n"
    Path(asked.corpus.path).write_bytes(lines(rows) + bad + lines(other) + bad + lines(rows))
    return asked


def test_they_share_a_score_and_keep_their_own_rows(repeated: RunOptions) -> None:
    run(repeated)
    part = read_parts(RunFolder(repeated.out), 5)
    assert part.same_as.tolist() == [-1] * 13 + list(range(12)) + [-1] + list(range(12))
    assert part.status == ["ok"] * 12 + ["bad_json"] + ["ok"] * 12 + ["bad_json"] + ["ok"] * 12
    for values in (part.fihs, part.loss, part.tokens, part.response_tokens):
        assert np.array_equal(values[:12], values[13:25])
        assert np.array_equal(values[:12], values[26:])
    assert part.id[13] == "x0"
    record = json.loads((repeated.out / "run.json").read_text())
    assert record["duplicates"] == 24
    assert sum(session["tokens"] for session in record["sessions"]) == part.tokens[:12].sum()
    summary = summarize(repeated.out)
    assert (summary.rows, summary.scored, summary.duplicates) == (38, 36, 24)
    kept, dropped = (len((repeated.out / f"{n}.jsonl").read_bytes().splitlines()) for n in ("kept", "dropped"))
    assert (kept + dropped, dropped % 3) == (36, 0)


def test_the_files_are_the_same_wherever_it_was_stopped_and_whoever_scored(
    repeated: RunOptions, tmp_path: Path
) -> None:
    run(repeated)
    for rows in (3, 14, 26):
        stopped = replace(repeated, out=tmp_path / f"stopped{rows}")
        with pytest.raises(KeyboardInterrupt):
            run(stopped, StopAt(rows))
        run(stopped)
        assert files(stopped.out) == files(repeated.out)
    shards = replace(repeated, out=tmp_path / "shards")
    for index in (2, 1):
        run(replace(shards, engine=EngineOptions(shard=(index, 2))))
    recut(shards.out, replace(repeated).cut)  # type: ignore[arg-type]
    assert files(shards.out) == files(repeated.out)


def test_without_it_every_row_is_scored(repeated: RunOptions) -> None:
    plain = replace(repeated, scoring=replace(repeated.scoring, dedupe=False))
    run(plain)
    part = read_parts(RunFolder(plain.out), 5)
    assert (part.same_as == -1).all()
    assert np.allclose(part.fihs[:12], part.fihs[26:], rtol=1e-4, atol=1e-5)
    assert json.loads((plain.out / "run.json").read_text())["duplicates"] == 0


def test_rows_that_render_alike_are_scored_once_within_a_part(asked: RunOptions) -> None:
    long = "the answer is so long " * 80
    cut = [{"prompt": "what is it?", "response": long + end} for end in ("friend", "capitals")]
    Path(asked.corpus.path).write_bytes(lines([row(1), *cut]))
    run(asked)
    part = read_parts(RunFolder(asked.out), 1)
    assert part.status == ["ok", "truncated", "truncated"]
    assert part.same_as.tolist() == [-1, -1, 1]
    assert part.fihs[1] == part.fihs[2]
