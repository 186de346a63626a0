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
from pathlib import Path
from typing import IO, Any

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
        path: where it is.
        kind: "jsonl", "parquet" or "arrow".
        compression: "", "gz" or "zst"; only for "jsonl".
    """

    path: Path
    kind: str
    compression: str


def find_files(path: str | Path, format: str | None = None) -> list[CorpusFile]:
    """List the files of a corpus in the order in which their rows are numbered.

    Args:
        path: a file, a folder of files (taken in the order of their names), or a folder that `datasets` saved.
        format: "jsonl", "parquet" or "arrow" for a file whose name does not say; compression still shows in the name.

    Returns:
        At least one file.

    Raises:
        InputError: there is no such file, its type is unknown, or a folder has no corpus file or holds several splits.
    """
    path = Path(path)
    if format is not None and format not in _KINDS.values():
        raise InputError(f"corpus format must be jsonl, parquet or arrow: got {format!r}")
    try:
        if path.is_dir():
            return _folder(path, format)
        if not path.exists():
            raise InputError(f"corpus not found: {path}; check the path (relative paths start at {Path.cwd()})")
        if not path.is_file():
            raise InputError(
                f"corpus {path} is not a regular file; it is read twice, so save the stream to a file first"
            )
    except OSError as error:
        raise InputError(f"corpus {path} cannot be opened: {error.strerror or error}") from error
    file = _classify(path, format)
    if file is None:
        raise InputError(
            f"corpus {path} has an unknown type: expected {_EXPECTED}; got {path.suffix or 'no extension'!r}; "
            "rename it, or name its format"
        )
    return [file]


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
                skip -= yield from iter_columns(file.path, file.kind, max_row_bytes, skip)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"corpus {file.path} cannot be read to its end: {_why(error)}") from error
        except Exception as error:
            # pyarrow's own errors; its module is imported only where a file needs it.
            if not type(error).__module__.startswith("pyarrow"):
                raise
            raise InputError(f"corpus {file.path} is not a readable {file.kind} file: {_why(error)}") from error


def _why(error: BaseException) -> str:
    if isinstance(error, EOFError):
        return "the compressed file ends early; copy it again"
    text = " ".join(str(error).split()) or type(error).__name__
    return text[:300]


def _classify(path: Path, format: str | None) -> CorpusFile | None:
    compression = _COMPRESSIONS.get(path.suffix.lower(), "")
    inner = path.with_suffix("") if compression else path
    kind = format or _KINDS.get(inner.suffix.lower())
    if kind is None or (compression and kind != "jsonl"):
        return None
    return CorpusFile(path, kind, compression)


def _folder(folder: Path, format: str | None) -> list[CorpusFile]:
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(p.name for p in folder.iterdir() if (p / "state.json").is_file())
        raise InputError(
            f"corpus {folder} holds several splits ({', '.join(splits)}); name one, such as {folder}/train"
        )
    if (folder / "state.json").is_file():
        return _saved_dataset(folder)
    files, unknown = [], []
    for path in sorted(folder.iterdir(), key=lambda p: p.name):
        if path.name.startswith((".", "_")) or path.name in _NOT_DATA or not path.is_file():
            continue
        file = _classify(path, format)
        if file is not None:
            files.append(file)
        elif path.suffix.lower() not in {"", ".md", ".txt", ".py", ".yaml", ".yml"}:
            unknown.append(path.name)
    if unknown:
        raise InputError(f"corpus folder {folder} holds {unknown[0]}, which is not {_EXPECTED}; move it elsewhere")
    if not files:
        raise InputError(f"corpus folder {folder} holds no corpus file: expected {_EXPECTED}")
    return files


def _saved_dataset(folder: Path) -> list[CorpusFile]:
    """Read the order of the Arrow files from the `state.json` that `datasets` writes beside them."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
        names = [str(entry["filename"]) for entry in state["_data_files"]]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InputError(f"corpus {folder}: state.json is not one that `datasets` saved ({_why(error)})") from error
    for name in names:
        if Path(name).name != name or not (folder / name).is_file():
            raise InputError(f"corpus {folder}: state.json names {name!r}, which is not in the folder; save it again")
    if not names:
        raise InputError(f"corpus {folder} is empty: its state.json names no data file")
    return [CorpusFile(folder / name, "arrow", "") for name in names]


def _open_lines(file: CorpusFile) -> io.BufferedReader:
    """Open a file of lines; a compressed one that is cut short raises when its end is read."""
    if file.compression == "zst":
        # Not `zstandard`: its reader takes a file that was cut short for a complete one, and rows would be lost.
        import pyarrow as pa

        raw: Any = pa.input_stream(str(file.path), compression="zstd")
    elif file.compression == "gz":
        raw = gzip.GzipFile(file.path, "rb")
    else:
        raw = io.FileIO(file.path, "rb")
    return io.BufferedReader(raw, READ_CHUNK)


def _refuse_array(file: CorpusFile, stream: io.BufferedReader) -> None:
    if stream.peek(64).removeprefix(BOM).lstrip()[:1] == b"[":
        raise InputError(
            f"corpus {file.path} is one JSON array: expected one JSON object per line; "
            f"convert it with: jq -c '.[]' {file.path.name} > {file.path.stem}.jsonl"
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
    name = file.path.name
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
