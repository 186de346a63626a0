"""The scores of a fixed range of rows, in one Parquet file that appears whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.folder import RunFolder
from gradshield_fast.pipeline.options import fihs_column
from gradshield_fast.pipeline.units import Unit

_ROWS, _SCORES = b"gradshield_fast.rows", b"gradshield_fast.scores"

SCORED = ("ok", "truncated")
"""Statuses of the rows that have a score."""


@dataclass
class Part:
    """Scores of consecutive rows; numbers are NaN where there is none.

    Attributes:
        row: int64 [rows], positions in the corpus.
        id: the rows' own ids.
        fihs: float32 [rows, directions].
        grad_norm: float32 [rows].
        loss: float32 [rows].
        tokens: int32 [rows]; 0 for a row that could not be encoded.
        response_tokens: int32 [rows].
        status: "ok", "truncated", or why the row has no score.
        reason: a sentence for a person where the status is not "ok".
        same_as: int64 [rows], the earlier row that says the same and was scored in its place; -1 where there is none.
    """

    row: np.ndarray
    id: list[str]
    fihs: np.ndarray
    grad_norm: np.ndarray
    loss: np.ndarray
    tokens: np.ndarray
    response_tokens: np.ndarray
    status: list[str]
    reason: list[str]
    same_as: np.ndarray

    @classmethod
    def blank(cls, first: int, rows: int, directions: int) -> Part:
        """Make a part without a score.

        Args:
            first: Position of its first row.
            rows: How many it has.
            directions: Scores of each row.

        Returns:
            The part.
        """
        return cls(
            row=np.arange(first, first + rows, dtype=np.int64),
            id=[""] * rows,
            fihs=np.full((rows, directions), np.nan, dtype=np.float32),
            grad_norm=np.full(rows, np.nan, dtype=np.float32),
            loss=np.full(rows, np.nan, dtype=np.float32),
            tokens=np.zeros(rows, dtype=np.int32),
            response_tokens=np.zeros(rows, dtype=np.int32),
            status=["not_scored"] * rows,
            reason=[""] * rows,
            same_as=np.full(rows, -1, dtype=np.int64),
        )

    @property
    def scored(self) -> np.ndarray:
        """Bool [rows]: the row has a score."""
        return np.array([status in SCORED for status in self.status], dtype=bool)

    def fail(self, position: int, status: str, reason: str) -> None:
        """Give a row a status that says why it has no score.

        Args:
            position: The row's position in the corpus.
            status: The reason's code.
            reason: The reason.
        """
        i = position - int(self.row[0])
        self.status[i], self.reason[i] = status, reason
        self.fihs[i], self.grad_norm[i] = np.nan, np.nan

    def follow(self, i: int, leader: int) -> None:
        """Give a row the score of another one with the same tokens.

        Args:
            i: the row, counted in the part.
            leader: the other one.
        """
        self.fihs[i], self.grad_norm[i], self.loss[i] = self.fihs[leader], self.grad_norm[leader], self.loss[leader]
        self.same_as[i] = self.row[leader]
        if self.status[leader] not in SCORED:
            self.status[i], self.reason[i] = self.status[leader], self.reason[leader]


def part_path(folder: RunFolder, number: int) -> Path:
    """Name the file of a part.

    Args:
        folder: the run's folder.
        number: the part, from 0.

    Returns:
        Its path.
    """
    return folder.scores / f"part-{number:05d}.parquet"


def part_bytes(part: Part, unit: Unit) -> bytes:
    """Make the file of a part; the same scores make the same bytes.

    Args:
        part: the scores.
        unit: whose they are.

    Returns:
        A Parquet file, with a checksum for each of its pages.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    def numbers(values: np.ndarray) -> pa.Array:
        return pa.array(values, type=pa.float32(), mask=np.isnan(values))

    columns = {"row": pa.array(part.row), "id": pa.array(part.id, type=pa.string())}
    columns |= {fihs_column(k): numbers(part.fihs[:, k]) for k in range(part.fihs.shape[1])}
    columns |= {
        "grad_norm": numbers(part.grad_norm),
        "loss": numbers(part.loss),
        "tokens": pa.array(part.tokens),
        "response_tokens": pa.array(part.response_tokens),
        "status": pa.array(part.status, type=pa.string()),
        "reason": pa.array(part.reason, type=pa.string()),
        "same_as": pa.array(part.same_as, mask=part.same_as < 0),
    }
    buffer = io.BytesIO()
    table = pa.table(columns)
    table = table.replace_schema_metadata({_ROWS: unit.digest, _SCORES: _digest(table)})
    pq.write_table(table, buffer, write_page_checksum=True)
    return buffer.getvalue()


