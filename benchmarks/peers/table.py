"""What came out: speed, memory and agreement of each peer, as JSON values and as a table for a person."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

import numpy as np
from scipy.stats import rankdata

BASELINE = "autograd_loop"


def agreement(scores: list[float], truth: list[dict[str, list[float]]], covers: str) -> dict[str, float]:
    """Hold scores against the truth over the weights that the peer covers.

    Args:
        scores: one a row.
        truth: see `oracle.py`.
        covers: "all" or "linear".

    Returns:
        Rank and linear correlation, the largest error in units of sum |grad loss * r|, and the rank correlation with
        the truth over *all* weights, which is what a filter asks for.
    """
    got = np.array(scores)
    want, size = np.array([row[covers] for row in truth]).T
    whole = np.array([row["all"][0] for row in truth])
    if len(got) < 2:
        return {"max_error": float((abs(got - want) / size).max())}
    return {
        "spearman": _correlation(rankdata(got), rankdata(want)),
        "pearson": _correlation(got, want),
        "max_error": float((abs(got - want) / size).max()),
        "spearman_all_weights": _correlation(rankdata(got), rankdata(whole)),
    }


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1])


def results(
    state: dict[str, Any], peers: Iterable[str], truth: list[dict[str, list[float]]], tokens: int
) -> dict[str, Any]:
    """Sum up a run.

    Args:
        state: see `run.py`.
        peers: their names, in order.
        truth: of each row.
        tokens: of all rows.

    Returns:
        Peer -> JSON values; "error" alone for one that could not run.
    """
    slow = [one["seconds"] for one in state["rounds"].get(BASELINE, [])]
    out: dict[str, Any] = {}
    for name in peers:
        rounds = state["rounds"].get(name, [])
        if name in state["errors"] or not rounds:
            out[name] = {"error": state["errors"].get(name, "not run")}
            continue
        seconds = [one["seconds"] for one in rounds]
        covers = state["covers"][name]
        out[name] = {
            "covers": covers,
            "batch_tokens": rounds[0]["batch_tokens"],
            "tried": state["tried"][name],
            "seconds": seconds,
            "cpu_seconds": [one.get("cpu_seconds") for one in rounds],
            "notes": rounds[-1].get("notes", {}),
            "tokens_per_s": {"best": tokens / min(seconds), "median": tokens / statistics.median(seconds)},
            "times_as_fast": [a / b for a, b in zip(slow, seconds, strict=False)],
            "peak_mib": _largest(rounds, "peak_mib"),
            "extra_mib": _largest(rounds, "extra_mib"),
            "agreement": agreement(rounds[-1]["scores"], truth, covers),
            "same_scores_every_round": all(one["scores"] == rounds[0]["scores"] for one in rounds),
        }
    return out


def _largest(rounds: list[dict[str, Any]], key: str) -> float | None:
    values = [one[key] for one in rounds if one[key] is not None]
    return max(values) if values else None


def lines(outcome: dict[str, Any]) -> list[str]:
    """Lay the results out.

    Args:
        outcome: what `results` gave.

    Returns:
        Lines of text.
    """
    head = ("peer", "weights", "batch", "tokens/s", "median", "x loop", "peak MiB", "extra", "Spearman", "Pearson")
    form = "{:20s} {:7s} {:>6s} {:>9s} {:>8s} {:>7s} {:>9s} {:>7s} {:>10s} {:>10s} {:>10s}"
    out = [form.format(*head, "max error")]
    for name, x in outcome.items():
        if "error" in x:
            out.append(f"{name:20s} cannot run: {x['error']}")
            continue
        held = x["agreement"]
        ratio = statistics.median(x["times_as_fast"]) if x["times_as_fast"] else float("nan")
        out.append(
            form.format(
                name,
                x["covers"],
                str(x["batch_tokens"]),
                f"{x['tokens_per_s']['best']:.0f}",
                f"{x['tokens_per_s']['median']:.0f}",
                f"{ratio:.2f}",
                "-" if x["peak_mib"] is None else f"{x['peak_mib']:.0f}",
                "-" if x["extra_mib"] is None else f"{x['extra_mib']:.0f}",
                f"{held.get('spearman', float('nan')):.5f}",
                f"{held.get('pearson', float('nan')):.6f}",
                f"{held['max_error']:.1e}",
            )
        )
    return out
