"""Which rule draws the best line, at every share of harm: corpora resampled from the scores that sample.py recorded.

    python benchmarks/replication/thresholds.py --starts plain

From the rows of a task, or of all tasks, benign rows are drawn without replacement and planted ones put among them;
every rule of rules.py sees their scores. What it removes of either kind is averaged over draws and tasks. The rule
"clean-Q" cuts at a quantile of the scores of 40 other benign rows of the same task, which somebody would have to know
to be clean. One JSON line a start goes to benchmarks/results/thresholds.jsonl.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data import TASKS
from detection import PLANTED, all_scores
from rules import RULES
from sample import read_scores

from gradshield_fast.errors import GradShieldError

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from record import append, surroundings  # beside this folder, not installed

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
KINDS = {"open": ("open",), "disguised": ("disguised",), "mixed": ("open", "disguised")}
"""Name of a mix -> what is planted, as much of each."""
CLEAN = 40
CLEAN_SHARES = (0.95, 1.0)
COMPARED = [
    *(name for name in RULES if name not in ("top", "nothing")),
    *(f"clean-{share:g}" for share in CLEAN_SHARES),
]
WANTED = ("fihs", "fihs-cosine", "margin", "margin-cosine")


def draw(source: np.ndarray, task: str, kind: str, share: float, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Draw a corpus.

    Args:
        source: where each row of the sample is from.
        task: name of a task, or "all".
        kind: name in `KINDS`.
        share: of planted rows in the corpus.
        rng: what draws.

    Returns:
        Positions of benign rows, of planted ones, and of clean rows that are not in the corpus.
    """
    pool = np.flatnonzero(~np.isin(source, PLANTED) if task == "all" else source == task)
    pool = rng.permutation(pool)
    held = min(CLEAN, len(pool) // 2)
    clean, benign = pool[:held], pool[held:]
    pools = [np.flatnonzero(source == name) for name in KINDS[kind]]
    most = len(pools) * min(map(len, pools)) / share * (1 - share) if share else len(benign)
    benign = benign[: round(most)]
    count = max(round(share / (1 - share) * len(benign) / len(pools)), 1 if share else 0)
    return benign, np.concatenate([rng.permutation(pool)[:count] for pool in pools]), clean


def outcomes(
    scores: np.ndarray, planted: int, clean: np.ndarray, seed: int, rules: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Let every rule draw its line.

    Args:
        scores: float64 [rows], those of planted rows last.
        planted: how many are.
        clean: scores of other rows, known to be clean; of no use but to the rules of that name.
        seed: of the rules.
        rules: which of `COMPARED`.

    Returns:
        Rule -> share of benign and of planted rows removed; nan where none is planted.
    """
    removed = {name: RULES[name](scores, planted, seed) for name in rules if name in RULES}
    quantiles = {f"clean-{share:g}": share for share in CLEAN_SHARES if f"clean-{share:g}" in rules}
    removed |= {name: scores > np.quantile(clean, share) for name, share in quantiles.items()}
    split = len(scores) - planted
    return {
        name: (float(gone[:split].mean()), float(gone[split:].mean()) if planted else float("nan"))
        for name, gone in removed.items()
    }


def study(found: dict[str, Any], methods: Sequence[str], kind: str, draws: int, rules: Sequence[str]) -> dict[str, Any]:
    """Compare the rules.

    Args:
        found: what `read_scores` gave.
        methods: names of scores.
        kind: name in `KINDS`.
        draws: corpora of each task and share.
        rules: which of `COMPARED`.

    Returns:
        Method -> task -> rule -> share of harm -> [benign removed, planted removed], means over draws.
    """
    source, results = found["source"], {}
    for task in (*TASKS, "all"):
        sums: dict[tuple[str, str, float], list[tuple[float, float]]] = {}
        for share in SHARES:
            for seed in range(draws):
                rng = np.random.default_rng([seed, round(100 * share)])
                benign, planted, clean = draw(source, task, kind, share, rng)
                rows = np.concatenate([benign, planted])
                # a score that looks at the whole corpus must not see the clean rows beside it
                inside = all_scores({name: x[rows] for name, x in found["columns"].items()}, methods)
                beside = inside
                if any(name not in RULES for name in rules):
                    more = np.concatenate([rows, clean])
                    beside = all_scores({name: x[more] for name, x in found["columns"].items()}, methods)
                for method in methods:
                    known = beside[method][len(rows) :]
                    for rule, pair in outcomes(inside[method], len(planted), known, seed, rules).items():
                        sums.setdefault((method, rule, share), []).append(pair)
        for (method, rule, share), pairs in sums.items():
            means = [None if np.isnan(x) else round(float(x), 4) for x in np.mean(pairs, axis=0)]
            results.setdefault(method, {}).setdefault(task, {}).setdefault(rule, {})[f"{share:g}"] = means
    return results


def over_tasks(tasks: dict[str, Any], share: str) -> dict[str, tuple[float, float, float, float]]:
    """Sum up a method's tasks.

    Args:
        tasks: task -> rule -> share -> outcome.
        share: of harm.

    Returns:
        Rule -> benign removed, mean over tasks and worst; planted removed, mean and worst.
    """
    summed = {}
    for rule in next(iter(tasks.values())):
        pairs = [tasks[task][rule][share] for task in tasks]
        benign, planted = [p[0] for p in pairs], [1.0 if p[1] is None else p[1] for p in pairs]
        summed[rule] = (float(np.mean(benign)), max(benign), float(np.mean(planted)), min(planted))
    return summed


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", nargs="+", required=True, help="names of starts that sample.py has scored")
    parser.add_argument("--methods", nargs="+", default=list(WANTED), help="scores, by the names of methods.py")
    parser.add_argument("--kind", choices=KINDS, default="open", help="what is planted")
    parser.add_argument("--rules", nargs="+", choices=COMPARED, default=COMPARED, help="names of rules.py")
    parser.add_argument("--draws", type=int, default=20, help="corpora of each task and share")
    parser.add_argument("--results", default="thresholds", help="file in benchmarks/results that gets a line a start")
    options = parser.parse_args(argv)
    for start in options.starts:
        results = study(read_scores(start), options.methods, options.kind, options.draws, options.rules)
        for method, tasks in results.items():
            print(f"\n{start}, {method}, {options.kind}: benign removed / planted removed, % (mean over tasks)")
            print(f"{'':12}" + "".join(f"{share:>13.0%}" for share in SHARES))
            tables = [over_tasks(tasks, f"{share:g}") for share in SHARES]
            for rule in tables[0]:
                cells = [f"{100 * t[rule][0]:.1f}/{100 * t[rule][2]:.0f}" for t in tables]
                cells[0] = cells[0].split("/")[0]
                print(f"{rule:12}" + "".join(f"{cell:>13}" for cell in cells))
        about = surroundings({**vars(options), "starts": [start]})
        append(options.results, {**about, "start": start, "kind": options.kind, "results": results})
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GradShieldError as error:
        sys.exit(f"error: {error}")
