"""Shards, their merge, and watching a run, each as a person would type it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import corpus

from gradshield_fast import Direction, console
from gradshield_fast.loading import load_model

Cli = Callable[..., Any]


@pytest.fixture
def command(tiny_model: Path, tmp_path: Path) -> tuple[object, ...]:
    model, _ = load_model(str(tiny_model), device="cpu")
    Direction({"lm_head.weight": torch.ones_like(model.get_parameter("lm_head.weight"))}).save(tmp_path / "d.st")
    rows = corpus(tmp_path / "rows.jsonl", 30)
    options = ("--model", tiny_model, "--device", "cpu", "--direction", tmp_path / "d.st", "--part-rows", 4)
    return ("filter", rows, *options)


def test_shards_and_merge(cli: Cli, command: tuple[object, ...], tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "sharded"
    assert cli(*command, "--out", whole).code == 0
    for shard in ("2/2", "1/2"):
        assert cli("merge", out).code == 2
        done = cli(*command, "--out", out, "--shard", shard)
        assert done.code == 0
        assert f"gradshield-fast merge {out}" in done.out
    again = cli(*command, "--out", out, "--shard", "1/2")
    assert "shard 1/2" in again.err
    assert "nothing is left to do" in again.err
    assert not (out / "kept.jsonl").exists()
    merged = cli("merge", out)
    assert merged.code == 0
    assert "in 2 starts" in merged.out
    for name in ("kept.jsonl", "dropped.jsonl", "unscored.jsonl", "threshold.json", "scores/part-00003.parquet"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    cut = cli(*command, "--out", tmp_path / "x", "--shard", "1/2", "--threshold", 1)
    assert cut.code == 2
    assert "gradshield-fast merge" in cut.err


@pytest.mark.parametrize("value", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2", "1/2/3"])
def test_a_shard_that_is_none(cli: Cli, command: tuple[object, ...], tmp_path: Path, value: str) -> None:
    result = cli(*command, "--out", tmp_path / "run", f"--shard={value}")
    assert result.code == 2
    assert "--shard" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("option", [("--workers", -1), ("--threads", 0), ("--engine", "dask"), ("--actors", 0)])
def test_an_engine_that_is_none(
    cli: Cli, command: tuple[object, ...], tmp_path: Path, option: tuple[str, object]
) -> None:
    result = cli(*command, "--out", tmp_path / "run", *option)
    assert result.code == 2
    assert option[0] in result.err


def test_status_of_a_run_that_works_that_died_and_that_is_done(
    cli: Cli, command: tuple[object, ...], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert cli("status", out).code == 2
    assert cli(*command, "--out", out, "--shard", "1/2").code == 0
    # as if it had been killed while it worked
    [log] = (out / "sessions").glob("*.jsonl")
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:-1]) + '{"at": 9.1, "uni')
    status = json.loads(cli("status", out, "--json").out)
    assert (status["state"], status["working"], status["parts"], status["parts_done"]) == ("scoring", False, 8, 4)
    assert 0 < status["rows_done"] < status["rows"] == 30
    assert status["seconds_left"] > 0
    assert status["rows_per_second"] > 0
    assert [session["shard"] for session in status["sessions"]] == ["1/2"]
    assert "ended" not in status["sessions"][0]
    shown = cli("status", out).out
    assert "4 of 8" in shown
    assert "left" in shown
    assert cli(*command, "--out", out).code == 0
    done = json.loads(cli("status", out, "--json").out)
    assert (done["state"], done["rows_done"], done["seconds_left"]) == ("complete", 30, 0.0)
    assert done["sessions"][-1]["ended"] == "done"


def test_progress_as_json_lines(
    cli: Cli, command: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    result = cli(*command, "--out", tmp_path / "run", "--log-json")
    events = [json.loads(line) for line in result.err.splitlines()]
    assert {event["event"] for event in events} == {"stage", "progress", "note"}
    scoring = [event for event in events if event.get("stage") == "scoring"]
    assert [event["done"] for event in scoring] == sorted(event["done"] for event in scoring)
    assert (scoring[0]["done"], scoring[-1]["done"], scoring[-1]["total"]) == (0, 30, 30)
    assert result.code == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    log = tmp_path / "run" / "sessions" / record["sessions"][0]["log"]
    timings = [line for line in map(json.loads, log.read_text().splitlines()) if "unit" in line]
    assert [timing["unit"] for timing in timings] == list(range(8))
    assert all(timing["seconds"] >= timing["waited"] >= 0 for timing in timings)
