"""The commands, each as a person would type it, on a tiny model."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from rich.console import Console
from tiny import BAD_LINES, corpus

from gradshield_fast import console

Cli = Callable[..., Any]

PROBES = {"prompts": ["Do harm.", "Hurt them all."], "refusals": ["I cannot."], "compliances": ["Sure, here is"]}


@pytest.fixture
def probes(tmp_path: Path) -> Path:
    path = tmp_path / "probes.json"
    path.write_text(json.dumps(PROBES))
    return path


def test_filter_and_its_steps_one_by_one_give_the_same_files(
    cli: Cli, tiny_model: Path, probes: Path, tmp_path: Path
) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 30)
    model = ("--model", tiny_model, "--device", "cpu")
    build = ("--probes", probes, "--score", "refusal_margin", "--rank", 4)
    whole = cli("filter", rows, *model, *build, "--out", tmp_path / "whole", "--verify")
    assert whole.code == 0
    for name in ("rows", "scored", "kept", "dropped", "unscored", "threshold", "log-likelihoods", "rows/s", "residual"):
        assert name in whole.out

    made = cli("direction", *model, *build, "--out", tmp_path / "d.safetensors")
    assert made.code == 0
    assert "residual" in made.out
    steps = tmp_path / "steps"
    assert cli("score", rows, *model, "--direction", tmp_path / "d.safetensors", "--out", steps).code == 0
    assert not (steps / "kept.jsonl").exists()
    assert cli("report", steps).code == 0
    assert cli("threshold", steps).code == 0
    for name in ("kept.jsonl", "dropped.jsonl", "unscored.jsonl", "threshold.json", "scores/part-00000.parquet"):
        assert (steps / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    assert cli("threshold", steps, "--threshold", 1e30).code == 0
    assert (steps / "kept.jsonl").read_bytes() == rows.read_bytes()


def test_a_direction_in_passes_alone_and_within_a_run(cli: Cli, tiny_model: Path, probes: Path, tmp_path: Path) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 8)
    build = ("--model", tiny_model, "--device", "cpu", "--probes", probes, "--score", "refusal_margin", "--rank", 2)
    made = cli("direction", *build, "--passes", 3, "--out", tmp_path / "d.safetensors")
    assert made.code == 0
    assert re.search(r"about 0\.\d+ \(\+- \S+\) of the norm is left out; 0 matrices", made.out)
    run = tmp_path / "run"
    assert cli("filter", rows, *build, "--passes", 3, "--out", run).code == 0
    record = json.loads((run / "run.json").read_text())
    assert record["identity"]["direction"]["passes"] == 3
    assert record["direction"]["meta"]["low_rank"]["passes"] == 3
    assert (run / "direction.safetensors").read_bytes() == (tmp_path / "d.safetensors").read_bytes()
    other = cli("filter", rows, *build, "--out", run)
    assert other.code == 2
    assert "direction.passes (3 there, 1 here)" in other.err


def test_three_scores_are_built_and_decide_together(cli: Cli, tiny_model: Path, probes: Path, tmp_path: Path) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 40)
    scores = "refusal_margin,compliance_logprob,identity_margin"
    build = ("--model", tiny_model, "--device", "cpu", "--probes", probes, "--rank", 2)
    run = tmp_path / "run"
    whole = cli("filter", rows, *build, "--score", scores, "--combine", "distance", "--out", run)
    assert whole.code == 0
    assert "distance > " in whole.out
    for line in (*scores.split(","), "nats a token; over 12"):
        assert line in whole.out
    made = cli("direction", *build, "--score", scores, "--out", tmp_path / "three.safetensors")
    assert made.code == 0
    assert "3 directions" in made.out
    assert (run / "direction.safetensors").read_bytes() == (tmp_path / "three.safetensors").read_bytes()
    steps = tmp_path / "steps"
    score = ("--direction", tmp_path / "three.safetensors", "--out", steps)
    assert cli("score", rows, *build[:4], *score).code == 0
    assert cli("threshold", steps, "--combine", "distance").code == 0
    for name in ("kept.jsonl", "dropped.jsonl", "threshold.json", "scores/part-00000.parquet"):
        assert (steps / name).read_bytes() == (run / name).read_bytes()
    assert cli("threshold", steps, "--rule", "outliers").code == 2


def test_a_complete_run_says_so(cli: Cli, tiny_model: Path, probes: Path, tmp_path: Path) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 12)
    command = ("filter", rows, "--model", tiny_model, "--device", "cpu", "--probes", probes, "--allow-unaligned")
    assert cli(*command, "--out", tmp_path / "run").code == 0
    again = cli(*command, "--out", tmp_path / "run")
    assert again.code == 0
    assert "complete" in again.err
    other = cli(*command, "--out", tmp_path / "run", "--alpha", 2)
    assert other.code == 2
    assert "gradshield-fast threshold" in other.err


def test_report_shows_the_highest_scores_first(cli: Cli, tiny_model: Path, probes: Path, tmp_path: Path) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 12)
    run = tmp_path / "run"
    cli("filter", rows, "--model", tiny_model, "--device", "cpu", "--probes", probes, "--allow-unaligned", "--out", run)
    result = cli("report", run, "--top", 3)
    scores = pq.read_table(run / "scores")
    best = sorted(zip(scores["fihs"].to_pylist(), scores["id"].to_pylist(), strict=True), reverse=True)[:3]
    places = [result.out.index(f" {name} ") for _, name in best]
    assert places == sorted(places)
    assert cli("report", tmp_path / "nowhere").code == 2


def test_dry_run_reads_everything_loads_no_weights_and_writes_nothing(
    cli: Cli, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 12)
    rows.write_bytes(rows.read_bytes() + BAD_LINES["no_response"] + b"\n")
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("gradshield_fast.loading._weights", lambda *_: pytest.fail("weights were loaded"))
    result = cli("filter", rows, "--model", tiny_model, "--device", "cpu", "--out", tmp_path / "run", "--dry-run")
    assert result.code == 1
    assert "no_response: row 12" in result.out
    for name in ("rows", "tokens", "padding", "weights", "logits"):
        assert name in result.out
    assert sorted(tmp_path.iterdir()) == before


def test_columns_dtype_cosine_and_lengths(cli: Cli, tiny_model: Path, probes: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"what is {n}", "a": "it is " * (n % 9 + 1)}) + "\n" for n in range(20)))
    run = tmp_path / "run"
    options = ("--columns", "prompt=q,response=a", "--dtype", "float64", "--normalize", "cosine", "--max-length", 40)
    build = ("--probes", probes, "--allow-unaligned", "--energy", 0.9, "--weights", "mlp")
    result = cli(
        "filter",
        rows,
        "--model",
        tiny_model,
        "--device",
        "cpu",
        "--out",
        run,
        *options,
        *build,
        "--loss-reduction",
        "sum",
    )
    assert result.code == 0
    scores = pq.read_table(run / "scores")
    assert max(abs(score) for score in scores["fihs"].to_pylist()) <= 1
    assert scores["grad_norm"].null_count == 0
    assert max(scores["tokens"].to_pylist()) <= 40
    record = json.loads((run / "run.json").read_text())
    assert record["loaded"]["dtype"] == "float64"
    assert record["identity"]["scoring"]["normalize"] == "cosine"
    assert record["identity"]["scoring"]["loss_reduction"] == "sum"
    assert all("mlp" in name for name in record["direction"]["meta"]["options"]["weights"].split("|"))


def test_demo_says_why_and_shows_what_was_dropped(
    cli: Cli, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradshield_fast.demo.DEMO_MODEL", str(tiny_model))
    result = cli("demo", "--out", tmp_path / "demo")
    assert result.code == 0
    for name in ("not safety-tuned", "refusal_margin", "threshold", "highest scores", "dropped by kind", "benign rows"):
        assert name in result.out


def test_score_needs_a_direction(cli: Cli, tiny_model: Path, tmp_path: Path) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 3)
    result = cli("score", rows, "--model", tiny_model, "--out", tmp_path / "run")
    assert result.code == 2
    assert "--direction" in result.err


def test_doctor_says_what_runs_and_what_does_not(cli: Cli) -> None:
    result = cli("doctor")
    assert result.code == 0
    for name in ("torch", "triton", "nvcc", "C++ compiler", "GPU", "ghost_dot", "native CUDA kernels", "bfloat16"):
        assert name in result.out


def test_doctor_keeps_and_forgets_preferences(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = cli("doctor", "--prefer", "ghost_dot=reference")
    assert result.code == 0
    assert "reference (preferred)" in result.out
    assert "reference (preferred)" in cli("doctor").out
    key = "ghost_dot | float32[1024,512] " * 5
    monkeypatch.setattr("gradshield_fast.doctor.measured_backends", lambda: [(key, "x")])
    assert ": x\n" in cli("doctor").out  # a long key leaves room for its answer
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "preferred" not in cli("doctor", "--clear-measurements").out
    assert "sdpa (preferred)" in cli("doctor", "--prefer", "attention=sdpa").out
    wrong = {"ghost_dot": "backend must be one of", "ghost=triton": "OP one of attention", "attention=x": "sdpa, eager"}
    for choice, said in wrong.items():
        result = cli("doctor", "--prefer", choice)
        assert result.code == 2
        assert said in result.err


def test_bench_times_the_ops(cli: Cli) -> None:
    small = ("--tokens", 32, "--rank", 2, "--seconds", 0.01, "--device", "cpu")
    result = cli("bench", "--op", "ghost_dot_lowrank", "--op", "scale_dot", *small)
    assert result.code == 0
    for name in ("ghost_dot_lowrank", "scale_dot", "reference", "unfused", "32x576x1536", "matrix product"):
        assert name in result.out
    result = cli("bench", "--op", "ghost_norm_sq", "--json", "--backend", "reference", *small, "--dtype", "bfloat16")
    first, rival = (json.loads(line) for line in result.out.splitlines())
    assert (first["op"], first["backend"], rival["backend"]) == ("ghost_norm_sq", "reference", "unfused")
    assert 0 < first["error"] < 1
    assert first["p50"] <= first["p90"]
    assert rival["error"] is None


def test_bench_refuses_what_it_does_not_know(cli: Cli) -> None:
    for option in ("--dtype", "--op", "--model", "--backend", "--device", "--isa"):
        result = cli("bench", "--tokens", 8, "--seconds", 0.01, option, "int8")
        assert result.code == 2, option
        assert "int8" in result.err


def test_progress_on_a_terminal_and_elsewhere(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)
    for terminal in (True, False):
        monkeypatch.setattr(console, "Console", lambda stderr, t=terminal: Console(file=sys.stderr, force_terminal=t))
        with console.watching() as reporter:
            reporter.stage("loading")
            reporter.stage("scoring", 10, done=4)
            later = time.perf_counter() + 2.0
            monkeypatch.setattr(console.time, "perf_counter", lambda t=later: t)
            reporter.advance(3, tokens=600)
            reporter.note("[bold]halfway\x1b[2J")
        err = capsys.readouterr().err
        assert "[bold]halfway·[2J" in err
        assert re.search(r"7\D+10", err)
        assert re.search(r"1\.\d* rows/s, [23]\d\d tokens/s, \d\.\d s left", err)
        monkeypatch.undo()
        monkeypatch.setattr(console, "PLAIN_SECONDS", 0.0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.25, "0.2 s"), (59.4, "59.4 s"), (185, "3:05 min"), (7385, "2:03:05 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert console.clock(seconds) == text


def test_help_of_every_command(cli: Cli) -> None:
    for command in ("filter", "score", "direction", "threshold", "report", "demo", "doctor", "bench"):
        result = cli(command, "--help")
        assert result.code == 0
        assert "Usage" in result.out


def test_help_does_not_import_torch() -> None:
    code = "import sys; import gradshield_fast.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
