"""Files of rows that appear under their names only when they are complete, by a rename."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import IO, Any, Protocol

from gradshield_fast.corpus_columns import RawRow, open_columns
from gradshield_fast.corpus_files import CorpusFile, dataset_files, is_one_file
from gradshield_fast.errors import InputError
from gradshield_fast.files import cannot_write, remove, sync_folder, write_whole

_BUFFER = 1 << 20
_GROUP_ROWS = 1 << 16
_GROUP_BYTES = 64 << 20


class Output:
    """A file or a folder that is made under another name.

    Attributes:
        target: where it appears.
        temporary: where it is made, in the same folder.
    """

    def __init__(self, target: Path) -> None:
        """Name it.

        Args:
            target: where it is to appear.
        """
        self.target = target
        self.temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")

    def open(self) -> None:
        """Begin; what an earlier process left half-made is removed."""
        remove(self.temporary)

    def complete(self) -> None:
        """Bring everything to the disk."""

    def retract(self) -> None:
        """Remove what an earlier run put there, at once even where it is a folder."""
        if self.target.is_dir():
            aside = self.temporary.with_suffix(".old.tmp")
            remove(aside)
            os.replace(self.target, aside)
            remove(aside)
        else:
            self.target.unlink(missing_ok=True)

    def publish(self) -> None:
        """Let it appear."""
        os.replace(self.temporary, self.target)

    def discard(self) -> None:
        """Remove what was not published."""
        with contextlib.suppress(OSError):
            remove(self.temporary)


class LineOutput(Output):
    """One file of lines."""

    def __init__(self, target: Path) -> None:
        """Name it.

        Args:
            target: where it is to appear.
        """
        super().__init__(target)
        self._lines: _Lines | None = None

    def open(self) -> None:
        """Begin."""
        super().open()
        self._lines = _Lines(self.temporary, "")

    def write(self, line: bytes) -> None:
        """Write a line.

        Args:
            line: without its newline.

        Raises:
            InputError: the disk is full, or the like.
        """
        assert self._lines is not None
        try:
            self._lines.write(line)
        except OSError as error:
            raise cannot_write(self.target, error) from error

    def complete(self) -> None:
        """Bring everything to the disk."""
        assert self._lines is not None
        self._lines.close()

    def discard(self) -> None:
        """Remove what was not published; a full disk makes even closing fail."""
        if self._lines is not None:
            self._lines.abandon()
        super().discard()


class KeptOutput(Output):
    """The rows that are kept, as the corpus has them: a file for each of its files, in its format and compression.

    A corpus of one named file gives kept.jsonl (lines, uncompressed), kept.parquet or kept.arrow; a folder or a pattern
    gives a folder, kept, with the files' own names, which `datasets` can load if it saved the corpus.
    """

    def __init__(self, out_dir: Path, corpus: str | Path, files: list[CorpusFile]) -> None:
        """Name it.

        Args:
            out_dir: the folder in which it appears.
            corpus: the corpus.
            files: its files.
        """
        self._one_file = is_one_file(corpus)
        super().__init__(out_dir / (f"kept.{files[0].kind}" if self._one_file else "kept"))
        self._beside = {} if self._one_file else dataset_files(corpus)
        self._choice = hashlib.blake2b(digest_size=8)
        self._shard: _Shard | None = None

    def begin(self, file: CorpusFile) -> None:
        """Go on to the next file of the corpus.

        Args:
            file: the file.

        Raises:
            InputError: its counterpart cannot be written.
        """
        path = self.temporary if self._one_file else self.temporary / file.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if file.kind == "jsonl":
                self._shard = _Lines(path, "" if self._one_file else file.compression)
            else:
                self._shard = _Batches(path, file)
        except OSError as error:
            raise cannot_write(self.target, error) from error

    def add(self, raw: RawRow, keep: bool) -> None:
        """Take in the next row of the file.

        Args:
            raw: the row.
            keep: whether it is kept.

        Raises:
            InputError: the disk is full, or the like.
        """
        assert self._shard is not None
        if self._beside:
            self._choice.update(b"1" if keep else b"0")
        try:
            self._shard.add(raw, keep)
        except OSError as error:
            raise cannot_write(self.target, error) from error

    def end(self) -> None:
        """Bring the file to the disk.

        Raises:
            InputError: the disk is full, or the like.
        """
        assert self._shard is not None
        try:
            self._shard.close()
        except OSError as error:
            raise cannot_write(self.target, error) from error

    def complete(self) -> None:
        """Write what belongs to the folder as a whole."""
        for name, value in self._beside.items():
            if name == "state.json":
                # `datasets` keeps what it computes under a fingerprint, and other rows must have another one
                value = {**value, "_fingerprint": self._choice.hexdigest()}
            write_whole(self.temporary / name, json.dumps(value).encode("ascii"))
        if not self._one_file:
            sync_folder(self.temporary)

    def discard(self) -> None:
        """Remove what was not published."""
        if self._shard is not None:
            self._shard.abandon()
        super().discard()


class _Shard(Protocol):
    def add(self, raw: RawRow, keep: bool) -> None: ...
    def close(self) -> None: ...
    def abandon(self) -> None: ...


class _Lines:
    """Lines, byte for byte; compressed so that the same lines give the same bytes."""

    def __init__(self, path: Path, compression: str) -> None:
        self._under = path.open("wb", buffering=_BUFFER)
        self._over: Any = self._under
        if compression == "gz":
            self._over = gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=self._under, mtime=0)
        elif compression == "zst":
            import pyarrow as pa

            self._over = pa.CompressedOutputStream(pa.PythonFile(_Kept(self._under), mode="w"), "zstd")

    def write(self, line: bytes) -> None:
        self._over.write(line)
        self._over.write(b"\n")

    def add(self, raw: RawRow, keep: bool) -> None:
        if keep:
            assert raw.raw is not None
            self.write(raw.raw)

    def close(self) -> None:
        if self._over is not self._under:
            self._over.close()
        _to_disk(self._under)

    def abandon(self) -> None:
        for stream in (self._over, self._under):
            with contextlib.suppress(OSError, ValueError):
                stream.close()


class _Kept:
    """A stream that pyarrow does not close with its own."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.closed = False

    def write(self, data: Any) -> int:
        return self._stream.write(data)

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self.closed = True


