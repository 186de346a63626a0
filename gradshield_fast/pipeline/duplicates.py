"""Rows that say the same: found before anything is scored, scored once, and given one score.

    first pass     every row's turns -> 16 bytes of hash; rows with the same hash are one row's duplicates: the first's
    scoring        a row whose first row is another one is not encoded and not scored; its part holds the status
                   "duplicate" and, in `same_as`, that row
    after it       the parts that hold duplicates are written anew with what became of the first row

So which row is scored depends on the corpus alone, and not on who scored what when. What the turns' hashes cannot see
is rows whose turns differ and render to the same tokens, as where a template trims white space; such rows are scored
once inside of a part (`engine.py`).
"""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np

from gradshield_fast.errors import InputError
from gradshield_fast.files import cannot_write, write_whole
from gradshield_fast.pipeline.parts import Part, read_part, write_part

DUPLICATE = "duplicate"
"""Status of a row in the part of a run that is not yet scored to its end."""

_HELD = 1 << 20
_BUCKETS = 256
_ENTRY = np.dtype([("high", "<u8"), ("low", "<u8"), ("row", "<i8")])


def turns_key(messages: Sequence[dict[str, str]]) -> bytes:
    """Hash what a row says; its id and other columns do not count.

    Args:
        messages: the turns.

    Returns:
        16 bytes (BLAKE2b): two different rows of a billion share them with a chance of 1e-21.
    """
    digest = hashlib.blake2b(digest_size=16)
    for message in messages:
        content = message["content"].encode("utf-8", "surrogatepass")
        digest.update(b"%s %d\n" % (message["role"].encode("ascii"), len(content)))
        digest.update(content)
    return digest.digest()


class Finder:
    """Finds duplicates among any number of rows: 25 MB in memory, 24 bytes a row on disk beyond a million rows."""

    def __init__(self, folder: Path) -> None:
        """Begin.

        Args:
            folder: where to put what does not fit into memory; a folder in it is made and removed.
        """
        self._spill = folder / ".duplicates.tmp"
        self._keys: list[bytes] = []
        self._rows: list[int] = []
        self._files: list[IO[bytes]] = []

    def add(self, row: int, messages: Sequence[dict[str, str]] | None) -> None:
        """Take in a row.

        Args:
            row: its position; greater than the last one.
            messages: its turns, or None for a row that cannot be read, which is nobody's duplicate.
        """
        if messages is None:
            return
        self._keys.append(turns_key(messages))
        self._rows.append(row)
        if len(self._keys) == _HELD:
            self._flush()

    def write(self, target: Path) -> int:
        """Write what was found.

        Args:
            target: .npy file of int64 [duplicates, 2]: a row, and the first row that says the same; by ascending row.

        Returns:
            How many duplicates there are.
        """
        try:
            pairs = [_pairs(self._entries())] if not self._files else self._spilled()
        finally:
            self.close()
        found = np.concatenate(pairs)
        found = found[np.argsort(found[:, 0])]
        buffer = io.BytesIO()
        np.save(buffer, found)
        write_whole(target, buffer.getvalue())
        return len(found)

    def close(self) -> None:
        """Remove what was put on disk."""
        for file in self._files:
            file.close()
        self._files = []
        shutil.rmtree(self._spill, ignore_errors=True)

    def _entries(self) -> np.ndarray:
        entries = np.empty(len(self._keys), dtype=_ENTRY)
        halves = np.frombuffer(b"".join(self._keys), dtype="<u8").reshape(-1, 2)
        entries["high"], entries["low"], entries["row"] = halves[:, 0], halves[:, 1], self._rows
        self._keys, self._rows = [], []
        return entries

    def _flush(self) -> None:
        """Append the entries to files by a part of their hash, so that equal ones meet in one file."""
        entries = self._entries()
        try:
            if not self._files:
                shutil.rmtree(self._spill, ignore_errors=True)
                self._spill.mkdir(parents=True)
                self._files = [(self._spill / str(n)).open("w+b") for n in range(_BUCKETS)]
            bucket = (entries["high"] % _BUCKETS).astype(np.int64)
            order = np.argsort(bucket, kind="stable")
            borders = np.searchsorted(bucket[order], np.arange(_BUCKETS + 1))
            for n, file in enumerate(self._files):
                file.write(entries[order[borders[n] : borders[n + 1]]].tobytes())
        except OSError as error:
            raise cannot_write(self._spill, error) from error

    def _spilled(self) -> list[np.ndarray]:
        self._flush()
        pairs = []
        for file in self._files:
            file.seek(0)
            pairs.append(_pairs(np.frombuffer(file.read(), dtype=_ENTRY)))
        return pairs


