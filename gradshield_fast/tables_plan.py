"""A plan as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from gradshield_fast.pipeline.planning import GIB, Plan
from gradshield_fast.tables import facts


def print_plan(plan: Plan, console: Console) -> None:
    """Print what a run will need.

    Args:
        plan: from `plan_run`.
        console: where to.
    """
    about = "" if plan.exact else "about "
    rows: list[tuple[str, Any]] = [
        (
            "rows",
            f"{about}{plan.rows:,}; {plan.scorable:.1%} of the {plan.sampled:,} that were looked at can be scored",
        ),
        (
            "tokens",
            f"{plan.tokens:,.0f} +- {plan.tokens_error:,.0f}, of which {plan.response_tokens:,.0f} carry the loss",
        ),
        ("longest row", f"{plan.longest:,} tokens in the sample"),
    ]
    if plan.weights is None:
        rows.append(("memory", "not known: transformers has no class for this config"))
    else:
        rows.append(("weights", _gib(plan.weights)))
        if plan.direction:
            rows.append(("direction", f"{_gib(plan.direction)} more while it is built (float32)"))
        rows.append(("a step", "not measured: --measure does it" if plan.step is None else _gib(plan.step)))
        rows.append(("memory free", "not known: name it with --memory" if plan.free is None else _gib(plan.free)))
    there = "" if plan.disk_free is None else f"; {_gib(plan.disk_free)} are free"
    rows.append(("disk", f"up to {_gib(plan.disk)}{there}"))
    if plan.operations is not None:
        rows.append(("operations", f"{plan.operations:.3g} in linear layers, forward and backward"))
    rows.append(("rate", plan.source if plan.rate is None else f"{plan.rate:,.0f} tokens/s, {plan.source}"))
    if plan.hours is not None:
        rows.append(("hours", f"{plan.hours:.3g} of scoring, duplicates not taken off"))
    console.print(facts(rows, title="plan: nothing was scored or written"))


def _gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
