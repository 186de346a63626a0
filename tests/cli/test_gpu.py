"""The commands on a GPU: a run from corpus to filtered corpus, and the direction it is scored against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from tiny import BAD_LINES, corpus, lines, row

pytestmark = pytest.mark.gpu

Cli = Callable[..., Any]
PROBES = {"prompts": ["Do harm.", "Hurt them all."], "refusals": ["I cannot."], "compliances": ["Sure, here is"]}


@pytest.fixture
def build(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[object, ...]:
    """The options that name a model and a direction."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    probes = tmp_path / "probes.json"
    probes.write_text(json.dumps(PROBES))
    return ("--model", tiny_model, "--probes", probes, "--score", "refusal_margin", "--rank", 4)


def scores(run: Path) -> dict[str, float]:
    table = pq.read_table(run / "scores").to_pydict()
    return dict(zip(table["id"], table["fihs"], strict=True))


def test_a_gpu_scores_as_the_cpu_does(cli: Cli, build: tuple[object, ...], tmp_path: Path) -> None:
    rows = corpus(tmp_path / "rows.jsonl", 60)
    found = {}
    for device in ("cpu", "cuda"):
        run = tmp_path / device
        done = cli("filter", rows, *build, "--dtype", "float32", "--device", device, "--out", run, "--verify")
        assert done.code == 0, done.err
        found[device] = scores(run)
    assert found["cuda"].keys() == found["cpu"].keys()
    size = max(map(abs, found["cpu"].values()))
    assert list(found["cuda"].values()) == pytest.approx(list(found["cpu"].values()), abs=1e-4 * size)


@pytest.mark.parametrize(
    "options", [(), ("--compile",), ("--checkpoint",), ("--passes", 3), ("--batch-tokens", "auto")]
)
@pytest.mark.filterwarnings("ignore")  # the compiler's own, which differ by version
def test_a_run_in_bfloat16_puts_every_row_into_one_file(
    cli: Cli, build: tuple[object, ...], options: tuple[object, ...], tmp_path: Path
) -> None:
    bad = [line for kind, line in BAD_LINES.items() if kind != "too_large"]  # the usual limit takes that one
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines(row(n) for n in range(40)) + b"\n".join(bad) + b"\n")
    run = tmp_path / "run"
    done = cli("filter", path, *build, "--dtype", "bfloat16", "--device", "cuda", *options, "--out", run)
    assert done.code == 1, done.err  # a row that could not be scored is said in the exit code too
    counts = [len((run / f"{name}.jsonl").read_bytes().splitlines()) for name in ("kept", "dropped", "unscored")]
    assert sum(counts) == 40 + len(bad)
    assert counts[2] >= len(bad)


def test_doctor_shows_the_gpu(cli: Cli) -> None:
    done = cli("doctor")
    assert done.code == 0
    assert "cuda" in done.out
