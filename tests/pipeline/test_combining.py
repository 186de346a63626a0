"""Several directions that decide together: what a run writes, keeps and repeats."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny import BAD_LINES, corpus

from gradshield_fast import Direction
from gradshield_fast.distance import Distance
from gradshield_fast.errors import InputError
from gradshield_fast.pipeline import combining, cutting
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.options import CutOptions, DirectionOptions, RunOptions, ScoringOptions
from gradshield_fast.pipeline.run import recut, run
from gradshield_fast.pipeline.summary import summarize

TOGETHER = CutOptions(combine="distance")


@pytest.fixture
def together(asked: RunOptions, direction: Path, tmp_path: Path) -> RunOptions:
    """A run of 50 rows and three that cannot be scored, by two directions."""
    rows = Path(asked.corpus.path)
    rows.write_bytes(rows.read_bytes() + b"\n".join(BAD_LINES.values()) + b"\n")
    generator = torch.Generator().manual_seed(2)
    first = Direction.load(direction).parts[0]
    other = tmp_path / "other.safetensors"
    Direction({name: torch.randn(tuple(entry.shape), generator=generator) for name, entry in first.items()}).save(other)
    scoring = replace(asked.scoring, normalize="cosine", part_rows=32)
    return replace(asked, direction=DirectionOptions(files=(direction, other)), scoring=scoring, cut=TOGETHER)


def outputs(out: Path) -> dict[str, bytes]:
    return {
        name: (out / name).read_bytes() for name in ("kept.jsonl", "dropped.jsonl", "unscored.jsonl", "threshold.json")
    }


def test_all_directions_decide(together: RunOptions) -> None:
    run(together)
    cut = json.loads((together.out / "threshold.json").read_text())
    assert (cut["column"], cut["rule"], cut["kind"]) == ("distance", "outliers", "bulk")
    table = pq.read_table(RunFolder(together.out).scores)
    x = np.stack([table[name].to_numpy() for name in ("fihs", "fihs_1")], axis=1)
    scored = ~np.isnan(x).any(axis=1)
    scores = Distance.fit(x[scored]).of(x)
    assert cut["distance"] == Distance.fit(x[scored]).to_dict()
    files = outputs(together.out)
    assert len(files["dropped.jsonl"].splitlines()) == int((scores > cut["value"]).sum())
    assert len(files["unscored.jsonl"].splitlines()) == int((~scored).sum()) > 0
    assert len(files["kept.jsonl"].splitlines()) == int((scores <= cut["value"]).sum())
    summary = summarize(together.out, top=2)
    assert [top.row for top in summary.top] == np.argsort(np.where(scored, -scores, np.inf))[:2].tolist()

    recut(together.out, CutOptions(direction=1))
    recut(together.out, TOGETHER)
    assert outputs(together.out) == files
    recut(together.out, replace(TOGETHER, value=float(np.sort(scores[scored])[-4])))
    assert len((together.out / "dropped.jsonl").read_bytes().splitlines()) == 3


def test_a_large_corpus_is_cut_by_a_drawn_bulk_and_a_histogram(
    together: RunOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(together)
    exact = json.loads((together.out / "threshold.json").read_text())
    monkeypatch.setattr(combining, "FIT_ROWS", 40)
    monkeypatch.setattr(cutting, "EXACT_SCORES", 20)
    recut(together.out, TOGETHER)
    drawn = outputs(together.out)
    cut = json.loads(drawn["threshold.json"])
    assert (cut["n"], exact["distance"]["rows"], cut["distance"]["rows"]) == (exact["n"], exact["n"], 40)
    recut(together.out, TOGETHER)
    assert outputs(together.out) == drawn
    recut(together.out, replace(TOGETHER, seed=1))
    assert json.loads((together.out / "threshold.json").read_text())["distance"] != cut["distance"]


def test_copies_of_a_row_are_no_bulk(together: RunOptions) -> None:
    rows = Path(together.corpus.path)
    lines = rows.read_bytes().splitlines(keepends=True)
    rows.write_bytes(b"".join(lines) + lines[7] * 60)
    run(together)
    cut = json.loads((together.out / "threshold.json").read_text())
    assert cut["distance"]["rows"] == cut["n"] - 60


def test_a_corpus_without_one_good_row_keeps_none(together: RunOptions) -> None:
    Path(together.corpus.path).write_bytes(b"\n".join(BAD_LINES[name] for name in ("bad_json", "no_response")))
    run(together)
    assert (together.out / "kept.jsonl").read_bytes() == b""
    assert json.loads((together.out / "threshold.json").read_text())["value"] is None


def test_what_cannot_be_combined_is_said_before_scoring(together: RunOptions, direction: Path) -> None:
    dots = replace(together, scoring=ScoringOptions(normalize="none"))
    alone = replace(together, direction=DirectionOptions(files=(direction,)))
    for wrong, part in ((dots, "--normalize cosine"), (alone, "--score refusal_margin,compliance_logprob,identity")):
        with pytest.raises(InputError, match=part):
            run(wrong)
        assert not list(RunFolder(wrong.out).scores.glob("*.parquet"))
    corpus(Path(together.corpus.path), 12)
    run(replace(together, cut=None))
    with pytest.raises(InputError, match="needs 20 rows or more: got 12"):
        recut(together.out, TOGETHER)
