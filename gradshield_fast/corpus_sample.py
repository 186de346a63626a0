"""A few rows from all over a corpus, and how many rows it has, without parsing all of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from gradshield_fast import storage
from gradshield_fast.corpus_columns import RawRow
from gradshield_fast.corpus_files import CorpusFile, iter_raw
from gradshield_fast.errors import InputError

_AT_ONCE = 8
_READ_WHOLE = 256 << 20


@dataclass(frozen=True)
class Sample:
    """Rows drawn from a corpus.

    Attributes:
        rows: the rows drawn.
        total: rows of the corpus, as far as that is known without reading all of it.
        exact: whether `total` was counted.
        stored: bytes of its files.
        row_bytes: bytes of a row as text, on average.
    """

    rows: list[RawRow]
    total: int
    exact: bool
    stored: int
    row_bytes: float


def sample_rows(files: Sequence[CorpusFile], count: int, max_row_bytes: int, seed: int = 0) -> Sample:
    """Draw rows, of each file in proportion to its size.

    A large file of plain lines is read at places chosen at random, a few lines at each, and their number follows from
    their length; Parquet says how many rows it has, and they are drawn at random positions; all others are read
    through, once.

    Args:
        files: from `find_files`.
        count: about how many rows.
        max_row_bytes: as for `read_corpus`.
        seed: of the draw.

    Returns:
        The rows.

    Raises:
        InputError: a file cannot be read, or there are no rows.
    """
    chance = random.Random(seed)
    sizes = [storage.size_of(file.path) for file in files]
    rows: list[RawRow] = []
    total, text, exact = 0.0, 0.0, True
    for file, size in zip(files, sizes, strict=True):
        wanted = max(1, round(count * size / max(1, sum(sizes))))
        if file.kind == "jsonl" and not file.compression and size > _READ_WHOLE:
            found = _at_random_bytes(file, size, wanted, max_row_bytes, chance)
            number = size / _mean([row.size + 1 for row in found]) if found else 0.0
            exact = False
        elif file.kind == "parquet":
            number, found = _of_parquet(file, wanted, max_row_bytes, chance)
        else:
            number, found = _read_through(file, wanted, max_row_bytes, chance)
        rows += found
        total += number
        text += number * _mean([row.size for row in found])
    if not rows:
        raise InputError("the corpus is empty: expected at least one row")
    return Sample(rows, round(total), exact, sum(sizes), text / max(total, 1.0))


def _mean(values: Sequence[int]) -> float:
    return sum(values) / len(values) if values else 0.0


def _at_random_bytes(
    file: CorpusFile, size: int, count: int, max_row_bytes: int, chance: random.Random
) -> list[RawRow]:
    """Read the lines behind bytes drawn at random, without the one that the byte is in: it is the longer, the likelier.

    The line behind it does not depend on its length, but the last lines of a group may not be there.
    """
    found = []
    for at in sorted(chance.randrange(size) for _ in range(-(-count // _AT_ONCE))):
        found += list(islice(iter_raw([file], max_row_bytes, at=at), 1, 1 + _AT_ONCE))
    return found or list(islice(iter_raw([file], max_row_bytes), count))


def _of_parquet(file: CorpusFile, count: int, max_row_bytes: int, chance: random.Random) -> tuple[int, list[RawRow]]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(storage.open_binary(file.path) if storage.is_url(file.path) else file.path) as opened:
        total = opened.metadata.num_rows
    found = []
    for start in sorted(chance.randrange(total) for _ in range(-(-count // _AT_ONCE))) if total else []:
        found += list(islice(iter_raw([file], max_row_bytes, skip=start), _AT_ONCE))
    return total, found


def _read_through(file: CorpusFile, count: int, max_row_bytes: int, chance: random.Random) -> tuple[int, list[RawRow]]:
    """Draw by a reservoir: each row of the file with the same chance."""
    total, held = 0, []
    for raw in iter_raw([file], max_row_bytes):
        total += 1
        if len(held) < count:
            held.append(raw)
        elif (place := chance.randrange(total)) < count:
            held[place] = raw
    return total, held
