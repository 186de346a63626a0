"""Rows that say the same: found before anything is scored, scored once, and given one score.

    first pass     every row's turns -> 16 bytes of hash; rows with the same hash are one row's duplicates: the first's
    scoring        a row whose first row is another one is not encoded and not scored; its part holds the status
                   "duplicate" and, in `same_as`, that row
    after it       the parts that hold duplicates are written anew with what became of the first row (`duplicates.py`)

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
        """Begin; what a process that was killed left is removed.

        Args:
            folder: where to put what does not fit into memory; a folder in it is made and removed.
        """
        self._spill = folder / ".duplicates.tmp"
        shutil.rmtree(self._spill, ignore_errors=True)
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

    def __enter__(self) -> Finder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, target: Path) -> int:
        """Write what was found.

        Args:
            target: .npy file of int64 [duplicates, 2]: a row, and the first row that says the same; by ascending row.

        Returns:
            How many duplicates there are.
        """
        pairs = [_pairs(self._entries())] if not self._files else self._spilled()
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
                self._spill.mkdir(parents=True)
                self._files = [open(self._spill / str(n), "w+b") for n in range(_BUCKETS)]  # noqa: SIM115 (see close)
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


def _pairs(entries: np.ndarray) -> np.ndarray:
    """Find the rows whose hash an earlier row has."""
    order = np.lexsort((entries["row"], entries["low"], entries["high"]))
    high, low, row = (entries[name][order] for name in ("high", "low", "row"))
    again = np.zeros(len(row), dtype=bool)
    again[1:] = (high[1:] == high[:-1]) & (low[1:] == low[:-1])
    # the first of each group of equal hashes, carried along to all of it
    first = row[np.maximum.accumulate(np.where(again, 0, np.arange(len(row))))] if len(row) else row
    return np.stack([row[again], first[again]], axis=1)
