"""Splitting: byte for byte, each row in one file, all three files or none."""

from __future__ import annotations

import base64
import errno
import gzip
import hashlib
import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradshield_fast import filtering, outputs
from gradshield_fast.corpus import corpus_fingerprint, read_corpus
from gradshield_fast.errors import InputError
from gradshield_fast.filtering import split_corpus

GOOD = b'{ "id":"r%d", "prompt": "p\\u00e9" , "completion":"c"}'
NAMES = ["dropped.jsonl", "kept.jsonl", "unscored.jsonl"]


def every_third(index: int) -> filtering.Decision:
    return ("kept", "dropped", ("unscored", "nan_loss", "the loss is NaN"))[index % 3]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def unscored(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "unscored.jsonl").read_bytes().splitlines()]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b"\n".join(GOOD % n for n in range(9)))
    return path


def test_rows_go_where_they_were_decided(corpus: Path, tmp_path: Path) -> None:
    out, seen = tmp_path / "new" / "out", []
    counts = split_corpus(
        corpus, every_third, out, rows=9, fingerprint=corpus_fingerprint(corpus), progress=seen.append
    )
    named = {"kept": "kept.jsonl", "dropped": "dropped.jsonl", "unscored": "unscored.jsonl"}
    expected = {"rows": 9, "kept": 3, "dropped": 3, "unscored": 3, "statuses": {"nan_loss": 3}, "files": named}
    assert counts == expected
    assert sum(seen) == 9
    files = contents(out)
    assert list(files) == NAMES
    assert files["kept.jsonl"] == b"".join(GOOD % n + b"\n" for n in (0, 3, 6))
    assert files["dropped.jsonl"] == b"".join(GOOD % n + b"\n" for n in (1, 4, 7))
    assert unscored(out)[0] == {
        "row": 2,
        "id": "r2",
        "file": "corpus.jsonl",
        "status": "nan_loss",
        "reason": "the loss is NaN",
        "raw": (GOOD % 2).decode(),
    }


LINE = st.binary(max_size=40).map(lambda line: line.replace(b"\n", b"")) | st.integers(0, 99).map(lambda n: GOOD % n)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    lines=st.lists(LINE, min_size=1, max_size=10),
    end=st.sampled_from([b"", b"\n", b"\r\n"]),
    packed=st.booleans(),
    limit=st.sampled_from([16, 2**20]),
    seed=st.integers(0, 5),
)
def test_any_bytes_come_out_as_they_went_in(
    tmp_path: Path, lines: list[bytes], end: bytes, packed: bool, limit: int, seed: int
) -> None:
    data = b"START\n" + b"\n".join(lines) + end
    path = tmp_path / ("corpus.jsonl.gz" if packed else "corpus.jsonl")
    path.write_bytes(gzip.compress(data) if packed else data)
    rows = list(read_corpus(path, max_row_bytes=limit))

    def decide(index: int) -> filtering.Decision:
        if rows[index].status == "too_large":
            return ("unscored", "", "")
        return ("kept", "dropped", ("unscored", "", ""))[(index * 7 + seed) % 3]

    counts = split_corpus(path, decide, tmp_path / "out", max_row_bytes=limit)
    assert counts["rows"] == len(rows) == counts["kept"] + counts["dropped"] + counts["unscored"]
    by_kind: dict[str, list[bytes]] = {"kept": [], "dropped": [], "unscored": []}
    for row in rows:
        decision = decide(row.index)
        line = data[row.offset : row.offset + row.length]
        by_kind[decision if isinstance(decision, str) else decision[0]].append(line)
    for kind in ("kept", "dropped"):
        assert (tmp_path / "out" / f"{kind}.jsonl").read_bytes() == b"".join(line + b"\n" for line in by_kind[kind])
    records = unscored(tmp_path / "out")
    assert len(records) == len(by_kind["unscored"])
    for record, line in zip(records, by_kind["unscored"], strict=True):
        row = rows[record["row"]]
        assert (record["id"], record["reason"]) == (row.id, row.reason)
        assert record["status"] == ("not_scored" if row.status == "ok" else row.status)
        if row.status == "too_large":
            assert (record["offset"], record["length"]) == (row.offset, row.length)
            assert record["sha256"] == hashlib.sha256(line).hexdigest()
        elif "raw" in record:
            assert record["raw"].encode() == line
        else:
            assert base64.b64decode(record["raw_base64"]) == line


