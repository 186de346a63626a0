"""Write the tables of this folder's README.md from the results files.

    python benchmarks/replication/tables.py            # rewrites what stands between the marks
    python benchmarks/replication/tables.py --check    # says whether the file is as the results have it

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; a table whose results are not there yet stays empty.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data import TASKS
from lines import last, lines
from thresholds import SHARES, over_tasks

from gradshield_fast.errors import InputError

PAGE = Path(__file__).resolve().parent / "README.md"
TABLE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Lay out a Markdown table.

    Args:
        head: names of the columns.
        rows: cells.

    Returns:
        The table, with a line end.
    """
    whole = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(row)} |\n" for row in whole)


def detection(start: str) -> str:
    """Recall of every score at 5 % of benign rows removed.

    Args:
        start: name of the start.

    Returns:
        The table.
    """
    results = last("detection", start=start)["results"]
    tasks = (*TASKS, "all")
    cell = lambda m: f"{m['open']['recall_at_5']:.2f} / {m['disguised']['recall_at_5']:.2f}"  # noqa: E731
    mean = lambda m: float(np.mean([m[t][k]["recall_at_5"] for t in TASKS for k in ("open", "disguised")]))  # noqa: E731
    order = sorted(results, key=lambda name: -mean(results[name]))
    return table(["score", *tasks], ([name, *(cell(results[name][t]) for t in tasks)] for name in order))


def thresholds(start: str, kind: str) -> str:
    """What the rules remove by the default score.

    Args:
        start: name of the start.
        kind: "open" or "disguised".

    Returns:
        The table.
    """
    tasks = last("thresholds", start=start, kind=kind)["results"]["margin-cosine"]
    tables = [over_tasks(tasks, f"{share:g}") for share in SHARES]
    rows = []
    for rule in tables[0]:
        cells = [f"{100 * t[rule][0]:.1f} ({100 * t[rule][1]:.1f}) / {100 * t[rule][2]:.0f}" for t in tables]
        rows.append([rule, cells[0].split(" /")[0], *cells[1:]])
    return table(["rule", *(f"{share:.0%}" for share in SHARES)], rows)


def claim(start: str) -> str:
    """How well FIHS says what one step does.

    Args:
        start: name of the start.

    Returns:
        The table.
    """
    found = last("why", start=start)["claim"]
    rows = []
    for score, steps in found.items():
        for step, one in steps.items():
            cells = [f"{one[kind][how]:.3f}" for kind in ("dot", "cosine") for how in ("pearson", "spearman")]
            rows.append([score, step, *cells, f"{one['slope']:.3f}"])
    head = ["S", "step", "dot: Pearson", "dot: Spearman", "cosine: Pearson", "cosine: Spearman", "slope"]
    return table(head, rows)


def parts(start: str) -> str:
    """What each kind of weight finds alone.

    Args:
        start: name of the start.

    Returns:
        The table.
    """
    found = last("why", start=start)["parts"]
    cell = lambda score, part, kind: f"{found[score][part]['auc'][kind]:.3f}"  # noqa: E731
    some = [part for part in found["margin"] if not part.startswith("layer") or int(part[6:]) % 5 == 4]
    pairs = [(score, kind) for score in ("refusal", "margin") for kind in ("open", "disguised")]
    return table(
        ["weights", *(f"{s}, {k}" for s, k in pairs)], ([part, *(cell(s, part, k) for s, k in pairs)] for part in some)
    )


def outcomes(start: str) -> str:
    """What fine-tuning led to, cell by cell.

    Args:
        start: name of the start.

    Returns:
        The table; seeds are averaged, with the least and the greatest in brackets.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines("replication"):
        cell = line["cell"]
        if cell["start"] == start:
            groups.setdefault((cell["task"], cell["harm"], cell["method"], cell["rule"]), []).append(line)
    if not groups:
        raise InputError(f"replication: no cells of {start}")

    def spread(values: Sequence[float], digits: int) -> str:
        text = f"{np.mean(values):.{digits}f}"
        return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"

    rows = []
    for key, some in sorted(groups.items()):
        attack = [
            100 * np.divide(*np.sum([x["outcome"]["attack"][s] for s in ("harmbench", "catqa")], 0)) for x in some
        ]
        counts = [x["removal"]["removed"] for x in some]
        planted = [sum(n for kind, n in c.items() if kind != "benign") for c in counts]
        total = [sum(n for kind, n in x["removal"]["rows"].items() if kind != "benign") for x in some]
        measure = next((m for m in ("exact", "rouge_l") if m in some[0]["outcome"]["utility"]), "loss")
        useful = [x["outcome"]["utility"][measure] for x in some]
        benign = [100 * x["removal"]["benign_removed"] for x in some]
        found = f"{np.mean(planted):.0f} of {np.mean(total):.0f}"
        rows.append(
            [*key, str(len(some)), spread(attack, 0), f"{measure} {spread(useful, 3)}", found, spread(benign, 1)]
        )
    head = [
        "task",
        "harm",
        "score",
        "rule",
        "seeds",
        "attack success, %",
        "utility",
        "planted removed",
        "benign removed, %",
    ]
    return table(head, rows)


MAKERS: dict[str, Callable[[str], str]] = {
    "outcomes": outcomes,
    "detection": detection,
    "thresholds-open": lambda start: thresholds(start, "open"),
    "thresholds-disguised": lambda start: thresholds(start, "disguised"),
    "claim": claim,
    "parts": parts,
}


def fill(page: str) -> str:
    """Put the tables into a page.

    Args:
        page: Markdown with marks such as `<!-- table: detection-plain -->`, a maker's name and a start's.

    Returns:
        The page with the tables of today.
    """

    def made(match: re.Match[str]) -> str:
        name, start = match[2].rsplit("-", 1)
        try:
            return f"{match[1]}\n{MAKERS[name](start)}\n{match[3]}"
        except InputError as error:
            return f"{match[1]}\nNot measured yet ({error}).\n\n{match[3]}"

    return TABLE.sub(made, page)


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: with --check, 1 if the page is not what the results say.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(argv)
    before = options.page.read_text(encoding="utf-8")
    after = fill(before)
    if options.check:
        return int(before != after)
    options.page.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