class Duplicates:
    """What a `Finder` found, read from disk as it is needed."""

    def __init__(self, pairs: np.ndarray) -> None:
        """Take what was found.

        Args:
            pairs: int64 [duplicates, 2], by ascending row.
        """
        self._pairs = pairs

    @classmethod
    def load(cls, path: Path) -> Duplicates:
        """Open the file of a run.

        Args:
            path: from `Finder.write`.

        Returns:
            Its content.

        Raises:
            InputError: it is missing or damaged.
        """
        try:
            pairs = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}; name a new folder") from error
        if pairs.dtype != np.int64 or pairs.ndim != 2 or pairs.shape[1] != 2:
            raise InputError(f"{path} is damaged: expected pairs of rows; name a new folder")
        return cls(pairs)

    def first(self, start: int, count: int) -> np.ndarray:
        """Say which row stands for each of some consecutive rows.

        Args:
            start: the first of them.
            count: how many.

        Returns:
            int64 [count]: the first row that says the same, which is the row itself where it is the first.
        """
        out = np.arange(start, start + count, dtype=np.int64)
        low, high = np.searchsorted(self._pairs[:, 0], [start, start + count])
        out[self._pairs[low:high, 0] - start] = self._pairs[low:high, 1]
        return out


def fill_duplicates(parts: Sequence[Path]) -> None:
    """Give the duplicates in the parts of a run that is scored to its end what became of the rows they repeat.

    A part is written anew whole or not at all, and one that holds no open duplicate is left alone: so this can be
    stopped at any moment and done again, and the parts are the same in the end.

    Args:
        parts: all parts, in the rows' order.

    Raises:
        InputError: a part is missing or damaged, or cannot be written.
    """
    open_parts, wanted = [], [np.zeros(0, dtype=np.int64)]
    for path in parts:
        part = read_part(path)
        mine = _open_rows(part)
        if mine.size:
            open_parts.append(path)
            wanted.append(np.unique(part.same_as[mine]))
    if not open_parts:
        return
    rows = np.unique(np.concatenate(wanted))
    table = _outcomes(parts, rows)
    for path in open_parts:
        part = read_part(path)
        mine = _open_rows(part)
        at = np.searchsorted(rows, part.same_as[mine])
        for name in _NUMBERS:
            getattr(part, name)[mine] = getattr(table, name)[at]
        for i, k in zip(mine.tolist(), at.tolist(), strict=True):
            part.status[i], part.reason[i] = table.status[k], table.reason[k]
        write_part(path, part)


_NUMBERS = ("fihs", "grad_norm", "loss", "tokens", "response_tokens")


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


def _pairs(entries: np.ndarray) -> np.ndarray:
    """Find the rows whose hash an earlier row has."""
    order = np.lexsort((entries["row"], entries["low"], entries["high"]))
    high, low, row = (entries[name][order] for name in ("high", "low", "row"))
    again = np.zeros(len(row), dtype=bool)
    again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    # the first of each group of equal hashes, carried along to all of it
    first = row[np.maximum.accumulate(np.where(again, 0, np.arange(len(row))))] if len(row) else row
    return np.stack([row[again], first[again]], axis=1)