def why_unreadable(path: Path, unit: Unit) -> str | None:
    """Say why a part cannot stand for its unit, reading all of it.

    Args:
        path: from `part_path`; a file must be there.
        unit: whose scores it should hold.

    Returns:
        A few words, or None for a whole part.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, ValueError, pa.ArrowException) as error:
        return " ".join(str(error).split())[:200]
    told = {key: value.decode("ascii", "replace") for key, value in (table.schema.metadata or {}).items()}
    if told.get(_SCORES) != _digest(table):
        return "its content is not what was written"
    rows = np.arange(unit.first, unit.first + unit.rows)
    if told.get(_ROWS) != unit.digest or not np.array_equal(table["row"].to_numpy(), rows):
        return "it holds the scores of other rows"
    return None


def _digest(table: Any) -> str:
    """Hash names, types and values: the checksums of Parquet's pages leave out its footer."""
    digest = hashlib.blake2b(digest_size=16)
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"{name}\0{column.type}\0{column.null_count}\0".encode())
        if column.type == "string":
            digest.update(json.dumps(column.to_pylist()).encode("ascii"))
        else:
            digest.update(np.ascontiguousarray(column.to_numpy()).tobytes())
    return digest.hexdigest()


def read_part(path: Path) -> Part:
    """Read a part.

    Args:
        path: from `part_path`.

    Returns:
        The scores of its rows.

    Raises:
        InputError: it is missing or damaged; running the same command again makes it anew.
    """
    table = _table(path)
    scores = [name for name in table.column_names if name == "fihs" or name.startswith("fihs_")]
    return Part(
        row=table["row"].to_numpy(),
        id=table["id"].to_pylist(),
        fihs=np.stack([_numbers(table, name) for name in scores], axis=1),
        grad_norm=_numbers(table, "grad_norm"),
        loss=_numbers(table, "loss"),
        tokens=table["tokens"].to_numpy(),
        response_tokens=table["response_tokens"].to_numpy(),
        status=table["status"].to_pylist(),
        reason=table["reason"].to_pylist(),
        same_as=table["same_as"].fill_null(-1).to_numpy(),
    )


def read_columns(path: Path, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Read the scores of a part's rows and nothing else of them but who repeats whom.

    Args:
        path: from `part_path`.
        count: how many scores, from the first direction's on.

    Returns:
        float32 [rows, count], NaN where there is none; int64 [rows], as `Part.same_as`.

    Raises:
        InputError: the part is missing or damaged, or has fewer scores.
    """
    names = [fihs_column(k) for k in range(count)]
    table = _table(path, [*names, "same_as"])
    return np.stack([_numbers(table, name) for name in names], axis=1), table["same_as"].fill_null(-1).to_numpy()


def _table(path: Path, columns: list[str] | None = None) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        # one file, not a data set of its folder: no scan is set up, and nothing is read ahead
        with pq.ParquetFile(path) as file:
            table = file.read(columns)
    except FileNotFoundError as error:
        raise InputError(f"{path} is missing; run the same command again, and it is scored anew") from error
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is damaged ({error}); delete it and run the same command again") from error
    if columns and table.column_names != columns:
        missing = next(name for name in columns if name not in table.column_names)
        raise InputError(f"{path} has no column {missing}; name a direction that was scored")
    return table


def _numbers(table: Any, name: str) -> np.ndarray:
    return table[name].to_numpy(zero_copy_only=False).astype(np.float32)
