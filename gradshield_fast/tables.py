"""A finished run, a dry run and a machine as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from gradshield_fast.console import cell, clock
from gradshield_fast.pipeline.dry import DryRun
from gradshield_fast.pipeline.summary import Summary


def facts(rows: Sequence[tuple[str, Any]], title: str | None = None) -> Table:
    """Lay out names and values.

    Args:
        rows: the pairs.
        title: what they are about.

    Returns:
        A table.
    """
    table = Table(title=title, show_header=False, title_justify="left")
    for _ in range(2):  # neither may push the other out of a narrow terminal
        table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(cell(name), cell(value))
    return table


def print_summary(summary: Summary, console: Console) -> None:
    """Print what came out of a run.

    Args:
        summary: the run.
        console: where to.
    """
    rows: list[tuple[str, Any]] = [("state", summary.state)] if summary.state != "complete" else []
    total = summary.record["rows"]
    rows.append(("rows", f"{total:,}" if total is not None else "not counted yet"))
    if summary.rows:
        rows.append(("scored", f"{summary.scored:,}"))
        if summary.duplicates:
            rows.append(("  duplicates", f"{summary.duplicates:,}, scored with the row that they repeat"))
        cut = [name for name in ("truncated",) if summary.statuses.get(name)]
        rows += [(f"  {name}", f"{summary.statuses[name]:,}") for name in cut]
        if summary.cut is not None:
            rows.append(("kept", f"{summary.scored - summary.dropped:,}"))
            rows.append(("dropped", f"{summary.dropped:,} ({summary.dropped / summary.rows:.1%})"))
        rows.append(("unscored", f"{summary.unscored:,}"))
        scored = {"ok", "truncated"}
        rows += [(f"  {name}", f"{n:,}") for name, n in summary.statuses.items() if name not in scored]
    rows += _cut_rows(summary.cut) + _direction_rows(summary.record) + _speed_rows(summary)
    console.print(facts(rows, title=f"run {summary.path}"))
    for warning in (summary.cut or {}).get("warnings", []):
        console.print(cell(f"warning: {warning}"))


def _cut_rows(cut: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    if cut is None:
        return []
    if cut["value"] is None:
        return [("threshold", "none")]
    rows: list[tuple[str, Any]] = [("threshold", f"{cut['column']} > {cut['value']:.6g} ({cut['kind']})")]
    if cut.get("log_likelihoods"):
        one, two = ("not fitted" if value is None else f"{value:.2f}" for value in cut["log_likelihoods"])
        rows.append(("log-likelihoods", f"one Gaussian {one}, two {two}; two must gain {cut['alpha']:.2f} nats"))
    for component in cut.get("components", []):
        text = f"weight {component['weight']:.3f}, mean {component['mean']:.4g}, std {component['std']:.4g}"
        rows.append(("component", text))
    return rows


def _direction_rows(record: Mapping[str, Any]) -> list[tuple[str, Any]]:
    direction = record.get("direction")
    if direction is None:
        return []
    rows = [("direction", direction["summary"]), *safety_rows(direction["meta"])]
    if any(one.get("options", {}).get("allow_unaligned") for one in _each(direction["meta"])):
        rows.append(("unaligned", "allowed: the check that the model refuses its probes was overridden"))
    return rows


def safety_rows(meta: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Say what the probes measured.

    Args:
        meta: `Direction.meta`, of one direction or of a stack.

    Returns:
        A name and a line for each direction that was built from probes.
    """
    rows = []
    for one in _each(meta):
        safety = one.get("safety")
        if safety:
            rate = f"the model refuses {safety['refusal_rate']:.0%} of {safety['probes']} probes"
            about = f"{rate} (refusal minus compliance: {safety['margin']:.2f})"
            if one["options"]["score"] == "identity_margin":
                about = f"over {safety['probes']} questions about the model itself"
            rows.append(("safety score", f"{one['options']['score']} {safety['S']:.3f} nats a token; {about}"))
    return rows


