"""Scores + cut-off -> kept and dropped rows, byte for byte as they came, and a record of the rows without a score.

The corpus is read a second time. Each output is written beside its target under another name, flushed to the disk and
only then renamed: earlier kept rows go first and the new ones come last, so where there are any, the other two files
belong to them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from gradshield_fast import storage
from gradshield_fast.corpus import MAX_ROW_BYTES, corpus_fingerprint, parse_row
from gradshield_fast.corpus_columns import RawRow
from gradshield_fast.corpus_files import CorpusFile, find_files, iter_raw
from gradshield_fast.corpus_formats import check_columns
from gradshield_fast.errors import InputError
from gradshield_fast.files import cannot_write, sync_folder
from gradshield_fast.outputs import KeptOutput, LineOutput, Output

Decision = str | tuple[str, str, str]
LINES = {"dropped": "dropped.jsonl", "unscored": "unscored.jsonl"}

_QUOTED_BYTES = 2**20
_AGAIN = "score it again"
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
    """Write the kept rows, dropped.jsonl and unscored.jsonl: each row in one of them, in the corpus's order.

    What is kept has the corpus's own form: kept.jsonl, kept.parquet or kept.arrow of a single file, which is written
    uncompressed if it is lines; of a folder or a pattern a folder, kept, with a file of the same name, format and
    compression for each, even where no row of it is kept.

    A line keeps its bytes, carriage returns and byte order mark included, and gets one newline; rows of Parquet and
    Arrow keep their types among the kept, and are JSON among the dropped; blank lines are no rows. A row in
    unscored.jsonl is {"row", "id", "file", "status", "reason"} and "raw" (text) or "raw_base64"; over 1 MiB, "offset",
    "length" and "sha256" in place of its bytes.

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
        {"rows", "kept", "dropped", "unscored": counts, "statuses": {status of the unscored rows: count},
        "files": {"kept": name, ...}}.

    Raises:
        InputError: the corpus changed, an output would overwrite it, a decision is not one of the three, or the
            outputs cannot be written. No output is left half-written.
    """
    out_dir = Path(out_dir)
    check_columns(columns)
    files = find_files(corpus_path, format)
    before = _stamps(files)
    if fingerprint is not None and corpus_fingerprint(corpus_path, format)["sha256"] != fingerprint["sha256"]:
        raise InputError(f"corpus {corpus_path} has changed since its rows were scored; score it again")
    if out_dir.is_dir() and Path(corpus_path).is_dir() and out_dir.samefile(corpus_path):
        raise InputError(f"output folder {out_dir} is the corpus, which would grow by its own rows; choose another one")
    counts, statuses, index = Counter[str](), Counter[str](), -1
    with _outputs(out_dir, corpus_path, files) as (kept, lines):
        for file in files:
            kept.begin(file)
            for raw in iter_raw([file], max_row_bytes):
                index += 1
                if index == rows:
                    raise InputError(f"corpus {corpus_path} has more than the {rows} rows that were scored; {_AGAIN}")
                kind, status, reason = _checked(decide(index), index, raw)
                kept.add(raw, kind == "kept")
                if kind == "unscored":
                    status = _write_unscored(lines[kind], raw, index, status, reason, columns, max_row_bytes)
                    statuses[status] += 1
                elif kind == "dropped":
                    assert raw.raw is not None
                    lines[kind].write(raw.raw)
                counts[kind] += 1
                if progress is not None and (index + 1) % _PROGRESS_ROWS == 0:
                    progress(_PROGRESS_ROWS)
            kept.end()
        if progress is not None and (index + 1) % _PROGRESS_ROWS:
            progress((index + 1) % _PROGRESS_ROWS)
        if index < 0:
            raise InputError(f"corpus {corpus_path} is empty: expected at least one row")
        if rows is not None and index + 1 < rows:
            raise InputError(f"corpus {corpus_path} has {index + 1} rows, but {rows} were scored; {_AGAIN}")
        if _stamps(files) != before:
            raise InputError(f"corpus {corpus_path} has changed while its rows were written; {_AGAIN}")
    names = {"kept": kept.target.name, **LINES}
    return {
        "rows": index + 1,
        **{kind: counts[kind] for kind in names},
        "statuses": dict(statuses),
        "files": names,
    }


def _stamps(files: list[CorpusFile]) -> list[tuple[int, ...]]:
    """What changes with a file on this machine, but for one that is written with its old size at its old time."""
    local = (Path(file.path).stat() for file in files if not storage.is_url(file.path))
    return [(stat.st_size, stat.st_mtime_ns, stat.st_ino) for stat in local]


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
    output: LineOutput,
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


@contextlib.contextmanager
def _outputs(
    out_dir: Path, corpus: str | Path, files: list[CorpusFile]
) -> Iterator[tuple[KeptOutput, dict[str, LineOutput]]]:
    """Publish the three outputs if the block succeeds; else leave no trace of them."""
    kept = KeptOutput(out_dir, corpus, files)
    lines = {kind: LineOutput(out_dir / name) for kind, name in LINES.items()}
    outputs = [*lines.values(), kept]
    inputs = [Path(file.path) for file in files if not storage.is_url(file.path)]
    try:
        for output in outputs:
            if output.target.exists() and any(
                map(output.target.samefile, [p for i in inputs for p in (i, *i.parents)])
            ):
                raise InputError(f"output {output.target} would overwrite the corpus; choose another output folder")
    except OSError as error:
        raise cannot_write(out_dir, error) from error
    try:
        _each(outputs, out_dir, "open")
        yield kept, lines
        _each(outputs, out_dir, "complete")
        _each([kept], out_dir, "retract")
        _each(outputs, out_dir, "publish")
        sync_folder(out_dir)
    finally:
        for output in outputs:
            output.discard()


def _each(outputs: Sequence[Output], out_dir: Path, step: Literal["open", "complete", "retract", "publish"]) -> None:
    current = out_dir
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        for output in outputs:
            current = output.target
            getattr(output, step)()
    except OSError as error:
        raise cannot_write(current, error) from error