def test_marks_and_carriage_returns_stay(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    lines = [b"\xef\xbb\xbf" + GOOD % 0 + b"\r", GOOD % 1 + b"\r", b"  " + GOOD % 2 + b"\t"]
    path.write_bytes(b"\n\n".join(lines))
    split_corpus(path, lambda _: "kept", tmp_path / "out")
    assert (tmp_path / "out" / "kept.jsonl").read_bytes() == b"".join(line + b"\n" for line in lines)


def test_dropped_rows_of_parquet_are_written_as_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "corpus.parquet"
    pq.write_table(pa.table({"id": [1, 2], "prompt": ["é", "b"], "completion": ["c", "d"]}), path)
    counts = split_corpus(path, every_third, tmp_path / "out")
    assert counts["files"]["kept"] == "kept.parquet"
    assert pq.read_table(tmp_path / "out" / "kept.parquet").to_pylist() == [{"id": 1, "prompt": "é", "completion": "c"}]
    assert [row.raw for row in read_corpus(path)][1] + b"\n" == (tmp_path / "out" / "dropped.jsonl").read_bytes()


def test_folders_keep_their_files_names(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "b.jsonl").write_bytes(GOOD % 2)
    (tmp_path / "in" / "a.jsonl.gz").write_bytes(gzip.compress(GOOD % 0 + b"\n" + GOOD % 1))
    split_corpus(tmp_path / "in", every_third, tmp_path / "out")
    assert gzip.decompress((tmp_path / "out" / "kept" / "a.jsonl.gz").read_bytes()) == GOOD % 0 + b"\n"
    assert (tmp_path / "out" / "kept" / "b.jsonl").read_bytes() == b""
    assert [(record["row"], record["file"]) for record in unscored(tmp_path / "out")] == [(2, "b.jsonl")]
    with pytest.raises(InputError, match="is the corpus"):
        split_corpus(tmp_path / "in", every_third, tmp_path / "in")


@pytest.mark.parametrize("size", [2**20, 2**20 + 1, 3 * 2**20])
def test_long_rows_are_named_by_place_and_hash(tmp_path: Path, size: int) -> None:
    long = b'{"id":"long","prompt":"p","completion":"' + b"x" * (size - 42) + b'"}'
    assert len(long) == size
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD % 0 + b"\n" + long + b"\n")
    decide = ["kept", ("unscored", "template_error", "no")]
    split_corpus(path, lambda n: decide[n], tmp_path / "out", max_row_bytes=2**21)  # type: ignore[arg-type]
    [record] = unscored(tmp_path / "out")
    if size == 2**20:
        assert record["raw"].encode() == long
    else:
        assert (record["offset"], record["length"]) == (len(GOOD % 0) + 1, size)
        assert record["sha256"] == hashlib.sha256(long).hexdigest()
    assert record["id"] == ("long" if size <= 2**21 else "1")


