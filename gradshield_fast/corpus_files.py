"""Which files a corpus has, and the bytes of each of its rows, read once from front to back.

Everything that counts rows goes through `iter_raw`, so scoring and filtering cannot disagree about which row is
number 17: a line that holds only white space is not a row anywhere, and a line that is too long is a row everywhere.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from gradshield_fast import storage
from gradshield_fast.corpus_columns import RawRow, iter_columns
from gradshield_fast.errors import InputError

BOM = b"\xef\xbb\xbf"
READ_CHUNK = 1 << 20

_COMPRESSIONS = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}
_KINDS = {
    ".jsonl": "jsonl",
    ".jsonlines": "jsonl",
    ".json-lines": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_EXPECTED = ".jsonl, .json with one object per line, either with .gz or .zst, .parquet, .arrow, or a folder of these"
_NOT_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"})


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """One file of a corpus.

    Attributes:
        path: where it is, on this machine or as a URL.
        name: its name in the corpus, relative to the folder that the corpus is or whose files a pattern names.
        kind: "jsonl", "parquet" or "arrow".
        compression: "", "gz" or "zst"; only for "jsonl".
    """

    path: str
    name: str
    kind: str
    compression: str


def find_files(path: str | Path, format: str | None = None) -> list[CorpusFile]:
    """List the files of a corpus in the order in which their rows are numbered.

    Args:
        path: a file, a folder of files (taken in the order of their names), a pattern such as `data/*/part-*.jsonl.gz`
            (the same), or a folder that `datasets` saved; on this machine, or as a URL that fsspec knows.
        format: "jsonl", "parquet" or "arrow" for a file whose name does not say; compression still shows in the name.

    Returns:
        At least one file.

    Raises:
        InputError: there is no such file, its type is unknown, or a folder has no corpus file or holds several splits.
    """
    text = storage.plain_path(path)
    if format is not None and format not in _KINDS.values():
        raise InputError(f"corpus format must be jsonl, parquet or arrow: got {format!r}")
    try:
        kind = storage.kind_of(text)
        if kind == "folder":
            return _folder(text, format)
        if not kind and storage.has_magic(text):
            return _pattern(text, format)
        if not kind:
            here = "" if storage.is_url(text) else f" (relative paths start at {Path.cwd()})"
            raise InputError(f"corpus not found: {text}; check the path{here}")
    except OSError as error:
        raise InputError(f"corpus {text} cannot be opened: {error.strerror or error}") from error
    if kind != "file":
        raise InputError(f"corpus {text} is not a regular file; it is read twice, so save the stream to a file first")
    file = _classify(text, storage.file_name(text), format)
    if file is None:
        raise InputError(
            f"corpus {text} has an unknown type: expected {_EXPECTED}; got "
            f"{PurePosixPath(text).suffix or 'no extension'!r}; rename it, or name its format"
        )
    return [file]


def is_one_file(path: str | Path) -> bool:
    """Say whether a corpus is a file that was named, and no folder or pattern.

    Args:
        path: as for `find_files`.

    Returns:
        Whether it is.
    """
    return storage.kind_of(storage.plain_path(path)) == "file"


def dataset_files(path: str | Path) -> dict[str, dict[str, Any]]:
    """Read what `datasets` writes beside the rows of a folder that it saves, as far as it holds for some of the rows.

    Args:
        path: as for `find_files`.

    Returns:
        Name -> content, without counts and sizes; nothing for any other corpus.

    Raises:
        InputError: a file of it is damaged.
    """
    folder, out = storage.plain_path(path), {}
    there = storage.names_in(folder) if storage.kind_of(folder) == "folder" else []
    if "state.json" not in there:
        return {}
    for name in ("state.json", "dataset_info.json"):
        if name in there:
            value = _read_json(folder, name)
            counted = ("splits", "dataset_size", "download_size", "size_in_bytes", "download_checksums")
            out[name] = {key: item for key, item in value.items() if key not in counted}
    return out


def iter_raw(files: Sequence[CorpusFile], max_row_bytes: int, skip: int = 0, at: int = 0) -> Iterator[RawRow]:
    """Yield every row of the files, in order, holding at most one row (or one small batch) in memory.

    Args:
        files: from `find_files`.
        max_row_bytes: a longer row is yielded without its bytes; its line is read in chunks and hashed.
        skip: rows to pass over, counted over all files.
        at: where in the first file to begin, in uncompressed bytes: the start of a line; not for Parquet and Arrow,
            whose files are positioned by `skip`.

    Yields:
        The rows after the first `skip`.

    Raises:
        InputError: a file cannot be read, or is damaged or cut short.
    """
    if max_row_bytes < 1:
        raise InputError(f"max_row_bytes must be at least 1: got {max_row_bytes}")
    for file in files:
        try:
            if file.kind == "jsonl":
                skip -= yield from _iter_lines(file, max_row_bytes, skip, at)
                at = 0
            else:
                skip -= yield from iter_columns(file.path, file.name, file.kind, max_row_bytes, skip)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"corpus {file.path} cannot be read to its end: {_why(error)}") from error
        except Exception as error:
            # pyarrow's own errors; its module is imported only where a file needs it.
            if storage.is_url(file.path) and not isinstance(error, InputError):
                raise InputError(f"corpus {file.path} cannot be read to its end: {_why(error)}") from error
            if not type(error).__module__.startswith("pyarrow"):
                raise
            raise InputError(f"corpus {file.path} is not a readable {file.kind} file: {_why(error)}") from error


def _why(error: BaseException) -> str:
    if isinstance(error, EOFError):
        return "the compressed file ends early; copy it again"
    return storage.one_line(error)


def _classify(path: str, name: str, format: str | None) -> CorpusFile | None:
    pure = PurePosixPath(name)
    compression = _COMPRESSIONS.get(pure.suffix.lower(), "")
    inner = pure.with_suffix("") if compression else pure
    kind = format or _KINDS.get(inner.suffix.lower())
    if kind is None or (compression and kind != "jsonl"):
        return None
    return CorpusFile(path, name, kind, compression)


def _folder(folder: str, format: str | None) -> list[CorpusFile]:
    names = storage.names_in(folder)
    if "dataset_dict.json" in names:
        splits = _splits(folder)
        raise InputError(
            f"corpus {folder} holds several splits ({', '.join(splits)}); name one, such as {folder}/{splits[0]}"
        )
    if "state.json" in names:
        return _saved_dataset(folder, names)
    files = _named(
        folder, [name for name in names if not name.startswith((".", "_")) and name not in _NOT_DATA], format
    )
    if not files:
        raise InputError(f"corpus folder {folder} holds no corpus file: expected {_EXPECTED}")
    return files


def _pattern(pattern: str, format: str | None) -> list[CorpusFile]:
    root, names = storage.matches(pattern)
    files = _named(root, names, format)
    if not files:
        raise InputError(f"corpus not found: no file matches {pattern}; check the pattern, and quote it for the shell")
    return files


def _named(folder: str, names: Sequence[str], format: str | None) -> list[CorpusFile]:
    files = []
    for name in names:
        file = _classify(storage.join(folder, name), name, format)
        if file is not None:
            files.append(file)
        elif PurePosixPath(name).suffix.lower() not in {"", ".md", ".txt", ".py", ".yaml", ".yml"}:
            raise InputError(f"corpus folder {folder} holds {name}, which is not {_EXPECTED}; move it elsewhere")
    return files


def _read_json(folder: str, name: str) -> dict[str, Any]:
    try:
        with storage.open_binary(storage.join(folder, name)) as stream:
            value = json.loads(stream.read())
    except (ValueError, RecursionError) as error:
        raise InputError(f"corpus {folder}: {name} is not one that `datasets` saved ({_why(error)})") from error
    if not isinstance(value, dict):
        raise InputError(f"corpus {folder}: {name} is not one that `datasets` saved (expected an object)")
    return value


def _splits(folder: str) -> list[str]:
    splits = _read_json(folder, "dataset_dict.json").get("splits")
    return [str(name) for name in splits] if isinstance(splits, list) and splits else ["train"]


def _saved_dataset(folder: str, there: Sequence[str]) -> list[CorpusFile]:
    """Read the order of the Arrow files from the `state.json` that `datasets` writes beside them."""
    try:
        names = [str(entry["filename"]) for entry in _read_json(folder, "state.json")["_data_files"]]
    except (TypeError, KeyError) as error:
        raise InputError(f"corpus {folder}: state.json is not one that `datasets` saved ({_why(error)})") from error
    for name in names:
        if name not in there:
            raise InputError(f"corpus {folder}: state.json names {name!r}, which is not in the folder; save it again")
    if not names:
        raise InputError(f"corpus {folder} is empty: its state.json names no data file")
    return [CorpusFile(storage.join(folder, name), name, "arrow", "") for name in names]


def _open_lines(file: CorpusFile) -> io.BufferedReader:
    """Open a file of lines; a compressed one that is cut short raises when its end is read."""
    if file.compression == "zst":
        # Not `zstandard`: its reader takes a file that was cut short for a complete one, and rows would be lost.
        import pyarrow as pa

        source = pa.PythonFile(storage.open_binary(file.path), mode="r") if storage.is_url(file.path) else file.path
        raw: Any = pa.input_stream(source, compression="zstd")
    else:
        raw = storage.open_binary(file.path)
        if file.compression == "gz":
            raw = _Gunzip(raw)
    return io.BufferedReader(raw, READ_CHUNK)


class _Gunzip(gzip.GzipFile):
    """Closes the file under it as well."""

    def __init__(self, under: IO[bytes]) -> None:
        super().__init__(fileobj=under, mode="rb")
        self._under = under

    def close(self) -> None:
        super().close()
        self._under.close()


def _refuse_array(file: CorpusFile, stream: io.BufferedReader) -> None:
    if stream.peek(64).removeprefix(BOM).lstrip()[:1] == b"[":
        raise InputError(
            f"corpus {file.path} is one JSON array: expected one JSON object per line; "
            f"convert it with: jq -c '.[]' {file.name} > {PurePosixPath(file.name).stem}.jsonl"
        )


def _position(file: CorpusFile, stream: io.BufferedReader, at: int) -> None:
    """Go to a byte; a compressed stream is read up to it."""
    if not file.compression:
        stream.seek(at)
        return
    while at and (chunk := stream.read(min(at, READ_CHUNK))):
        at -= len(chunk)


def _iter_lines(file: CorpusFile, limit: int, skip: int, at: int = 0) -> Generator[RawRow, None, int]:
    """Yield the lines of one file from byte `at` after the first `skip` rows, and return how many were passed over."""
    name = file.name
    offset, passed = at, 0
    with _open_lines(file) as stream:
        if name.lower().endswith((".json", ".json.gz", ".json.zst", ".json.zstd")):
            _refuse_array(file, stream)
        if at:
            _position(file, stream, at)
        readline = stream.readline
        while line := readline(limit + 1):
            start = offset
            offset += len(line)
            if line.endswith(b"\n"):
                line = line[:-1]
            elif len(line) > limit:
                row, blank, newline = _long_line(stream, name, line, start)
                offset = start + row.length + newline
                if blank:
                    continue
                if passed < skip:
                    passed += 1
                else:
                    yield row
                continue
            if not line or line.isspace() or (start == 0 and not line.removeprefix(BOM).strip()):
                continue
            if passed < skip:
                passed += 1
            else:
                yield RawRow(name, start, len(line), line, len(line), "", None)
    return passed


def _long_line(stream: IO[bytes], name: str, head: bytes, start: int) -> tuple[RawRow, bool, int]:
    """Read on to the newline without keeping the bytes; say whether all is white space, and the newline's length."""
    digest, length, blank, newline = hashlib.sha256(head), len(head), head.isspace(), 0
    while not newline and (chunk := stream.readline(READ_CHUNK)):
        if chunk.endswith(b"\n"):
            chunk, newline = chunk[:-1], 1
        digest.update(chunk)
        length += len(chunk)
        blank = blank and (not chunk or chunk.isspace())
    return RawRow(name, start, length, None, length, digest.hexdigest(), None), blank, newline
