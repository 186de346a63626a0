"""Figures of the replication, as PNG and SVG, from the results files.

    pip install '.[report]'
    python benchmarks/replication/figures.py --start plain

    scores-START       score distributions of a corpus with 10 % of open harm, the fitted curves and the cut
    detection-START    how many planted rows each score finds when it may take 5 % of the benign ones
    rules-START        what each rule removes, by share of harm
    attack-START       attack success after fine-tuning, by share of harm and method
    utility-START      utility after fine-tuning, the same
    claim-START        what one step took off S, against what FIHS says

Figures whose results are not there yet are left out, and named.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from data import TASKS
from detection import all_scores
from lines import last, lines
from rules import adaptive
from sample import read_scores
from scipy.stats import norm
from thresholds import SHARES, draw, over_tasks

from gradshield_fast.errors import InputError

COLOURS = {"benign": "#9aa5b1", "open": "#c0392b", "disguised": "#8e44ad"}
LINES = ("#555555", "#c0392b", "#1f6fb2", "#2e8b57", "#d98200", "#8e44ad", "#17a2b8", "#111111", "#b5651d")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*", "p")


def save(figure: Any, folder: Path, name: str) -> None:
    """Write a figure.

    Args:
        figure: of matplotlib.
        folder: where to.
        name: of the file, without its ending.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plt.rcParams["svg.hashsalt"] = name  # names of clip paths: the same file every time
    for ending in ("png", "svg"):
        about = {"Date": None} if ending == "svg" else None
        figure.savefig(folder / f"{name}.{ending}", dpi=130, bbox_inches="tight", metadata=about)
    plt.close(figure)


def distributions(start: str, methods: Sequence[str], task: str = "banking77", share: float = 0.1) -> Any:
    """Draw the scores of one corpus, with what the threshold fitted.

    Args:
        start: name of the start.
        methods: names of scores, one panel each.
        task: name of the task.
        share: of openly harmful rows.

    Returns:
        The figure.
    """
    found = read_scores(start)
    benign, planted, _ = draw(found["source"], task, "open", share, np.random.default_rng(0))
    rows = np.concatenate([benign, planted])
    kinds = np.array(["benign"] * len(benign) + ["open"] * len(planted))
    scores = all_scores({name: values[rows] for name, values in found["columns"].items()})
    figure, axes = plt.subplots(1, len(methods), figsize=(5.2 * len(methods), 3.6), squeeze=False)
    for axis, method in zip(axes[0], methods, strict=True):
        x = scores[method]
        cut = adaptive(x, 1.5 * math.log(len(x)), 0)
        edges = np.linspace(x.min(), x.max(), 50)
        width = edges[1] - edges[0]
        parts = [x[kinds == kind] for kind in ("benign", "open")]
        names = [f"{kind} ({len(part)} rows)" for kind, part in zip(("benign", "harmful"), parts, strict=True)]
        axis.hist(parts, edges, stacked=True, color=[COLOURS["benign"], COLOURS["open"]], label=names)
        grid = np.linspace(edges[0], edges[-1], 400)
        for part in cut.components:
            if part["std"] > 0:
                curve = part["weight"] * len(x) * width * norm.pdf(grid, part["mean"], part["std"])
                axis.plot(grid, curve, color="#222222", lw=1.2)
        gone = cut.removes(x)
        axis.axvline(cut.value, color="#1f6fb2", ls="--", lw=1.5)
        axis.set_title(
            f"{method}: {cut.kind.replace('_', ' ')}, removes {int(gone[kinds == 'open'].sum())} of {len(planted)} "
            f"harmful\nand {int(gone[kinds == 'benign'].sum())} of {len(benign)} benign rows",
            fontsize=9,
        )
        axis.set_xlabel("score (right of the dashed line: removed)")
        axis.legend(fontsize=8, frameon=False)
    axes[0][0].set_ylabel("rows")
    figure.suptitle(f"Start {start}, {task} with {share:.0%} of openly harmful rows", y=1.04, fontsize=10)
    return figure


def detection(start: str) -> Any:
    """Draw the recall of every score.

    Args:
        start: name of the start.

    Returns:
        The figure.
    """
    results = last("detection", start=start)["results"]
    mean = lambda m, kind: float(np.mean([results[m][t][kind]["recall_at_5"] for t in TASKS]))  # noqa: E731
    order = sorted(results, key=lambda m: mean(m, "open") + mean(m, "disguised"))
    figure, axis = plt.subplots(figsize=(7, 0.3 * len(order) + 1))
    for k, (kind, shift) in enumerate((("open", 0.2), ("disguised", -0.2))):
        axis.barh(
            np.arange(len(order)) + shift,
            [mean(m, kind) for m in order],
            0.38,
            color=COLOURS[kind],
            label=f"{kind} harm",
        )
        for i, m in enumerate(order):
            worst = min(results[m][t][kind]["recall_at_5"] for t in TASKS)
            axis.plot(worst, i + shift, "|", color="black", ms=7, label="worst task" if k == 0 and i == 0 else None)
    axis.set_yticks(range(len(order)), order, fontsize=8)
    axis.set_xlim(0, 1)
    axis.set_xlabel(f"recall at 5 % of benign rows removed, mean over {len(TASKS)} tasks; start {start}")
    axis.legend(fontsize=8, loc="lower right")
    return figure


