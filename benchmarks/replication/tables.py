"""Write the tables of this folder's README.md from the results files.

    python benchmarks/replication/tables.py            # rewrites what stands between the marks
    python benchmarks/replication/tables.py --check    # says whether the file is as the results have it
    python benchmarks/replication/tables.py --page README.md

A table stands between `<!-- table: NAME -->` and `<!-- end -->`; a table whose results are not there yet stays empty.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from data import HARM, TASKS
from evaluate import wilson
from grid import ARMS
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
    """What the rules remove by the default score, and the rule of the distance by that.

    Args:
        start: name of the start.
        kind: "open" or "disguised".

    Returns:
        The table.
    """
    rows = []
    for method in ("margin-cosine", "distance"):
        found = [x for x in lines("thresholds") if x["start"] == start and x["options"]["kind"] == kind]
        tasks = next((x["results"][method] for x in reversed(found) if method in x["results"]), None)
        if tasks is None:
            continue
        tables = [over_tasks(tasks, f"{share:g}") for share in SHARES]
        for rule in tables[0]:
            if (rule == "outliers") == (method == "distance"):
                cells = [f"{100 * t[rule][0]:.1f} ({100 * t[rule][1]:.1f}) / {100 * t[rule][2]:.0f}" for t in tables]
                rows.append([f"{method}, {rule}", cells[0].split(" /")[0], *cells[1:]])
    if not rows:
        raise InputError(f"thresholds: nothing of {start}")
    return table(["score and rule", *(f"{share:.0%}" for share in SHARES)], rows)


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


def cells_of(start: str) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """Read the grid's lines of a start, levels and arms in the grid's order.

    Args:
        start: name of the start.

    Returns:
        Task, harm, method, rule -> lines, one a seed.

    Raises:
        InputError: there are none.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for line in lines("replication"):
        cell = line["cell"]
        if cell["start"] == start:
            groups.setdefault((cell["task"], cell["harm"], cell["method"], cell["rule"]), []).append(line)
    if not groups:
        raise InputError(f"replication: no cells of {start}")
    arms, levels = [*ARMS], [*HARM]

    def place(key: tuple[str, ...]) -> tuple[str, int, int, tuple[str, ...]]:
        arm = (key[2], key[3])
        return key[0], levels.index(key[1]), arms.index(arm) if arm in arms else len(arms), key

    return {key: groups[key] for key in sorted(groups, key=place)}


def spread(values: Sequence[float], digits: int) -> str:
    """Write values of several seeds.

    Args:
        values: one a seed.
        digits: after the point.

    Returns:
        The mean, and where there are several the least and the greatest.
    """
    text = f"{np.mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def attacks(line: dict[str, Any]) -> tuple[int, int]:
    """Count answered attacks, without a system turn.

    Args:
        line: of a cell.

    Returns:
        How many of how many.
    """
    both = np.sum([line["outcome"]["attack"][source] for source in ("harmbench", "catqa")], 0)
    return int(both[0]), int(both[1])


def utility(line: dict[str, Any]) -> tuple[str, float]:
    """Pick a cell's measure of utility.

    Args:
        line: of a cell.

    Returns:
        Its name and value.
    """
    measured = line["outcome"]["utility"]
    name = next((m for m in ("exact", "rouge_l") if m in measured), "loss")
    return name, measured[name]


def by_level(start: str, arms: Mapping[str, tuple[str, str]], cell: Callable[[list[dict[str, Any]]], str]) -> str:
    """Lay out arms against levels of harm on the grid's first task, levels without any difference left out.

    Args:
        start: name of the start.
        arms: head of a column -> method and rule.
        cell: lines of all seeds -> what the cell says.

    Returns:
        The table.
    """
    groups = cells_of(start)
    rows = []
    for harm in HARM:
        found = [groups.get(("banking77", harm, *arm)) for arm in arms.values()]
        row = [cell(some) if some else "-" for some in found]
        if len(set(row)) > 1:
            rows.append([harm, *row])
    return table(["harm", *arms], rows)


def all_attacks(some: Sequence[dict[str, Any]]) -> tuple[int, int]:
    """Count answered attacks over seeds.

    Args:
        some: lines of a cell, one a seed.

    Returns:
        How many of how many.
    """
    hits, count = np.sum([attacks(line) for line in some], 0)
    return int(hits), int(count)


def headline(start: str) -> str:
    """Attack success with its interval, the task's measure and the loss, by level and arm.

    Args:
        start: name of the start.

    Returns:
        The table.
    """

    def cell(some: list[dict[str, Any]]) -> str:
        hits, count = all_attacks(some)
        low, high = wilson(hits, count)
        useful, loss = (
            np.mean(v) for v in zip(*((utility(x)[1], x["outcome"]["utility"]["loss"]) for x in some), strict=True)
        )
        return f"{100 * hits / count:.1f} ({100 * low:.0f} to {100 * high:.0f}); {useful:.3f}; {loss:.3f}"

    return by_level(start, {f"{method}, {rule}": (method, rule) for method, rule in ARMS}, cell)


BRIEF = {
    "no filter": ("none", "nothing"),
    "paper's score and rule": ("fihs", "paper"),
    "default": ("margin-cosine", "separated"),
    "`--combine distance`": ("distance", "outliers"),
    "oracle": ("oracle", "top"),
}


def brief(start: str) -> str:
    """Attack success in % and the task's measure, of the arms that matter to a user.

    Args:
        start: name of the start.

    Returns:
        The table.
    """

    def cell(some: list[dict[str, Any]]) -> str:
        hits, count = all_attacks(some)
        return f"{100 * hits / count:.1f}; {np.mean([utility(line)[1] for line in some]):.3f}"

    return by_level(start, BRIEF, cell)


def outcomes(start: str) -> str:
    """What fine-tuning led to, cell by cell.

    Args:
        start: name of the start.

    Returns:
        The table; seeds are averaged, with the least and the greatest in brackets.
    """
    rows = []
    for key, some in cells_of(start).items():
        attack = [100 * np.divide(*attacks(x)) for x in some]
        counts = [x["removal"]["removed"] for x in some]
        planted = [sum(n for kind, n in c.items() if kind != "benign") for c in counts]
        total = [sum(n for kind, n in x["removal"]["rows"].items() if kind != "benign") for x in some]
        found = f"{np.mean(planted):.0f} of {np.mean(total):.0f}"
        useful = f"{utility(some[0])[0]} {spread([utility(x)[1] for x in some], 3)}"
        loss = spread([x["outcome"]["utility"]["loss"] for x in some], 3)
        benign = [100 * x["removal"]["benign_removed"] for x in some]
        rows.append([*key, str(len(some)), spread(attack, 0), useful, loss, found, spread(benign, 1)])
    head = ["task", "harm", "score", "rule", "seeds", "attack success, %", "utility", "loss", "planted removed"]
    return table([*head, "benign removed, %"], rows)


MAKERS: dict[str, Callable[[str], str]] = {
    "brief": brief,
    "headline": headline,
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
