"""A run's manifest: what it is about and the units that it is cut into, written once, before anything is scored."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

from gradshield_fast import storage
from gradshield_fast.corpus import parse_row
from gradshield_fast.corpus_columns import RawRow
from gradshield_fast.corpus_files import find_files
from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.duplicate_rows import Finder
from gradshield_fast.pipeline.folder import RUN_FORMAT, RunFolder
from gradshield_fast.pipeline.identity import differences, identity
from gradshield_fast.pipeline.options import RunOptions
from gradshield_fast.pipeline.progress import Reporter
from gradshield_fast.pipeline.units import Unit, cut_units, pack_units, unpack_units


@dataclass(frozen=True)
class Manifest:
    """What a run is about.

    Attributes:
        identity: from `identity`: what decides its scores.
        request: what was asked for, in words that a person can type again.
        rows: rows of the corpus.
        units: the ranges of rows that are scored and committed together.
    """

    identity: dict[str, Any]
    request: dict[str, Any]
    rows: int
    units: list[Unit]


def read_manifest(folder: RunFolder) -> Manifest | None:
    """Read the manifest of a folder.

    Args:
        folder: the run's folder.

    Returns:
        It, or None if there is none.

    Raises:
        InputError: it is damaged.
    """
    value = folder.read(folder.manifest)
    if value is None:
        return None
    try:
        units = unpack_units(value["units"], value["rows"])
        return Manifest(value["identity"], value["request"], value["rows"], units)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder.manifest} is damaged: {error}; name a new folder") from error


def open_manifest(folder: RunFolder, options: RunOptions, wanted: dict[str, Any], reporter: Reporter) -> Manifest:
    """Take up the run in a folder, or begin one; a run that has not scored anything yet gives way to another.

    Args:
        folder: the run's folder, locked.
        options: what was asked for.
        wanted: its identity.
        reporter: told how far the reading is.

    Returns:
        The manifest that stands.

    Raises:
        InputError: the folder holds another run, or the corpus has no rows.
    """
    with folder.preparing():
        old = read_manifest(folder)
        other = differences(old.identity, wanted) if old else []
        if old is not None and not other:
            return old
        if old is not None:
            if options.engine.shard or any(folder.scores.glob("part-*.parquet")):
                raise InputError(
                    f"output folder {folder.path} holds another run: it differs in {', '.join(other)}; "
                    "name a new folder"
                )
            _give_way(folder, other)
        manifest = _begin(folder, options, wanted, reporter)
        value = {
            "format": RUN_FORMAT,
            "identity": manifest.identity,
            "request": manifest.request,
            "rows": manifest.rows,
            "units": pack_units(manifest.units),
        }
        folder.publish(folder.manifest, value)
    return manifest


def wanted_identity(folder: RunFolder, options: RunOptions) -> dict[str, Any]:
    """Describe what is asked for.

    A shard does not read the whole corpus to hash it, where its files have the names and sizes that they had: each unit
    is held against its digest when it is read.

    Args:
        folder: the run's folder, which need not be there.
        options: what is asked for.

    Returns:
        Its identity.
    """
    old = read_manifest(folder) if options.engine.shard else None
    return identity(options, old.identity["corpus"] if old else None)


def _begin(folder: RunFolder, options: RunOptions, wanted: dict[str, Any], reporter: Reporter) -> Manifest:
    corpus = options.corpus
    files = find_files(corpus.path, corpus.format)
    reporter.stage("counting the rows")
    with contextlib.ExitStack() as stack:
        finder = stack.enter_context(Finder(folder.path)) if options.scoring.dedupe else None

        def take(position: int, raw: RawRow) -> None:
            if finder is not None:
                finder.add(position, parse_row(raw, position, corpus.columns, corpus.max_row_bytes).messages)

        units = cut_units(files, corpus.max_row_bytes, options.scoring.part_rows, reporter.advance, take)
        if finder is not None:
            duplicates = finder.write(folder.duplicates)
            reporter.note(f"rows that say what an earlier one says, and share its score: {duplicates:,}")
    if not units:
        raise InputError(f"corpus {corpus.path} is empty: expected at least one row; got only blank lines or nothing")
    return Manifest(wanted, request(options), units[-1].first + units[-1].rows, units)


def _give_way(folder: RunFolder, other: list[str]) -> None:
    """Remove what belongs to the run that was; a direction stays if the new run would make the same."""
    stale = [folder.prepared, folder.batches, folder.record, folder.duplicates]
    if any(name.startswith(("version", "model.", "direction.")) for name in other):
        stale.append(folder.direction)
    for path in [*stale, *folder.sessions.glob("*.jsonl"), folder.manifest]:
        with contextlib.suppress(OSError):
            path.unlink()


def request(options: RunOptions) -> dict[str, Any]:
    """Say what was asked for in words that a person can type again.

    Args:
        options: the run.

    Returns:
        JSON values.
    """
    return {
        "corpus": {"path": storage.absolute(options.corpus.path)},
        "model": options.model.name,
        "adapter": options.model.adapter,
        "probes": str(options.direction.probes) if options.direction.probes else None,
        "directions": [str(path) for path in options.direction.files],
    }
