"""Scores + cut-off -> kept and dropped rows, byte for byte as they came, and a record of the rows without a score.

The corpus is read a second time. Each output is written beside its target under another name, flushed to the disk and
only then renamed: an earlier kept.jsonl goes first and the new one comes last, so where there is one, the other two
belong to it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from gradshield_fast.corpus import MAX_ROW_BYTES, corpus_fingerprint, parse_row
from gradshield_fast.corpus_columns import RawRow
from gradshield_fast.corpus_files import find_files, iter_raw
from gradshield_fast.corpus_formats import check_columns
from gradshield_fast.errors import InputError
from gradshield_fast.files import cannot_write, sync_folder

Decision = str | tuple[str, str, str]
OUTPUTS = {"dropped": "dropped.jsonl", "unscored": "unscored.jsonl", "kept": "kept.jsonl"}

_QUOTED_BYTES = 2**20
_BUFFER = 1 << 20
_PROGRESS_ROWS = 256


def split_corpus(
    corpus_path: str | Path,
    decide: Callable[[int], Decision],
    out_dir: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    rows: int | None = None,
    fingerprint: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Write kept.jsonl, dropped.jsonl and unscored.jsonl: each row in one of them, in the corpus's order.

    A row of a JSONL corpus keeps its bytes, carriage returns and byte order mark included, and gets one newline; lines
    of a compressed file are written uncompressed, rows of Parquet and Arrow as JSON; blank lines are no rows. A row
    in unscored.jsonl is {"row", "id", "file", "status", "reason"} and "raw" (text) or "raw_base64"; over 1 MiB,
    "offset", "length" and "sha256" in place of its bytes.

    Args:
        corpus_path: as for `read_corpus`.
        decide: position of a row -> "kept", "dropped", or ("unscored", status, reason); with an empty status and
            reason, those that `read_corpus` gave the row.
        out_dir: folder of the outputs; made if it is missing.
        format: as for `read_corpus`, and as it was when the rows were scored.
        columns: the same.
        max_row_bytes: the same; a longer row has no score, so it must be decided as "unscored".
        rows: how many rows were scored; another number is an error.
        fingerprint: from `corpus_fingerprint` when the rows were scored; another content is an error.
        progress: called now and then with the number of rows since the last call.

    Returns:
        {"rows", "kept", "dropped", "unscored": counts, "statuses": {status of the unscored rows: count}}.

    Raises:
        InputError: the corpus changed, an output would overwrite it, a decision is not one of the three, or the
            outputs cannot be written. No output is left half-written.
    """
    out_dir = Path(out_dir)
    check_columns(columns)
    files = find_files(corpus_path, format)
    if fingerprint is not None and corpus_fingerprint(corpus_path, format)["sha256"] != fingerprint["sha256"]:
        raise InputError(f"corpus {corpus_path} has changed since its rows were scored; score it again")
    if out_dir.is_dir() and out_dir.samefile(corpus_path):
        raise InputError(f"output folder {out_dir} is the corpus, which would grow by its own rows; choose another one")
    counts, statuses, index = Counter[str](), Counter[str](), -1
    with _outputs(out_dir, [file.path for file in files]) as outputs:
        for index, raw in enumerate(iter_raw(files, max_row_bytes)):
            if index == rows:
                raise InputError(f"corpus {corpus_path} has more than the {rows} rows that were scored; score it again")
            kind, status, reason = _checked(decide(index), index, raw)
            if kind == "unscored":
                status = _write_unscored(outputs[kind], raw, index, status, reason, columns, max_row_bytes)
                statuses[status] += 1
            else:
                assert raw.raw is not None
                outputs[kind].write(raw.raw)
            counts[kind] += 1
            if progress is not None and (index + 1) % _PROGRESS_ROWS == 0:
                progress(_PROGRESS_ROWS)
        if progress is not None and (index + 1) % _PROGRESS_ROWS:
            progress((index + 1) % _PROGRESS_ROWS)
        if index < 0:
            raise InputError(f"corpus {corpus_path} is empty: expected at least one row")
        if rows is not None and index + 1 < rows:
            raise InputError(f"corpus {corpus_path} has {index + 1} rows, but {rows} were scored; score it again")
    return {"rows": index + 1, **{kind: counts[kind] for kind in OUTPUTS}, "statuses": dict(statuses)}


