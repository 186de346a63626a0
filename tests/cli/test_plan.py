"""What a run will need: counted or estimated, measured or said to be unknown, and refused where it cannot fit."""

from __future__ import annotations

import gzip
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny import corpus, row

from gradshield_fast import Direction, corpus_sample
from gradshield_fast.corpus_files import find_files
from gradshield_fast.corpus_sample import sample_rows
from gradshield_fast.loading import load_model

Cli = Callable[..., Any]


def field(text: str, name: str) -> str:
    found = re.search(rf"│ {name} +│ (.*?) *│\n", text)
    assert found, f"no {name!r} in {text}"
    return found[1]


def test_a_plan_counts_and_measures_and_says_what_it_does_not_know(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 60)
    command = ("plan", rows, "--model", tiny_model, "--device", "cpu", "--out", tmp_path / "run")
    plain = cli(*command)
    assert plain.code == 0
    assert field(plain.out, "rows").startswith("60;")
    assert "--measure" in field(plain.out, "a step")
    assert "not known" in field(plain.out, "rate")
    assert "hours" not in plain.out
    measured = cli(*command, "--measure", "--rank", 4)
    assert measured.code == 0
    assert float(field(measured.out, "hours").split()[0]) > 0
    assert field(measured.out, "a step").endswith("GiB")
    assert not (tmp_path / "run").exists()


def test_a_rate_comes_from_a_run_of_the_same_model_alone(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 30)
    model = ("--model", tiny_model, "--device", "cpu")
    loaded, _ = load_model(str(tiny_model), device="cpu")
    Direction({"lm_head.weight": torch.ones_like(loaded.get_parameter("lm_head.weight"))}).save(tmp_path / "d.st")
    assert cli("filter", rows, *model, "--direction", tmp_path / "d.st", "--out", tmp_path / "run").code == 0
    told = cli("plan", rows, *model, "--like", tmp_path / "run")
    assert told.code == 0
    assert "tokens/s, of the run in run" in field(told.out, "rate")
    other = cli("plan", rows, *model, "--dtype", "bfloat16", "--like", tmp_path / "run")
    assert other.code == 2
    assert "another model" in other.err
    assert cli("plan", rows, *model, "--like", tmp_path).code == 2


def test_a_run_that_cannot_fit_is_refused_and_told_what_would_help(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 10)
    refused = cli("plan", rows, "--model", tiny_model, "--device", "cpu", "--memory", 0.001, "--measure")
    assert refused.code == 2
    assert "this run cannot fit: memory" in refused.err
    assert "a device with 1 GiB" in refused.err


@pytest.mark.parametrize("suffix", ["", ".gz", ".parquet"])
@pytest.mark.parametrize("whole", [1 << 30, 1 << 10])
def test_samples_tell_the_number_and_the_size_of_rows(
    tmp_path: Path, suffix: str, whole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(corpus_sample, "_READ_WHOLE", whole)
    plain = corpus(tmp_path / "rows.jsonl", 3000)
    path = plain
    if suffix == ".gz":
        path = tmp_path / "rows.jsonl.gz"
        path.write_bytes(gzip.compress(plain.read_bytes()))
    elif suffix:
        path = tmp_path / "rows.parquet"
        pq.write_table(pa.Table.from_pylist([row(n) for n in range(3000)]), path, row_group_size=512)
    drawn = sample_rows(find_files(path), 400, 1 << 20)
    assert drawn.exact == (bool(suffix) or whole > 1 << 20)
    assert drawn.total == pytest.approx(3000, rel=0 if drawn.exact else 0.05)
    assert 350 <= len(drawn.rows) <= 450
    assert drawn.row_bytes == pytest.approx(plain.stat().st_size / 3000, rel=0.05)
    assert sample_rows(find_files(path), 400, 1 << 20) == drawn
