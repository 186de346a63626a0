"""The last step of scoring: rows that say what an earlier one says are given what became of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradshield_fast.errors import InputError
from gradshield_fast.files import write_whole
from gradshield_fast.pipeline.duplicate_rows import DUPLICATE
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.parts import Part, part_bytes, part_path, read_part
from gradshield_fast.pipeline.units import Unit

_NUMBERS = ("fihs", "grad_norm", "loss", "tokens", "response_tokens")


def fill_duplicates(folder: RunFolder, units: Sequence[Unit]) -> int:
    """Give the duplicates in the parts of a run that is scored to its end what became of the rows they repeat.

    A part is written anew whole or not at all, and one that holds no open duplicate is left alone: so this can be
    stopped at any moment and done again, and the parts are the same in the end.

    Args:
        folder: the run's folder.
        units: all of its units.

    Returns:
        How many rows have the score of another one.

    Raises:
        InputError: a part is missing or damaged, or cannot be written.
    """
    parts = [part_path(folder, unit.number) for unit in units]
    open_parts, wanted, count = [], [np.zeros(0, dtype=np.int64)], 0
    for unit, path in zip(units, parts, strict=True):
        part = read_part(path)
        count += int((part.same_as >= 0).sum())
        mine = _open_rows(part)
        if mine.size:
            open_parts.append((unit, path))
            wanted.append(np.unique(part.same_as[mine]))
    if not open_parts:
        return count
    rows = np.unique(np.concatenate(wanted))
    table = _outcomes(parts, rows)
    for unit, path in open_parts:
        part = read_part(path)
        mine = _open_rows(part)
        at = np.searchsorted(rows, part.same_as[mine])
        for name in _NUMBERS:
            values = getattr(part, name).copy()  # Arrow lends its own memory, which is not to be written to
            values[mine] = getattr(table, name)[at]
            setattr(part, name, values)
        for i, k in zip(mine.tolist(), at.tolist(), strict=True):
            part.status[i], part.reason[i] = table.status[k], table.reason[k]
        write_whole(path, part_bytes(part, unit))
    return count


def _open_rows(part: Part) -> np.ndarray:
    return np.array([i for i, status in enumerate(part.status) if status == DUPLICATE], dtype=np.int64)


def _outcomes(parts: Sequence[Path], rows: np.ndarray) -> Part:
    """Collect what became of some rows; a status and its reason are held once for all rows that have them."""
    table: Part | None = None
    texts: dict[str, str] = {}
    for path in parts:
        part = read_part(path)
        low, high = np.searchsorted(rows, [part.row[0], part.row[-1] + 1])
        if table is None:
            table = Part.blank(0, len(rows), part.fihs.shape[1])
            table.row = rows
        at = rows[low:high] - part.row[0]
        for name in _NUMBERS:
            getattr(table, name)[low:high] = getattr(part, name)[at]
        for k, i in zip(range(low, high), at.tolist(), strict=True):
            table.status[k] = texts.setdefault(part.status[i], part.status[i])
            table.reason[k] = texts.setdefault(part.reason[i], part.reason[i])
    assert table is not None
    if DUPLICATE in table.status or "not_scored" in table.status:
        raise InputError("a row that others repeat has no outcome; run the same command again")
    return table