def _checked(decision: Decision, index: int, raw: RawRow) -> tuple[str, str, str]:
    if decision in ("kept", "dropped"):
        if raw.raw is None:
            raise InputError(
                f"row {index} of {raw.file} has {raw.size} bytes, too many to have been scored, but was decided as "
                f"{decision!r}; expected 'unscored', or a larger max_row_bytes"
            )
        return str(decision), "", ""
    if isinstance(decision, tuple) and list(map(type, decision)) == [str] * 3 and decision[0] == "unscored":
        return decision
    raise InputError(
        f"row {index}: decide must give 'kept', 'dropped' or ('unscored', status, reason); got {decision!r}"
    )


def _write_unscored(
    output: _Output,
    raw: RawRow,
    index: int,
    status: str,
    reason: str,
    columns: Mapping[str, str] | None,
    max_row_bytes: int,
) -> str:
    row = parse_row(raw, index, columns, max_row_bytes)
    status = status or (row.status if row.status != "ok" else "not_scored")
    record: dict[str, Any] = {
        "row": index,
        "id": row.id,
        "file": raw.file,
        "status": status,
        "reason": reason or row.reason,
    }
    if raw.raw is None or raw.size > _QUOTED_BYTES:
        record |= {"offset": raw.offset, "length": raw.size}
        record["sha256"] = raw.sha256 or hashlib.sha256(raw.raw or b"").hexdigest()
    else:
        try:
            record["raw"] = raw.raw.decode("utf-8")
        except UnicodeDecodeError:
            record["raw_base64"] = base64.b64encode(raw.raw).decode("ascii")
    # ASCII: a reason may quote a model's or a template's words, and a file's name need not be Unicode.
    output.write(json.dumps(record).encode("ascii"))
    return status


class _Output:
    """A file that appears under its name only when it is complete."""

    def __init__(self, target: Path) -> None:
        self.target = target
        self._temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        self._stream: IO[bytes] | None = None

    def open(self) -> None:
        self._stream = open(self._temporary, "wb", buffering=_BUFFER)  # noqa: SIM115 (closed by complete or discard)

    def write(self, line: bytes) -> None:
        assert self._stream is not None
        try:
            self._stream.write(line)
            self._stream.write(b"\n")
        except OSError as error:
            raise cannot_write(self.target, error) from error

    def complete(self) -> None:
        assert self._stream is not None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()

    def retract(self) -> None:
        self.target.unlink(missing_ok=True)

    def publish(self) -> None:
        os.replace(self._temporary, self.target)

    def discard(self) -> None:
        """Remove what was not published; a full disk makes even closing fail."""
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.close()
            with contextlib.suppress(OSError):
                self._temporary.unlink()


@contextlib.contextmanager
def _outputs(out_dir: Path, inputs: list[Path]) -> Iterator[dict[str, _Output]]:
    """Publish the three outputs if the block succeeds; else leave no trace of them."""
    outputs = {kind: _Output(out_dir / name) for kind, name in OUTPUTS.items()}
    try:
        taken = [o.target for o in outputs.values() if o.target.exists() and any(map(o.target.samefile, inputs))]
    except OSError as error:
        raise cannot_write(out_dir, error) from error
    if taken:
        raise InputError(f"output {taken[0]} would overwrite the corpus; choose another output folder")
    try:
        _each(outputs, out_dir, "open")
        yield outputs
        _each(outputs, out_dir, "complete")
        _each({"kept": outputs["kept"]}, out_dir, "retract")
        _each(outputs, out_dir, "publish")
        sync_folder(out_dir)
    finally:
        for output in outputs.values():
            output.discard()


def _each(
    outputs: Mapping[str, _Output], out_dir: Path, step: Literal["open", "complete", "retract", "publish"]
) -> None:
    current = out_dir
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for output in outputs.values():
            current = output.target
            getattr(output, step)()
    except OSError as error:
        raise cannot_write(current, error) from error
