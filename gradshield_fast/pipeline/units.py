"""Work units: ranges of rows that are scored and committed together, where each begins, and what it holds.

The borders are a function of the corpus and of `part_rows` alone: no engine, worker or shard moves one, so none of them
moves a batch or a score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from gradshield_fast.corpus import Row, parse_row
from gradshield_fast.corpus_columns import RawRow
from gradshield_fast.corpus_files import CorpusFile, find_files, iter_raw
from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.duplicate_rows import Duplicates
from gradshield_fast.pipeline.options import CorpusOptions

BYTES_PER_ROW = 2048
"""A unit ends early once it holds as many bytes times `part_rows`: long rows cost more than short ones."""

_TOLD = 10_000


@dataclass(frozen=True, slots=True)
class Unit:
    """Consecutive rows of one file.

    Attributes:
        number: position among the units.
        file: position of the file in the corpus.
        first: position of the first row in the corpus.
        rows: how many.
        start: where they begin in the file: a byte of the uncompressed lines, or a row of Parquet and Arrow.
        bytes: of their lines, or of their rows as JSON.
        digest: BLAKE2 of those bytes, so that another content is noticed when it is read.
    """

    number: int
    file: int
    first: int
    rows: int
    start: int
    bytes: int
    digest: str


def cut_units(
    files: Sequence[CorpusFile],
    max_row_bytes: int,
    part_rows: int,
    advance: Callable[[int], None],
    take: Callable[[int, RawRow], None] | None = None,
) -> list[Unit]:
    """Read a corpus once and cut it.

    Args:
        files: from `find_files`.
        max_row_bytes: as for `read_corpus`.
        part_rows: rows of a unit at the most; its bytes end it too, and the end of its file.
        advance: told how many rows were read.
        take: given each row and its position, if anything is.

    Returns:
        The units, in order; none for a corpus without rows.
    """
    units: list[Unit] = []
    position = 0
    for number, file in enumerate(files):
        inside, open_unit = position, None
        for raw in iter_raw([file], max_row_bytes):
            if open_unit and (open_unit.rows == part_rows or open_unit.bytes + raw.size > part_rows * BYTES_PER_ROW):
                units.append(open_unit.close(len(units), number))
                open_unit = None
            open_unit = open_unit or _Growing(position, raw.offset if raw.offset >= 0 else position - inside)
            open_unit.add(raw)
            if take is not None:
                take(position, raw)
            position += 1
            if position % _TOLD == 0:
                advance(_TOLD)
        if open_unit:
            units.append(open_unit.close(len(units), number))
    return units


class _Growing:
    def __init__(self, first: int, start: int) -> None:
        self.first, self.start, self.rows, self.bytes, self.digest = first, start, 0, 0, _digest()

    def add(self, raw: RawRow) -> None:
        self.rows += 1
        self.bytes += raw.size
        _add(self.digest, raw)

    def close(self, number: int, file: int) -> Unit:
        return Unit(number, file, self.first, self.rows, self.start, self.bytes, self.digest.hexdigest())


def pack_units(units: Sequence[Unit]) -> dict[str, Any]:
    """Write units as JSON values.

    Args:
        units: the units.

    Returns:
        Their fields' names, and a list for each.
    """
    return {"fields": [field.name for field in fields(Unit)], "values": [list(astuple(unit)) for unit in units]}


def unpack_units(packed: Any, rows: int) -> list[Unit]:
    """Read units back; they must cover the rows without a gap or an overlap.

    Args:
        packed: from `pack_units`.
        rows: how many rows the corpus has.

    Returns:
        The units.

    Raises:
        ValueError: they do not.
    """
    if packed["fields"] != [field.name for field in fields(Unit)]:
        raise ValueError("its units have other fields")
    units = [Unit(*values) for values in packed["values"]]
    position = 0
    for number, unit in enumerate(units):
        if (unit.number, unit.first) != (number, position) or unit.rows < 1:
            raise ValueError(f"unit {number} does not follow on the one before it")
        position += unit.rows
    if position != rows:
        raise ValueError(f"its units hold {position} of {rows} rows")
    return units


def shard_units(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """Choose the units of one shard, so that all shards have about as many bytes.

    Args:
        units: all units.
        index: the shard, from 1.
        count: how many shards there are.

    Returns:
        Its units, in order; every unit is in one shard.
    """
    load = [0] * count
    mine = []
    for unit in units:
        least = load.index(min(load))
        load[least] += unit.bytes + 1
        if least == index - 1:
            mine.append(unit)
    return mine


class UnitReader:
    """Reads units, best in the order of their numbers: what is open is read on."""

    def __init__(self, corpus: CorpusOptions, duplicates: Path | None = None) -> None:
        """Find the corpus's files.

        Args:
            corpus: which rows.
            duplicates: file of the rows that stand for others; None: every row stands for itself.
        """
        self._corpus, self._files = corpus, find_files(corpus.path, corpus.format)
        self._duplicates = Duplicates.load(duplicates) if duplicates else None
        self._rows: Iterator[RawRow] = iter(())
        self._file, self._next = -1, 0

    def rows(self, unit: Unit) -> Iterator[Row]:
        """Read the rows of one unit.

        Args:
            unit: which.

        Yields:
            Its rows.

        Raises:
            InputError: the corpus is no longer what it was when it was cut; told at the unit's end at the latest.
        """
        changed = InputError(
            f"corpus {self._corpus.path} has changed since the run began: rows {unit.first} to "
            f"{unit.first + unit.rows - 1} are others; put it back, or name a new output folder"
        )
        if unit.file >= len(self._files):
            raise changed
        self._seek(unit)
        digest = _digest()
        for index in range(unit.first, unit.first + unit.rows):
            raw = next(self._rows, None)
            if raw is None:
                raise changed
            _add(digest, raw)
            self._next = index + 1
            yield parse_row(raw, index, self._corpus.columns, self._corpus.max_row_bytes)
        if digest.hexdigest() != unit.digest:
            raise changed

    def first(self, unit: Unit) -> np.ndarray:
        """Say which row stands for each row of a unit.

        Args:
            unit: which.

        Returns:
            int64 [rows]; a row's own position where it stands for itself.
        """
        if self._duplicates is None:
            return np.arange(unit.first, unit.first + unit.rows)
        return self._duplicates.first(unit.first, unit.rows)

    def _seek(self, unit: Unit) -> None:
        file, ahead = self._files[unit.file], unit.first - self._next
        if unit.file == self._file and (ahead == 0 or (ahead > 0 and file.compression)):
            for _ in range(ahead):
                next(self._rows, None)
        elif file.kind == "jsonl":
            self._rows = iter_raw([file], self._corpus.max_row_bytes, at=unit.start)
        else:
            self._rows = iter_raw([file], self._corpus.max_row_bytes, skip=unit.start)
        self._file, self._next = unit.file, unit.first


def _digest() -> Any:
    return hashlib.blake2b(digest_size=16)


def _add(digest: Any, raw: RawRow) -> None:
    digest.update(b"%d\0" % raw.size)
    digest.update(raw.sha256.encode("ascii") if raw.raw is None else raw.raw)