def _each(meta: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return meta.get("stack", [meta])


def residual_line(residual: float, meta: Mapping[str, Any]) -> str:
    """Say how much of a direction its low rank leaves out.

    Args:
        residual: `Direction.residual`.
        meta: `Direction.meta`.

    Returns:
        One line.
    """
    error = meta.get("low_rank", {}).get("residual_error")
    if error is None:
        return f"{residual:.3g} of the norm was dropped by compression"
    whole = len(meta.get("safety", {}).get("dense_weights", ()))
    return f"about {residual:.3g} (+- {error:.1g}) of the norm is left out; {whole} matrices were held whole"


def _speed_rows(summary: Summary) -> list[tuple[str, Any]]:
    if not summary.seconds:
        return []
    speed = f"{summary.speed('rows'):.3g} rows/s, {summary.speed('tokens'):,.0f} tokens/s"
    starts = len(summary.record["sessions"])
    rows: list[tuple[str, Any]] = [
        ("scoring", f"{clock(summary.seconds)}, {speed}" + (f", in {starts} starts" if starts > 1 else ""))
    ]
    halved = sum(session["halved_batches"] for session in summary.record["sessions"])
    if halved:
        rows.append(("halved batches", f"{halved:,} did not fit into memory; a lower --batch-tokens is faster"))
    backends = summary.record.get("scorer", {}).get("backends", {})
    if backends:
        rows.append(("op backends", ", ".join(f"{name} x{n}" for name, n in Counter(backends.values()).items())))
    return rows


def print_top(summary: Summary, texts: Mapping[int, str], console: Console) -> None:
    """Print the rows with the highest scores.

    Args:
        summary: the run, with its `top`.
        texts: position in the corpus -> excerpt.
        console: where to.
    """
    table = Table(title="highest scores", title_justify="left")
    for name in ("row", "id", "score", "loss", "", "excerpt"):
        table.add_column(name, justify="right" if name in ("row", "score", "loss") else "left", overflow="fold")
    for row in summary.top:
        table.add_row(
            cell(row.row),
            cell(row.id),
            cell(f"{row.score:.4g}"),
            cell(f"{row.loss:.3g}"),
            cell("dropped" if row.dropped else "kept" if summary.cut else ""),
            cell(texts.get(row.row, "")),
        )
    console.print(table)


def print_kinds(kinds: Mapping[str, tuple[int, int]], console: Console) -> None:
    """Print which share of each kind of row was dropped.

    Args:
        kinds: kind -> rows, dropped rows.
        console: where to.
    """
    table = Table(title="dropped by kind", title_justify="left")
    table.add_column("kind")
    for name in ("rows", "dropped", "share"):
        table.add_column(name, justify="right")
    for kind, (rows, dropped) in sorted(kinds.items(), key=lambda item: (-item[1][1] / item[1][0], item[0])):
        table.add_row(cell(kind), cell(rows), cell(dropped), cell(f"{dropped / rows:.1%}"))
    console.print(table)


def print_dry_run(dry: DryRun, dtype_bytes: int, batch_tokens: int, console: Console) -> None:
    """Print what a run would read and need.

    Args:
        dry: what was counted.
        dtype_bytes: bytes of one weight as it would be loaded.
        batch_tokens: tokens of a batch.
        console: where to.
    """
    rows: list[tuple[str, Any]] = [("rows", f"{dry.rows:,}")]
    rows += [(f"  {status}", f"{count:,}") for status, count in dry.statuses.most_common()]
    rows += [(f"  {note}", f"{count:,}") for note, count in dry.notes.most_common()]
    rows += [
        ("tokens", f"{dry.tokens:,}, of which {dry.response_tokens:,} carry the loss"),
        ("longest row", f"{dry.longest:,} tokens"),
        ("batches", f"{dry.batches:,}, {dry.padding:.1%} padding"),
        ("chat template", f"{dry.encoder['template_kind']}, sha256 {dry.encoder['template_sha256'][:12]}"),
        ("max length", dry.encoder["max_length"] or "none"),
    ]
    if dry.parameters is not None:
        built = f"{_gib(4 * dry.parameters)} more while the direction is built (float32)"
        rows.append(("weights", f"{dry.parameters:,}: {_gib(dtype_bytes * dry.parameters)}; {built}"))
    if dry.vocabulary:
        tokens = max(dry.longest, batch_tokens)
        rows.append(
            ("logits", f"{_gib(4 * tokens * dry.vocabulary)} for a batch of {tokens:,} tokens, a few times over")
        )
    console.print(facts(rows, title="dry run: nothing was scored or written"))
    for status, reason in dry.reasons.items():
        console.print(cell(f"{status}: {reason}"))


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
