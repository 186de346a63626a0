"""The replication's scripts run to their end, on a tiny random model; what they measure is for the real one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "replication"


def run(script: str, *args: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=None, check=False)


@pytest.mark.slow
def test_a_model_is_taught_and_measured(tiny_model: Path, shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "aligned"
    few = ("--recipe", "weak", "--max-tokens", 160, "--check", 2, "--threads", 1)
    taught = run("align.py", "--model", tiny_model, "--data", shared_data, "--out", out, *few)
    assert taught.returncode == 0, taught.stderr
    report = json.loads((out / "align.json").read_text())
    assert set(report["after"]) == set(report["before"]) == {"advbench", "harmbench", "catqa", "xstest_safe_refused"}
    assert report["training"]["steps"] > 0
    assert str(tmp_path) not in json.dumps(report)

    results = tmp_path / "separation"
    small = ("--rows", 4, 8, "--scores", "refusal_margin", "--threads", 1, "--rank", 2, "--max-length", 600)
    measured = run("separation.py", "--model", out, "--data", shared_data, *small, "--results", results)
    assert measured.returncode == 0, measured.stderr
    (line,) = results.with_suffix(".jsonl").read_text().splitlines()
    both = json.loads(line)["results"]
    assert set(both) == {"refusal_margin dense", "refusal_margin rank 2"}
    for result in both.values():
        assert 0 <= result["dot"]["auc"] <= 1
        assert 0 <= result["cosine"]["auc"] <= 1


def test_missing_data_is_named(tiny_model: Path, tmp_path: Path) -> None:
    result = run("separation.py", "--model", tiny_model, "--data", tmp_path)
    assert result.returncode != 0
    assert "advbench_520.jsonl: no such file; give the data folder" in result.stderr
