"""Read a fine-tuning corpus row by row: every row keeps its position and its bytes, and none is lost.

A row that cannot be used is still a row: it comes with a status that is not "ok" and a sentence that says why. Only
what makes the whole corpus unreadable (no such file, unknown type, damaged archive, no rows at all) is an error.

    status        the row
    ok            has `messages`
    bad_utf8      is not Unicode text, or a string in it is not
    bad_json      is not one JSON value (NaN, a key that comes twice and nesting beyond the parser count as such)
    bad_row       is JSON, but not an object of a known format
    unknown_role  has a turn by nobody we know
    no_response   has no assistant turn with text
    too_large     is longer than `max_row_bytes`; its bytes were not kept
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gradshield_fast import storage
from gradshield_fast.corpus_columns import RawRow
from gradshield_fast.corpus_files import BOM, READ_CHUNK, CorpusFile, find_files, iter_raw
from gradshield_fast.corpus_formats import RowProblem, check_columns, show, to_messages
from gradshield_fast.errors import InputError

MAX_ROW_BYTES = 16 * 2**20
_MAX_ID = 256


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a corpus.

    Attributes:
        index: position over the whole corpus, from 0.
        raw: bytes of the line without its newline, or the row as JSON for Parquet and Arrow; empty if too large.
        id: the row's own "id" if it is text or an integer, else its position.
        messages: the turns, each {"role", "content"}; None if the status is not "ok".
        status: "ok", or why the row cannot be used (see the module).
        reason: "" or one sentence for a person.
        offset: where the line starts in its uncompressed file, in bytes; -1 for Parquet and Arrow.
        length: bytes of the line without its newline; -1 for Parquet and Arrow.
        file: name of the file it comes from, relative to the corpus's folder.
    """

    index: int
    raw: bytes
    id: str
    messages: list[dict[str, str]] | None
    status: str
    reason: str
    offset: int
    length: int
    file: str = ""


def read_corpus(
    path: str | Path,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    max_row_bytes: int = MAX_ROW_BYTES,
    start: int = 0,
) -> Iterator[Row]:
    """Read the rows of a corpus in file order, one at a time.

    Args:
        path: .jsonl (also .gz, .zst), .parquet, a folder or a pattern of such files in the order of their names, or a
            folder that `datasets` saved; on this machine, or as a URL that fsspec knows (s3://, gs://, ...).
        format: "jsonl", "parquet" or "arrow" where the file's name does not say.
        columns: names of the columns to read, as {"prompt": "question", "response": "answer"}; the entries are
            messages, or prompt and response; and input, system, id. None detects the format of each row.
        max_row_bytes: a longer row gets the status "too_large" and is never held in memory whole.
        start: first position to yield; the rows before it are passed over without being parsed.

    Returns:
        An iterator over the rows; it raises InputError where a file is damaged.

    Raises:
        InputError: the corpus cannot be found or read, has an unknown type, or has no rows.
    """
    check_columns(columns)
    files = find_files(path, format)
    if start < 0:
        raise InputError(f"start must be a row position from 0: got {start}")
    if next(iter_raw(files, max_row_bytes), None) is None:
        raise InputError(f"corpus {path} is empty: expected at least one row; got only blank lines or nothing")
    return _rows(files, columns, max_row_bytes, start)


def corpus_fingerprint(path: str | Path, format: str | None = None) -> dict[str, Any]:
    """Hash the content of a corpus as it lies on disk.

    Args:
        path: as for `read_corpus`.
        format: as for `read_corpus`.

    Returns:
        {"files": [{"name", "size", "sha256"}, ...], "sha256": digest over all files}, in reading order.

    Raises:
        InputError: the corpus cannot be found or read.
    """
    whole, entries = hashlib.sha256(), []
    for file in find_files(path, format):
        digest, size = hashlib.sha256(), 0
        try:
            with storage.open_binary(file.path) as stream:
                while chunk := stream.read(READ_CHUNK):
                    digest.update(chunk)
                    size += len(chunk)
        except OSError as error:
            raise InputError(f"corpus {file.path} cannot be read: {error.strerror or error}") from error
        entries.append({"name": file.name, "size": size, "sha256": digest.hexdigest()})
        whole.update(f"{file.name}\0{size}\0{digest.hexdigest()}\n".encode("utf-8", "surrogateescape"))
    return {"files": entries, "sha256": whole.hexdigest()}


def parse_row(raw: RawRow, index: int, columns: Mapping[str, str] | None = None, limit: int = MAX_ROW_BYTES) -> Row:
    """Parse the bytes of one row; whatever is wrong with them ends up in the status.

    Args:
        raw: from `corpus_files.iter_raw`.
        index: the row's position.
        columns: as for `read_corpus`, already checked.
        limit: the `max_row_bytes` that `raw` was read with, for the message.

    Returns:
        The row.
    """
    row_id, messages = str(index), None
    try:
        if raw.raw is None:
            reason = f"the row has {raw.size} bytes and the limit is {limit}; raise max_row_bytes to score it"
            raise RowProblem("too_large", reason)
        value = raw.value if raw.value is not None else _parse(raw.raw, first=raw.offset == 0)
        if not isinstance(value, dict):
            raise RowProblem("bad_row", f"expected a JSON object; got {show(value)}")
        row_id = _row_id(value, columns, index)
        messages = to_messages(value, columns)
        if b"\\u" in raw.raw:
            _refuse_surrogates(messages)
        status, reason = "ok", ""
    except RowProblem as problem:
        messages, status, reason = None, problem.status, problem.reason
    return Row(index, raw.raw or b"", row_id, messages, status, reason, raw.offset, raw.length, raw.file)


def _rows(files: list[CorpusFile], columns: Mapping[str, str] | None, max_row_bytes: int, start: int) -> Iterator[Row]:
    for index, raw in enumerate(iter_raw(files, max_row_bytes, skip=start), start):
        yield parse_row(raw, index, columns, max_row_bytes)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Refuse a key that comes twice: readers differ in which value they take, so a row could be two rows at once."""
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise RowProblem("bad_json", f"the key {show(twice)} comes twice in one object")
    return value


def _refuse_constant(name: str) -> Any:
    raise RowProblem("bad_json", f"{name} is not JSON; write null, or leave the key out")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)


def _parse(raw: bytes, first: bool) -> Any:
    try:
        text = (raw.removeprefix(BOM) if first else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        reason = f"not UTF-8: byte 0x{error.object[error.start]:02x} at {error.start} of the line ({error.reason})"
        raise RowProblem("bad_utf8", reason) from None
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowProblem("bad_json", f"not JSON: {error.msg} at character {error.pos} of the line") from None
    except RecursionError:
        raise RowProblem("bad_json", "not readable JSON: nested too deeply") from None
    except ValueError:
        # The only other ValueError of the decoder: Python refuses to read an integer of thousands of digits.
        raise RowProblem("bad_json", "not readable JSON: a number has too many digits") from None


def _row_id(value: Mapping[str, Any], columns: Mapping[str, str] | None, index: int) -> str:
    own = value.get(columns.get("id", "id") if columns else "id")
    if isinstance(own, int) and not isinstance(own, bool):
        own = str(own)
    return own if isinstance(own, str) and 0 < len(own) <= _MAX_ID and _is_unicode(own) else str(index)


def _refuse_surrogates(messages: list[dict[str, str]]) -> None:
    for i, message in enumerate(messages):
        if not _is_unicode(message["content"]):
            raise RowProblem(
                "bad_utf8", f"turn {i} holds half of a surrogate pair (\\ud800 to \\udfff), which is no text"
            )


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