def rules(start: str, method: str) -> Any:
    """Draw what rules remove.

    Args:
        start: name of the start.
        method: name of the score.

    Returns:
        The figure.
    """
    tasks = last("thresholds", start=start, kind="open")["results"][method]
    tables = [over_tasks(tasks, f"{share:g}") for share in SHARES]
    names = [
        n
        for n in ("paper", "separated", "keep", "between", "students", "otsu", "left-3", "median-4", "clean-1")
        if n in tables[0]
    ]
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    for k, name in enumerate(names):
        style: dict[str, Any] = {"color": f"C{k}", "marker": MARKS[k], "ms": 5, "label": name}
        axes[0].plot([100 * s for s in SHARES], [100 * t[name][0] for t in tables], **style)
        axes[1].plot([100 * s for s in SHARES[1:]], [100 * t[name][2] for t in tables[1:]], **style)
    axes[0].set_ylabel("benign rows removed, %")
    axes[0].set_yscale("symlog", linthresh=1)
    axes[1].set_ylabel("harmful rows removed, %")
    for axis in axes:
        axis.set_xlabel("harmful rows in the corpus, %")
    axes[1].legend(fontsize=8)
    figure.suptitle(f"Rules on {method}, start {start}, open harm, mean over tasks", fontsize=10)
    return figure


def _level(harm: str) -> float | None:
    return 0.0 if harm == "clean" else float(harm[5:]) if harm.startswith("open-") else None


def outcome(start: str, value: Callable[[dict[str, Any]], float], label: str, task: str = "banking77") -> Any:
    """Draw what fine-tuning led to, against the share of openly harmful rows.

    Args:
        start: name of the start.
        value: outcome -> the number that is drawn.
        label: what it is.
        task: name of the task.

    Returns:
        The figure.

    Raises:
        InputError: no cell of it has run.
    """
    points: dict[str, dict[float, list[float]]] = {}
    for line in lines("replication"):
        cell = line["cell"]
        level = _level(cell["harm"])
        if cell["start"] == start and cell["task"] == task and level is not None:
            points.setdefault(f"{cell['method']}, {cell['rule']}", {}).setdefault(level, []).append(
                value(line["outcome"])
            )
    curves = {arm: levels for arm, levels in points.items() if len(levels) > 2}
    if not curves:
        raise InputError(f"replication: no cells of {start} with {task}")
    figure, axis = plt.subplots(figsize=(6, 3.8))
    for k, (arm, levels) in enumerate(curves.items()):
        at = sorted(levels)
        style: dict[str, Any] = {"color": LINES[k % len(LINES)], "marker": MARKS[k % len(MARKS)], "ms": 5}
        axis.plot(at, [float(np.mean(levels[x])) for x in at], label=arm, **style)
        axis.fill_between(
            at, [min(levels[x]) for x in at], [max(levels[x]) for x in at], alpha=0.15, color=style["color"]
        )
    axis.set_xlabel("openly harmful rows in the corpus, %")
    axis.set_ylabel(label)
    axis.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    axis.set_title(f"{task}, start {start}: mean and range over seeds", fontsize=10)
    return figure


def attack(outcome: dict[str, Any]) -> float:
    """Share of attack prompts that were answered.

    Args:
        outcome: of a cell.

    Returns:
        In per cent.
    """
    hits, count = np.sum([outcome["attack"][source] for source in ("harmbench", "catqa")], axis=0)
    return 100.0 * float(hits) / float(count)


def useful(outcome: dict[str, Any]) -> float:
    """Share of held-out rows that were answered exactly.

    Args:
        outcome: of a cell.

    Returns:
        In per cent.
    """
    return 100.0 * float(outcome["utility"]["exact"])


def claim(start: str) -> Any:
    """Draw measured against predicted loss of safety.

    Args:
        start: name of the start.

    Returns:
        The figure.
    """
    line = last("why", start=start)
    points = line["points"]
    source = np.array([p[0] for p in points])
    numbers = np.array([p[1:] for p in points])
    rates = line["options"]["sgd"]
    shown = [0, len(rates) - 1]
    figure, axes = plt.subplots(1, len(shown), figsize=(5 * len(shown), 4))
    kinds = np.where(np.isin(source, ("open", "disguised")), source, "benign")
    for axis, k in zip(axes, shown, strict=True):
        predicted, lost = rates[k] * numbers[:, 0], -numbers[:, 3 + 2 * k]
        for kind, colour in COLOURS.items():
            axis.plot(predicted[kinds == kind], lost[kinds == kind], ".", color=colour, label=kind)
        ends = np.array([predicted.min(), predicted.max()])
        axis.plot(ends, ends, color="black", lw=0.8)
        step = f"sgd {rates[k]:g}"
        axis.set_title(
            f"SGD, {rates[k]:g}: correlation {line['claim']['refusal'][step]['dot']['pearson']:.2f}", fontsize=9
        )
        axis.locator_params(nbins=5)
        axis.set_xlabel("FIHS times learning rate, nats a token")
    axes[0].set_ylabel("S before less S after one step on the row")
    axes[0].legend(fontsize=8)
    return figure


def main(argv: list[str] | None = None) -> int:
    """Run the script.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        Exit code: 1 if nothing could be drawn.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", default="plain", help="name of a start")
    parser.add_argument("--methods", nargs="+", default=["fihs", "fihs-cosine", "margin-cosine"])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "figures")
    options = parser.parse_args(argv)
    start = options.start
    makers: dict[str, Callable[[], Any]] = {
        "scores": lambda: distributions(start, options.methods),
        "detection": lambda: detection(start),
        "rules": lambda: rules(start, options.methods[-1]),
        "attack": lambda: outcome(start, attack, "attack success, %"),
        "utility": lambda: outcome(start, useful, "held-out intents named exactly, %"),
        "claim": lambda: claim(start),
    }
    drawn = 0
    for name, make in makers.items():
        try:
            save(make(), options.out, f"{name}-{start}")
            drawn += 1
        except InputError as error:
            print(f"left out {name}: {error}")
    return 0 if drawn else 1


if __name__ == "__main__":
    sys.exit(main())
