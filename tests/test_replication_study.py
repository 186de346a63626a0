"""The replication's rules and its study of them, on made-up scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks" / "replication"))
import detection
import lines
import rules
import sample
import tables
import thresholds
import why
from columns import FORMULAS
from data import TASKS

from gradshield_fast import fit_threshold


def made_up(rng: np.random.Generator, rows: int = 80, harmful: int = 40) -> dict[str, object]:
    """Scores of every task's rows around 0 and of planted rows around 8, gradient norms of 1."""
    source = [name for name in TASKS for _ in range(rows)] + ["open"] * harmful + ["disguised"] * harmful
    planted = np.isin(source, ("open", "disguised"))
    score = lambda: (rng.normal(size=len(source)) + 8.0 * planted).tolist()  # noqa: E731
    names = ("refusal", "refusal-4", "refusal-64", "margin", "compliance", "pressed", "identity", "anchors", "lora")
    columns = {name: score() for name in (*names, "hidden", "keywords", "loss")}
    columns |= {"norm": [1.0] * len(source), "tokens": [5.0] * len(source)}
    return {"source": source, "columns": columns}


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "toy.json").write_text(json.dumps(made_up(np.random.default_rng(0))))
    monkeypatch.setattr(sample, "FOLDER", tmp_path)
    return "toy"


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run as a script of the benchmarks would be."""
    monkeypatch.setattr(sys, "argv", [str(Path(thresholds.__file__))])


@pytest.mark.parametrize("rule", rules.RULES)
def test_a_rule_finds_a_group_far_off(rule: str) -> None:
    rng = np.random.default_rng(1)
    scores = np.concatenate([rng.normal(size=270), rng.normal(size=30) + 12.0])
    gone = rules.RULES[rule](scores, 30, 0)
    assert gone.shape == scores.shape
    assert gone.dtype == bool
    if rule == "nothing":
        assert not gone.any()
    else:
        assert gone[270:].mean() > 0.9
        assert gone[:270].mean() < 0.05


@pytest.mark.parametrize("alpha", [None, 0.0, 5.0, 100.0])
def test_shared_fits_are_the_products(alpha: float | None) -> None:
    rng = np.random.default_rng(2)
    for share in (0.0, 0.02, 0.2):
        harmful = round(share * 200)
        scores = np.concatenate([rng.standard_t(4, size=200 - harmful), rng.normal(size=harmful) + 6.0])
        name = "paper" if alpha is None else f"paper-{alpha:.0f}"
        want = fit_threshold(scores, alpha=alpha, random_state=3).removes(scores)
        assert (rules.RULES[name](scores, harmful, 3) == want).all()


def test_student_mixture_raises_its_likelihood() -> None:
    z = np.random.default_rng(3).standard_t(4, size=500)
    upper = (z > 1).astype(float)
    shares = np.stack([1 - upper, upper], 1)
    totals = [rules.fit_students(z, shares, steps)[0] for steps in (1, 5, 40)]
    assert totals == sorted(totals)


def test_scores_are_measured(recorded: str) -> None:
    found = detection.by_task(sample.read_scores(recorded))
    assert {"fihs", "margin-cosine", "hidden"} <= set(found)
    assert "fihs-dense" not in found, "needs a column that was not scored"
    assert set(found) - {"fihs", "hidden", "keywords"} <= set(FORMULAS)
    assert found["margin"]["all"]["disguised"]["auc"] > 0.99


@pytest.mark.usefixtures("at_home")
def test_thresholds_are_compared(recorded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "thresholds"
    args = ["--starts", recorded, "--methods", "margin-cosine", "--draws", "1", "--results", str(results)]
    assert thresholds.main(args) == 0
    (line,) = (tmp_path / "thresholds.jsonl").read_text().splitlines()
    by_rule = json.loads(line)["results"]["margin-cosine"]["all"]
    assert set(by_rule) == set(rules.RULES) - {"top", "nothing"} | {"clean-0.95", "clean-1"}
    assert by_rule["keep"]["0"] == [0.0, None]
    assert by_rule["paper"]["0.1"][1] > 0.9
    assert "benign removed / planted removed" in capsys.readouterr().out


@pytest.mark.usefixtures("at_home")
def test_real_rows_are_scored_once(
    tiny_model: Path, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "FOLDER", tmp_path)
    args = ["--start", str(tiny_model), "--data", str(shared_data), "--benign", "1", "--open", "3", "--threads", "1"]
    args += ["--max-length", "900", "--dtype", "float32", "--work", str(tmp_path / "work")]
    assert sample.main(args) == 0
    found = sample.read_scores(tiny_model.name)
    columns = found["columns"]
    scored = detection.all_scores(columns)
    assert set(scored) == {*FORMULAS, "hidden", "keywords", "fihs"}
    assert all(len(values) == found["rows"] and np.isfinite(values).all() for values in scored.values())
    # a low rank of a tiny model's weights is nearly all of them
    np.testing.assert_allclose(
        columns["refusal-64"], columns["dense"], rtol=1e-3, atol=1e-4 * abs(columns["dense"]).max()
    )
    tables = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").rglob("*.json")}
    assert sample.main(args) == 0
    assert {path: path.stat().st_mtime_ns for path in tables} == tables, "nothing was scored again"


@pytest.mark.usefixtures("at_home")
def test_the_first_order_claim_is_tested(tiny_model: Path, shared_data: Path, tmp_path: Path) -> None:
    args = ["--start", str(tiny_model), "--data", str(shared_data), "--benign", "1", "--open", "4", "--probes", "3"]
    args += ["--sgd", "1e-4", "--max-length", "900", "--threads", "1", "--results", str(tmp_path / "why")]
    assert why.main(args) == 0
    line = json.loads((tmp_path / "why.jsonl").read_text())
    first = line["claim"]["margin"]["sgd 0.0001"]
    assert first["dot"]["pearson"] > 0.99
    assert 0.95 < first["slope"] < 1.05
    assert {"layer 0", "norm", "embed"} <= set(line["parts"]["refusal"])


@pytest.mark.usefixtures("at_home")
def test_figures_are_drawn_from_what_there_is(
    recorded: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = pytest.importorskip("figures", reason="needs matplotlib, the extra 'report'")
    monkeypatch.setattr(lines, "RESULTS", tmp_path)
    assert figures.main(["--start", recorded, "--methods", "fihs", "--out", str(tmp_path / "drawn")]) == 0
    assert {path.name for path in (tmp_path / "drawn").iterdir()} == {"scores-toy.png", "scores-toy.svg"}
    assert "left out attack: replication.jsonl: not there yet" in capsys.readouterr().out


@pytest.mark.usefixtures("at_home")
def test_tables_are_made_from_the_results(recorded: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "RESULTS", tmp_path)
    assert detection.main(["--starts", recorded, "--results", str(tmp_path / "detection")]) == 0
    page = tmp_path / "page.md"
    page.write_text(
        "# A\n<!-- table: detection-toy -->\n<!-- end -->\nand\n<!-- table: claim-toy -->\nold\n<!-- end -->\n"
    )
    assert tables.main(["--page", str(page), "--check"]) == 1
    assert tables.main(["--page", str(page)]) == 0
    text = page.read_text()
    assert "| margin-cosine | 1.00 / 1.00 |" in text
    assert "Not measured yet (why.jsonl: not there yet)." in text
    assert "old" not in text
    assert tables.main(["--page", str(page), "--check"]) == 0
