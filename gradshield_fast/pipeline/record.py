"""A run's record, run.json: put together from the folder's files, for a person and for the steps behind scoring."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gradshield_fast.pipeline.folder import RUN_FORMAT, RunFolder
from gradshield_fast.pipeline.manifest import Manifest
from gradshield_fast.pipeline.options import CorpusOptions
from gradshield_fast.pipeline.parts import part_path
from gradshield_fast.pipeline.sessions import read_sessions

_OWN = ("state", "request", "duplicates", "cut", "counts")


def run_record(folder: RunFolder, manifest: Manifest) -> dict[str, Any]:
    """Put together what the folder's files say about a run.

    Args:
        folder: the run's folder.
        manifest: its manifest.

    Returns:
        The content of run.json as it would be written now; "state" is "new", "scoring", "scored" or "complete".
    """
    sessions = read_sessions(folder)
    scorers = [session.pop("scorer") for session in sessions if "scorer" in session]
    parts = sum(part_path(folder, unit.number).exists() for unit in manifest.units)
    own = folder.read(folder.record) or {}
    if parts < len(manifest.units):
        own.pop("state", None)
    return {
        "format": RUN_FORMAT,
        "state": "new" if parts == 0 else "scoring" if parts < len(manifest.units) else "scored",
        "identity": manifest.identity,
        "request": manifest.request,
        "rows": manifest.rows,
        "units": len(manifest.units),
        **(folder.read(folder.prepared) or {}),
        "batches": folder.read(folder.batches),
        "sessions": sessions,
        "scorer": scorers[-1] if scorers else {},
        **{key: own[key] for key in _OWN if key in own},
    }


def keep_record(folder: RunFolder, manifest: Manifest, changes: dict[str, Any]) -> None:
    """Write run.json.

    Args:
        folder: the run's folder, locked for others.
        manifest: its manifest.
        changes: what is new in it.
    """
    folder.write(folder.record, {**run_record(folder, manifest), **changes})


def recorded_corpus(record: dict[str, Any], moved_to: str | Path | None = None) -> CorpusOptions:
    """Say which rows a run is about.

    Args:
        record: the run's.
        moved_to: where the corpus is now, if it has moved.

    Returns:
        The options it was read with, and where it was at the last start.
    """
    read = record["identity"]["corpus"]
    path = moved_to or record["request"]["corpus"]["path"]
    return CorpusOptions(path, read["format"], read["columns"], read["max_row_bytes"])
