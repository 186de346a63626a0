"""How far a run is, as a table."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from gradshield_fast.console import cell, clock
from gradshield_fast.pipeline.status import Status
from gradshield_fast.tables import facts

LAST = 20


def print_status(status: Status, console: Console) -> None:
    """Print how far a run is.

    Args:
        status: from `run_status`.
        console: where to.
    """
    at_work = "a process is at work" if status.working else "no process is at work on this machine"
    rows: list[tuple[str, Any]] = [
        ("state", f"{status.state}; {at_work}"),
        ("rows", f"{status.rows_done:,} of {status.rows:,}"),
        ("parts", f"{status.parts_done:,} of {status.parts:,}"),
    ]
    if status.rows_per_second:
        rows.append(("pace", f"{status.rows_per_second:.3g} rows/s"))
    if status.seconds_left:
        rows.append(("left", f"about {clock(status.seconds_left)} of scoring"))
    console.print(facts(rows, title=f"run {status.folder}"))
    if not status.sessions:
        return
    table = Table(title=f"starts, the last {LAST}" if len(status.sessions) > LAST else "starts", title_justify="left")
    names = ("started", "where", "shard", "rows", "rows/s", "waited", "ended")
    for name in names:
        table.add_column(name, justify="right" if name in ("rows", "rows/s", "waited") else "left", overflow="fold")
    for session in status.sessions[-LAST:]:
        seconds = session["seconds"]
        table.add_row(
            cell(session["started"]),
            cell(f"{session['host']}:{session['pid']}"),
            cell(session.get("shard") or ("ray" if session["engine"] == "ray" else "")),
            cell(f"{session['rows']:,}"),
            cell(f"{session['rows'] / seconds:.3g}" if seconds else ""),
            cell(clock(session["waited"])),
            cell(session.get("ended", "")),
        )
    console.print(table)