class _Batches:
    """Rows of Parquet or Arrow with their types: the file is read once more, beside the decisions on its rows."""

    def __init__(self, path: Path, file: CorpusFile) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self._path = file.path
        self._source = open_columns(file.path, file.kind)
        self._under = path.open("wb", buffering=_BUFFER)
        if file.kind == "parquet":
            self._writer: Any = pq.ParquetWriter(
                _Kept(self._under), self._source.schema, compression=self._source.compression
            )
        else:
            self._writer = pa.ipc.new_stream(_Kept(self._under), self._source.schema)
        self._batch = next(self._source.batches, None)
        self._mask: list[bool] = []
        self._group: list[Any] = []

    def add(self, raw: RawRow, keep: bool) -> None:
        import pyarrow as pa

        self._mask.append(keep)
        while self._batch is not None and len(self._mask) >= self._batch.num_rows:
            rows = self._batch.num_rows
            mask, self._mask = self._mask[:rows], self._mask[rows:]
            if any(mask):
                self._group.append(self._batch.filter(pa.array(mask, type=pa.bool_())))
            self._batch = next(self._source.batches, None)
            if (
                sum(b.num_rows for b in self._group) >= _GROUP_ROWS
                or sum(b.nbytes for b in self._group) >= _GROUP_BYTES
            ):
                self._write()

    def close(self) -> None:
        if self._mask or self._batch is not None:
            raise InputError(f"corpus {self._path} has changed while its rows were written; score it again")
        if self._group:
            self._write()
        self._writer.close()
        _to_disk(self._under)

    def abandon(self) -> None:
        self._source.batches.close()  # type: ignore[attr-defined]  # a generator, which holds the file open
        with contextlib.suppress(OSError, ValueError):
            self._under.close()

    def _write(self) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_batches(self._group, self._source.schema))
        self._group = []


def _to_disk(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())
    stream.close()
