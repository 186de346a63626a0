"""Rows of Parquet and Arrow files, as dicts and as the JSON line that stands for them."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Generator, Iterator, Sequence
from typing import Any, NamedTuple, cast

from gradshield_fast import storage
from gradshield_fast.errors import InputError

_BATCH_BYTES = 64 << 20
_BATCH_ROWS = 1024


class RawRow(NamedTuple):
    """One row before it is parsed.

    Attributes:
        file: name of its file.
        offset: where its line starts in the uncompressed file, in bytes; -1 for Parquet and Arrow.
        length: bytes of its line without the newline; -1 for Parquet and Arrow.
        raw: the line without its newline, or the row as JSON; None where that exceeds the limit.
        size: bytes that `raw` has or would have.
        sha256: hex digest of the bytes that are not in `raw`; "" otherwise.
        value: the row as a dict where the file holds typed columns; None for a line of text.
    """

    file: str
    offset: int
    length: int
    raw: bytes | None
    size: int
    sha256: str
    value: dict[str, Any] | None


class Columns(NamedTuple):
    """A Parquet or Arrow file that is open for reading.

    Attributes:
        schema: its Arrow schema, metadata included.
        compression: codec of a Parquet file's columns; "" for Arrow.
        passed: rows at its beginning that `batches` leaves out.
        batches: the rest of it, in small batches; the file is closed at their end.
    """

    schema: Any
    compression: str
    passed: int
    batches: Iterator[Any]


def open_columns(path: str, kind: str, skip: int = 0) -> Columns:
    """Open a Parquet or Arrow file.

    Args:
        path: the file.
        kind: "parquet" or "arrow".
        skip: rows that are not needed; whole row groups of them are not read.

    Returns:
        Its schema and batches; the same file gives the same batches.

    Raises:
        InputError: two columns have one name.
    """
    return _open_parquet(path, skip) if kind == "parquet" else _open_arrow(path)


def iter_columns(path: str, name: str, kind: str, max_row_bytes: int, skip: int) -> Generator[RawRow, None, int]:
    """Yield the rows of one Parquet or Arrow file.

    Args:
        path: the file.
        name: its name in the corpus.
        kind: "parquet" or "arrow".
        max_row_bytes: a row whose JSON is longer is yielded without its bytes.
        skip: rows to pass over; whole row groups of them are never read, whole batches never converted.

    Yields:
        The rows after the first `skip`.

    Returns:
        How many rows were passed over: `skip`, or fewer where the file ends first.
    """
    columns = open_columns(path, kind, skip)
    passed = columns.passed
    for batch in columns.batches:
        here = min(skip - passed, batch.num_rows)
        passed += here
        yield from _batch_rows(batch.slice(here), name, max_row_bytes)
    return passed


def _open_parquet(path: str, skip: int) -> Columns:
    import pyarrow.parquet as pq

    file = pq.ParquetFile(storage.open_binary(path) if storage.is_url(path) else path)
    _distinct(path, file.schema_arrow.names)
    groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
    widest = max((g.total_byte_size / max(g.num_rows, 1) for g in groups), default=1.0)
    codec = groups[0].column(0).compression.lower() if groups and groups[0].num_columns else "snappy"
    passed = first = 0
    while first < len(groups) and passed + groups[first].num_rows <= skip:
        passed += groups[first].num_rows
        first += 1

    def batches() -> Iterator[Any]:
        with file:
            # without groups to read, pyarrow would read them all
            if first < len(groups):
                rest = list(range(first, len(groups)))
                yield from file.iter_batches(batch_size=_batch_size(widest), row_groups=rest)

    return Columns(file.schema_arrow, "none" if codec == "uncompressed" else codec, passed, batches())


def _open_arrow(path: str) -> Columns:
    """Open Arrow's stream format, which `datasets` writes, or its file format."""
    import pyarrow as pa

    source = pa.PythonFile(storage.open_binary(path), mode="r") if storage.is_url(path) else pa.memory_map(path)
    try:
        reader: Any = pa.ipc.open_stream(source)
        whole: Any = reader
    except pa.ArrowInvalid:
        source.seek(0)
        reader = pa.ipc.open_file(source)
        whole = (reader.get_batch(i) for i in range(reader.num_record_batches))
    _distinct(path, reader.schema.names)

    def batches() -> Iterator[Any]:
        with source:
            for batch in whole:
                step = _batch_size(batch.nbytes / max(batch.num_rows, 1))
                for first in range(0, batch.num_rows, step):
                    yield batch.slice(first, step)

    return Columns(reader.schema, "", 0, batches())


def _batch_size(bytes_per_row: float) -> int:
    return int(min(_BATCH_ROWS, max(1, _BATCH_BYTES // max(1.0, bytes_per_row))))


def _distinct(path: str, names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"corpus {path} has two columns named {name!r}: expected distinct names; rename one")


def _batch_rows(batch: Any, name: str, limit: int) -> Iterator[RawRow]:
    try:
        values = batch.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):
        values = [None] * batch.num_rows
    for i, value in enumerate(values):
        known = value is not None
        if value is None:
            value = {column: _lossless(batch.column(c)[i]) for c, column in enumerate(batch.schema.names)}
        raw = _json_bytes(value)
        size = len(raw)
        if size > limit:
            yield RawRow(name, -1, -1, None, size, hashlib.sha256(raw).hexdigest(), None)
        else:
            yield RawRow(name, -1, -1, raw, size, "", value if known else None)


def _lossless(scalar: Any) -> Any:
    """A cell as Python data; text that is not UTF-8 keeps its bytes as lone surrogates, which JSON can carry."""
    try:
        return scalar.as_py()
    except (UnicodeDecodeError, ValueError, OverflowError):
        pass
    if hasattr(scalar, "keys"):
        return {key: _lossless(scalar[key]) for key in scalar.keys()}  # noqa: SIM118 (a scalar is not a dict)
    if hasattr(scalar, "values") and scalar.values is not None:
        return [_lossless(item) for item in scalar.values]
    if hasattr(scalar, "as_buffer"):
        return scalar.as_buffer().to_pybytes().decode("utf-8", "surrogateescape")
    return str(scalar)


def _json_bytes(value: dict[str, Any]) -> bytes:
    """Encode a row: columns in the file's order, no spaces, UTF-8, and null for NaN and infinities."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False, default=_jsonable)
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), default=_jsonable)
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(_finite(value), separators=(",", ":"), default=_jsonable).encode("ascii")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _jsonable(value: object) -> str:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return base64.b64encode(value).decode("ascii")
    isoformat = getattr(value, "isoformat", None)
    return cast(str, isoformat()) if callable(isoformat) else str(value)
