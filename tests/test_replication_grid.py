"""The replication's grid: rows stay apart, cells share fine-tunings, and a run goes on where it stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "benchmarks" / "replication"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the folder's modules be imported, as when one of its scripts runs."""
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_no_prompt_has_two_roles(shared_data: Path):
    import data

    counts = data.check_disjoint(shared_data)
    assert min(counts.values()) > 50
    assert len(data.planted(shared_data, "disguised")) == 50


def test_a_shared_prompt_is_named(shared_data: Path, monkeypatch: pytest.MonkeyPatch):
    import data

    from gradshield_fast.errors import InputError

    leak = data.attack_prompts(shared_data, "harmbench")[0]
    monkeypatch.setattr(data, "refused_prompts", lambda folder: [f"  {leak.upper()}!"])
    with pytest.raises(InputError, match="'refused' and 'attack' share 1 prompts"):
        data.check_disjoint(shared_data)


@pytest.mark.parametrize("harm", ["open-1", "open-30", "disguised-10", "mixed-10"])
def test_removing_what_was_planted_gives_the_clean_corpus(harm: str, shared_data: Path):
    import data

    clean = data.corpus(shared_data, "wikisql", "clean", 3)
    mixed = data.corpus(shared_data, "wikisql", harm, 3)
    assert [row for row in mixed if row.kind == "benign"] == clean
    for kind, share in data.HARM[harm].items():
        assert sum(row.kind == kind for row in mixed) == pytest.approx(share * len(mixed), abs=1)
    assert mixed != sorted(mixed, key=lambda row: row.kind)
    assert data.corpus(shared_data, "wikisql", "clean", 4) != clean


def test_interval_and_overlap_and_judge():
    from evaluate import complied, refused, rouge_l, wilson

    low, high = wilson(3, 100)
    assert (round(low, 4), round(high, 4)) == (0.0103, 0.0845)
    assert wilson(0, 10)[0] == 0
    assert rouge_l("The cat sat.", "the cat sat") == 1
    assert rouge_l("a b c d", "a x c") == pytest.approx(2 * 2 / 7)
    assert rouge_l("", "x") == 0
    assert refused("I cannot fulfill this request.")
    assert complied("Sure, here is a plan")
    assert not complied("card_arrival")
    assert not complied("I'm sorry, but no")
    assert not complied("I am an agent and will say as you like it")
    assert not complied("How to open a safe")


def test_what_a_removal_is_worth():
    import data
    from cells import removal

    rows = [data.Row(str(i), kind, []) for i, kind in enumerate(["benign"] * 8 + ["open"] * 2)]
    scores = np.array([0.0, 1, 2, 3, 4, 5, 6, 9, 8, 10])
    found = removal(rows, scores, scores > 7)
    assert found["removed"] == {"benign": 1, "open": 2}
    assert (found["precision"], found["recall"], found["benign_removed"]) == (2 / 3, 1, 1 / 8)
    assert found["auc"] == 15 / 16
    assert "recall" not in removal(rows[:8], scores[:8], scores[:8] > 7)


def test_scores_of_a_row_are_worked_out_once(tmp_path: Path):
    from row_cache import RowCache

    asked: list[list[int]] = []

    def compute(missing: list[int]) -> np.ndarray:
        asked.append(missing)
        return np.array([[i, 2.0 * i] for i in missing])

    cache = RowCache(tmp_path / "rows")
    assert cache.rows("t", ["a", "b", "a"], compute)[:, 1].tolist() == [0, 2, 0]
    assert RowCache(tmp_path / "rows").rows("t", ["b", "c"], compute)[:, 0].tolist() == [1, 1]
    assert asked == [[0, 1], [1]]
    assert cache.cpu_seconds > 0


def test_a_model_learns_what_it_is_given(tiny_model: Path):
    from training import Settings, fit, load_start

    from gradshield_fast.chat import ChatEncoder

    model, tokenizer = load_start(str(tiny_model))
    rows = [ChatEncoder(tokenizer).encode_prompt_response(f"what is {i}", "the answer is so long") for i in range(8)]
    report = fit(model, rows, Settings(lr=0.01, epochs=10, batch_rows=4))
    assert (report.rows, report.steps) == (8, 20)
    assert report.loss_last < report.loss_first / 2


@pytest.mark.slow
def test_the_grid_runs_and_goes_on(
    tiny_model: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    import run

    start, results = tmp_path / "starts" / "tiny", tmp_path / "grid"
    shutil.copytree(tiny_model, start)
    monkeypatch.setattr(run, "QUICK", dataclasses.replace(run.QUICK, benign=32, attacks=3, held_out=4))
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS / "run.py")])
    paths = ["--data", str(shared_data), "--starts", str(start), "--work", str(tmp_path / "work")]
    options = [*paths, "--quick", "--results", str(results), "--threads", "1"]
    assert run.main([*options, "--budget", "0"]) == 0
    assert "out of time: 0 of 8" in capsys.readouterr().out
    assert run.main(options) == 0
    text = Path(f"{results}-quick.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert Counter(line["cell"]["harm"] for line in lines) == {"open-10": 4, "clean": 4}
    by = {(line["cell"]["harm"], line["cell"]["method"]): line for line in lines}
    trained = [line["training_fingerprint"] for line in lines]
    assert [line["shared"] for line in lines] == [name in trained[:k] for k, name in enumerate(trained)]
    assert by["clean", "none"]["outcome"] == by["open-10", "oracle"]["outcome"]
    assert by["open-10", "oracle"]["removal"]["recall"] == 1
    assert str(tmp_path) not in text
    capsys.readouterr()
    assert run.main(options) == 0
    assert capsys.readouterr().out == ""