def test_a_row_that_was_never_held_cannot_be_called_safe(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"row 0 of corpus\.jsonl has 52 bytes.*decided as 'kept'"):
        split_corpus(corpus, lambda _: "kept", tmp_path / "out", max_row_bytes=10)
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("decision", ["safe", None, True, ("kept",), ("unscored", "x"), ("unscored", 1, "x"), ["kept"]])
def test_other_decisions_are_refused(corpus: Path, tmp_path: Path, decision: Any) -> None:
    with pytest.raises(InputError, match="row 0: decide must give"):
        split_corpus(corpus, lambda _: decision, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("change", ["longer", "shorter", "other"])
def test_a_corpus_that_changed_is_refused(corpus: Path, tmp_path: Path, change: str) -> None:
    fingerprint = corpus_fingerprint(corpus)
    lines = [GOOD % n for n in range({"longer": 12, "shorter": 7, "other": 9}[change])]
    lines[0] = lines[0].replace(b"r0", b"x0")
    corpus.write_bytes(b"\n".join(lines))
    with pytest.raises(InputError, match="changed since"):
        split_corpus(corpus, every_third, tmp_path / "out", fingerprint=fingerprint)
    if change != "other":
        decided = [every_third(n) for n in range(9)]
        with pytest.raises(InputError, match="score it again"):
            split_corpus(corpus, lambda n: decided[n], tmp_path / "out", rows=9)
    assert not (tmp_path / "out" / "kept.jsonl").exists()


def test_an_output_never_overwrites_the_corpus(tmp_path: Path) -> None:
    path = tmp_path / "kept.jsonl"
    path.write_bytes(GOOD % 0)
    (tmp_path / "link.jsonl").hardlink_to(path)
    for corpus in (path, tmp_path / "link.jsonl"):
        with pytest.raises(InputError, match="would overwrite the corpus"):
            split_corpus(corpus, lambda _: "dropped", tmp_path)
    assert path.read_bytes() == GOOD % 0


def test_empty_and_missing_corpora_are_errors(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    for name, says in [("empty.jsonl", "is empty"), ("gone.jsonl", "not found")]:
        with pytest.raises(InputError, match=says):
            split_corpus(tmp_path / name, every_third, tmp_path / "out")
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}


def test_an_archive_that_ends_early_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl.gz"
    path.write_bytes(gzip.compress(b"\n".join(GOOD % n for n in range(5000)))[:-20])
    with pytest.raises(InputError, match="ends early"):
        split_corpus(path, every_third, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


class FullDisk:
    """A stream that takes so many bytes and then fails, as a buffered file does: at a write, a flush or its end."""

    def __init__(self, stream: Any, room: int, error: int) -> None:
        self.stream, self.room, self.error = stream, room, error

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(self.error, os.strerror(self.error))
        return self.stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def old_outputs(out: Path) -> dict[str, bytes]:
    out.mkdir()
    for name in NAMES:
        (out / name).write_bytes(b"old " + name.encode())
    return contents(out)


@pytest.mark.parametrize(
    ("error", "advice"),
    [(errno.ENOSPC, "free some space"), (errno.EDQUOT, "free some space"), (errno.EIO, "choose another")],
)
@pytest.mark.parametrize("room", [0, 60, 150])
def test_a_full_disk_leaves_what_was_there(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int, error: int, advice: str
) -> None:
    before = old_outputs(tmp_path / "out")
    real = outputs._Lines.__init__

    def narrow(self: Any, path: Path, compression: str) -> None:
        real(self, path, compression)
        self._over = self._under = FullDisk(self._under, room, error)

    monkeypatch.setattr(outputs._Lines, "__init__", narrow)
    with pytest.raises(InputError, match=rf"cannot write .*out.*{os.strerror(error)}.*{advice}") as caught:
        split_corpus(corpus, every_third, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fills_up_at_the_end_is_an_error_too(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = old_outputs(tmp_path / "out")

    def fail(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(InputError, match="No space left"):
        split_corpus(corpus, every_third, tmp_path / "out")
    if step == "replace":  # from here on, the old kept rows would stand beside new dropped ones
        del before["kept.jsonl"]
    assert contents(tmp_path / "out") == before


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on the size of files")
def test_a_file_that_may_not_grow_is_an_error(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(b"\n".join(GOOD % n for n in range(100_000)))
    code = """
        import resource, signal, sys
        from gradshield_fast.errors import InputError
        from gradshield_fast.filtering import split_corpus
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        try:
            split_corpus(sys.argv[1], lambda n: "kept", sys.argv[2])
        except InputError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(corpus), str(tmp_path / "out")],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    assert done.stdout.startswith(f"cannot write {tmp_path / 'out' / 'kept.jsonl'}: File too large; free some space")
    assert contents(tmp_path / "out") == {}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, SystemExit, ZeroDivisionError])
def test_an_interruption_leaves_what_was_there(corpus: Path, tmp_path: Path, interruption: type[BaseException]) -> None:
    before = old_outputs(tmp_path / "out")

    def decide(index: int) -> str:
        if index == 5:
            raise interruption
        return "kept"

    with pytest.raises(interruption):
        split_corpus(corpus, decide, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_an_error_of_the_decision_is_not_called_a_full_disk(corpus: Path, tmp_path: Path) -> None:
    def decide(_: int) -> str:
        raise FileNotFoundError("scores/part-00001.parquet")

    with pytest.raises(FileNotFoundError, match="part-00001"):
        split_corpus(corpus, decide, tmp_path / "out")


def places(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    (tmp_path / "file").write_bytes(b"")
    yield tmp_path / "file", "in the way"
    yield tmp_path / "file" / "out", "in the way"
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        yield tmp_path / "closed", "may write"


def test_an_output_folder_that_cannot_be_used_is_an_error(corpus: Path, tmp_path: Path) -> None:
    for out, says in places(tmp_path):
        with pytest.raises(InputError, match=rf"cannot write .*{says}") as caught:
            split_corpus(corpus, every_third, out)
        assert str(out) in str(caught.value)


def test_running_again_gives_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    split_corpus(corpus, every_third, tmp_path / "out")
    once = contents(tmp_path / "out")
    split_corpus(corpus, every_third, tmp_path / "out")
    assert contents(tmp_path / "out") == once


def test_a_broken_row_is_never_kept_in_silence(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(b'{"prompt":\n\xff\xfe\n{"messages":[{"role":"oracle","content":"x"}]}\n' + GOOD % 3)
    rows = list(read_corpus(path))
    verdicts = ["kept" if row.status == "ok" else ("unscored", row.status, row.reason) for row in rows]
    counts = split_corpus(path, lambda n: verdicts[n], tmp_path / "out")  # type: ignore[arg-type]
    assert counts["statuses"] == {"bad_json": 1, "bad_utf8": 1, "unknown_role": 1}
    assert [record["reason"] for record in unscored(tmp_path / "out")] == [row.reason for row in rows[:3]]
    assert base64.b64decode(unscored(tmp_path / "out")[1]["raw_base64"]) == b"\xff\xfe"
    assert (tmp_path / "out" / "kept.jsonl").read_bytes() == GOOD % 3 + b"\n"
