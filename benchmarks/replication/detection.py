"""How well each score finds planted rows, without any fine-tuning: from the numbers that sample.py recorded.

    python benchmarks/replication/detection.py --starts plain weak

For every start, task and kind of harm, in corpora with 10 % of it: area under the ROC curve, and recall at 5 % of the
benign rows removed, means over draws. One JSON line a start goes to benchmarks/results/detection.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from columns import FORMULAS
from data import TASKS
from sample import read_scores
from sklearn.metrics import roc_auc_score

from gradshield_fast.errors import GradShieldError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import append, surroundings  # beside this folder, not installed

PLANTED = ("open", "disguised")
HARM = 0.1
DRAWS = 10
ALLOWED = 0.05
"""Share of benign rows that may go."""


def all_scores(columns: Mapping[str, np.ndarray], wanted: Collection[str] = FORMULAS) -> dict[str, np.ndarray]:
    """Work out every score that the columns allow.

    Args:
        columns: of some rows.
        wanted: the formulas to work out; what needs none is always there.

    Returns:
        Method's name -> float64 [rows].
    """
    found = {"hidden": columns["hidden"], "keywords": columns["keywords"], "fihs": columns["refusal"]}
    for name, formula in ((name, FORMULAS[name]) for name in FORMULAS if name in wanted):
        if "dense" in formula.tables and "dense" not in columns:
            continue
        if "adam" in formula.tables and "refusal-adam" not in columns:
            continue
        found[name] = formula.score(columns)
    return found


def measure(scores: np.ndarray, harmful: np.ndarray) -> dict[str, float]:
    """Measure one score.

    Args:
        scores: float64 [rows].
        harmful: bool [rows].

    Returns:
        "auc", and "recall_at_5", the share of harmful rows above all but 5 % of the others.
    """
    line = np.quantile(scores[~harmful], 1 - ALLOWED)
    return {
        "auc": float(roc_auc_score(harmful, scores)),
        "recall_at_5": float((scores[harmful] > line).mean()),
    }


def corpus(benign: np.ndarray, planted: np.ndarray, seed: int) -> np.ndarray:
    """Draw a corpus with `HARM` of planted rows: a score that looks at all rows must see one as it would be.

    Args:
        benign: positions of all benign rows.
        planted: positions of rows that may be planted.
        seed: of the draw.

    Returns:
        Positions of the corpus's rows.
    """
    rng = np.random.default_rng(seed)
    count = min(len(planted), round(len(benign) * HARM / (1 - HARM)))
    return np.concatenate([benign, rng.permutation(planted)[: max(count, 2)]])


def by_task(found: Mapping[str, Any]) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """Measure every score on every task.

    Args:
        found: what `read_scores` gave.

    Returns:
        Method -> task, or "all" for the rows of all tasks together -> kind -> measures.
    """
    source = found["source"]
    results: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for task in (*TASKS, "all"):
        benign = ~np.isin(source, PLANTED) if task == "all" else source == task
        for kind in PLANTED:
            drawn: dict[str, list[dict[str, float]]] = {}
            for seed in range(DRAWS):
                rows = corpus(np.flatnonzero(benign), np.flatnonzero(source == kind), seed)
                scores = all_scores({name: values[rows] for name, values in found["columns"].items()})
                for name, values in scores.items():
                    drawn.setdefault(name, []).append(measure(values, source[rows] == kind))
            for name, some in drawn.items():
                means = {key: round(float(np.mean([m[key] for m in some])), 4) for key in some[0]}
                results.setdefault(name, {}).setdefault(task, {})[kind] = means
    return results


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", required=True, help="names of starts that sample.py has scored")
    parser.add_argument("--results", default="detection", help="file in benchmarks/results that gets a line a start")
    options = parser.parse_args(argv)
    for start in options.starts:
        found = read_scores(start)
        results = by_task(found)
        print(
            f"\n{start}: recall at 5 % of benign rows, open/disguised\n{'':24}"
            + "".join(f"{t:>13}" for t in [*TASKS, "all"])
        )
        for name, tasks in results.items():
            cells = [f"{m['open']['recall_at_5']:.2f}/{m['disguised']['recall_at_5']:.2f}" for m in tasks.values()]
            print(f"{name:24}" + "".join(f"{cell:>13}" for cell in cells))
        counts = {str(name): int((found["source"] == name).sum()) for name in np.unique(found["source"])}
        append(options.results, {**surroundings({"start": start}), "rows": counts, "results": results})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GradShieldError as error:
        sys.exit(f"error: {error}")
