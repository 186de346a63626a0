"""How far a run is, told from the files in its folder while it works, or after it died."""

from __future__ import annotations

import datetime
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.manifest import read_manifest
from gradshield_fast.pipeline.parts import part_path
from gradshield_fast.pipeline.record import run_record

RECENT = 3600.0
"""A start whose last line is older, in seconds, and which did not say that it ended, says nothing about the pace."""


@dataclass(frozen=True)
class Status:
    """How far a run is.

    Attributes:
        folder: the run's folder.
        state: "new", "scoring", "scored" or "complete".
        working: whether a process holds the folder's lock; False where the system has no file locks.
        rows: rows of the corpus.
        rows_done: rows of committed parts.
        parts: parts of the run.
        parts_done: committed parts.
        rows_per_second: of the starts that are at work, together; of the last one where none is.
        seconds_left: at that pace, by the bytes that are left; None where no part was timed.
        sessions: what each start did, the last one last: "started", "host", "pid", "shard", "rows", "tokens",
            "seconds", "waited", "ended".
    """

    folder: str
    state: str
    working: bool
    rows: int
    rows_done: int
    parts: int
    parts_done: int
    rows_per_second: float
    seconds_left: float | None
    sessions: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values.

        Returns:
            The attributes.
        """
        return asdict(self)


def run_status(out: str | Path) -> Status:
    """Read how far a run is; nothing is written, and no lock is kept.

    Args:
        out: the run's folder.

    Returns:
        The status.

    Raises:
        InputError: it holds no run.
    """
    folder = RunFolder(out)
    manifest = read_manifest(folder)
    if manifest is None:
        busy = folder.path.is_dir() and folder.working()
        what = "no run yet: its rows are still being counted" if busy else "no run"
        raise InputError(f"{out} holds {what}")
    record = run_record(folder, manifest)
    done = [unit for unit in manifest.units if part_path(folder, unit.number).exists()]
    left = sum(unit.bytes for unit in manifest.units) - sum(unit.bytes for unit in done)
    sessions = record["sessions"]
    running = [
        session for session in sessions if "ended" not in session and _age(session) < RECENT and session["seconds"]
    ]
    timed = running or [session for session in sessions if session["seconds"]][-1:]
    sizes = {unit.number: unit.bytes for unit in manifest.units}
    pace = sum(sum(sizes[number] for number in session["units"]) / session["seconds"] for session in timed)
    keep = ("started", "host", "pid", "engine", "shard", "rows", "tokens", "seconds", "waited", "ended", "error")
    return Status(
        folder=str(folder.path),
        state=record["state"],
        working=folder.working(),
        rows=manifest.rows,
        rows_done=sum(unit.rows for unit in done),
        parts=len(manifest.units),
        parts_done=len(done),
        rows_per_second=round(sum(session["rows"] / session["seconds"] for session in timed), 3),
        seconds_left=round(left / pace, 1) if pace and left else 0.0 if not left else None,
        sessions=[{key: session[key] for key in keep if key in session} for session in sessions],
    )


def _age(session: dict[str, Any]) -> float:
    """Seconds since a start last wrote something."""
    last = datetime.datetime.fromisoformat(session["started"]) + datetime.timedelta(seconds=session["last"])
    return (datetime.datetime.now(datetime.timezone.utc) - last).total_seconds()
