"""Files that a corpus may lie in: long lines, archives, Parquet, saved datasets, folders, and unusable ones."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gradshield_fast.corpus import corpus_fingerprint, read_corpus
from gradshield_fast.errors import InputError
from tests.corpus_rows import GOOD, PAIR, rows_of


def test_blank_lines_carriage_returns_a_mark_and_a_missing_newline(tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + GOOD + b"\r\n\n  \t\r\n" + GOOD + b"\n\x0b\n" + GOOD
    rows = rows_of(tmp_path, data)
    assert [row.index for row in rows] == [0, 1, 2]
    assert [row.status for row in rows] == ["ok"] * 3
    assert [row.raw for row in rows] == [b"\xef\xbb\xbf" + GOOD + b"\r", GOOD, GOOD]
    assert [data[row.offset : row.offset + row.length] for row in rows] == [row.raw for row in rows]
    assert [row.offset for row in rows] == [0, data.index(b"\t\r\n") + 3, len(data) - len(GOOD)]


def test_a_mark_elsewhere_is_not_tolerated_and_a_mark_alone_is_a_blank_line(tmp_path: Path) -> None:
    assert [row.status for row in rows_of(tmp_path, GOOD + b"\n\xef\xbb\xbf" + GOOD)] == ["ok", "bad_json"]
    assert [row.status for row in rows_of(tmp_path, b"\xef\xbb\xbf\n" + GOOD)] == ["ok"]


@pytest.mark.parametrize("extra", [-1, 0, 1, 5])
@pytest.mark.parametrize("newline", [b"", b"\n"], ids=["end", "newline"])
def test_the_limit_counts_the_bytes_of_a_line(tmp_path: Path, extra: int, newline: bytes) -> None:
    line = GOOD[:-1] + b" " * (100 + extra - len(GOOD)) + b"}"
    rows = rows_of(tmp_path, b"{}\n" + line + newline, max_row_bytes=100)
    assert [row.status for row in rows] == ["bad_row", "ok" if extra <= 0 else "too_large"]
    assert (rows[1].offset, rows[1].length) == (3, 100 + extra)
    assert rows[1].raw == (line if extra <= 0 else b"")


def test_a_line_of_100_mb_is_never_held_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    size = 100 * 2**20
    with open(path, "wb") as file:
        file.write(GOOD + b"\n")
        for _ in range(100):
            file.write(b"a" * 2**20)
        file.write(b"\n" + GOOD + b"\n" + b" " * (3 * 2**20) + b"\n" + GOOD)
    tracemalloc.start()
    rows = list(read_corpus(path, max_row_bytes=2**20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [row.status for row in rows] == ["ok", "too_large", "ok", "ok"]
    assert (rows[1].offset, rows[1].length, rows[1].raw) == (len(GOOD) + 1, size, b"")
    assert str(size) in rows[1].reason
    assert "max_row_bytes" in rows[1].reason
    assert rows[2].offset == len(GOOD) + size + 2
    assert peak < 10 * 2**20


def zst(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS = {".gz": gzip.compress, ".zst": zst}
MANY = b"\n".join(b'{"id":%d,"prompt":"p","completion":"c%d"}' % (i, i * i) for i in range(3000))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_read_like_plain_ones(tmp_path: Path, suffix: str) -> None:
    plain = rows_of(tmp_path, MANY)
    path = tmp_path / f"packed.jsonl{suffix}"
    half = MANY.index(b"\n", len(MANY) // 2)
    path.write_bytes(COMPRESS[suffix](MANY[:half]) + COMPRESS[suffix](MANY[half:]))
    packed = list(read_corpus(path))
    assert [(r.index, r.raw, r.messages, r.offset) for r in packed] == [
        (r.index, r.raw, r.messages, r.offset) for r in plain
    ]


@pytest.mark.parametrize(
    ("suffix", "damage"),
    [(suffix, damage) for suffix in COMPRESS for damage in ("cut", "garbage", "tail")] + [(".gz", "flipped")],
)
def test_a_damaged_archive_is_an_error_and_not_a_shorter_corpus(tmp_path: Path, suffix: str, damage: str) -> None:
    packed = COMPRESS[suffix](MANY)
    flipped = packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:]
    path = tmp_path / f"packed.jsonl{suffix}"
    path.write_bytes({"cut": packed[:-9], "garbage": MANY, "tail": packed + b"xxxx", "flipped": flipped}[damage])
    with pytest.raises(InputError, match=r"packed\.jsonl.*cannot be read"):
        list(read_corpus(path))


def test_rows_of_parquet_are_json_with_the_columns_in_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    table = pa.table(
        {
            "z": [1.5, float("nan")],
            "messages": [PAIR, [PAIR[0], {"role": "assistant", "content": "Grüße"}]],
            "when": pa.array([0, None], pa.date32()),
            "blob": [b"\xff", None],
        }
    )
    pq.write_table(table, path)
    rows = list(read_corpus(path))
    assert [(row.status, row.offset, row.length) for row in rows] == [("ok", -1, -1)] * 2
    assert rows[0].messages == PAIR
    assert [json.loads(row.raw) for row in rows] == [
        {"z": 1.5, "messages": PAIR, "when": "1970-01-01", "blob": "/w=="},
        {"z": None, "messages": [PAIR[0], {"role": "assistant", "content": "Grüße"}], "when": None, "blob": None},
    ]
    assert rows[0].raw.startswith(b'{"z":1.5,"messages":[{')
    assert "Grüße".encode() in rows[1].raw
    assert [row.status for row in read_corpus(path, max_row_bytes=100)] == ["too_large", "too_large"]


def test_text_in_parquet_that_is_not_utf8_is_a_row_with_its_bytes(tmp_path: Path) -> None:
    bad = pa.Array.from_buffers(pa.utf8(), 2, pa.array([b"fine", b"caf\xe9"]).buffers())
    nested = pa.StructArray.from_arrays([pa.array(["assistant"] * 2), bad], ["role", "content"])
    turns = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), nested)
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"prompt": bad, "completion": ["a", "b"], "turns": turns}), path)
    rows = list(read_corpus(path))
    assert [row.status for row in rows] == ["ok", "bad_utf8"]
    assert rows[1].raw.isascii()
    value = json.loads(rows[1].raw)
    assert value["prompt"].encode("utf-8", "surrogateescape") == b"caf\xe9"
    assert value["turns"][0]["content"] == value["prompt"]
    assert list(read_corpus(path, columns={"messages": "turns"}))[1].status == "bad_utf8"


def save_dataset(folder: Path, shards: list[list[dict[str, Any]]]) -> None:
    """Write what `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(shards):05d}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(folder / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def test_a_saved_dataset_is_read_in_the_order_of_its_shards(tmp_path: Path) -> None:
    shards = [[{"id": f"{s}-{i}", "messages": PAIR} for i in range(3)] for s in range(2)]
    save_dataset(tmp_path / "set" / "train", shards)
    rows = list(read_corpus(tmp_path / "set" / "train"))
    assert [row.id for row in rows] == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert rows[4].file == "data-00001-of-00002.arrow"
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(InputError, match=r"several splits \(train\)"):
        read_corpus(tmp_path / "set")
    (tmp_path / "set" / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(InputError, match="not in the folder"):
        read_corpus(tmp_path / "set" / "train")


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(b'{"id":"b","prompt":"p","completion":"c"}')
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"id":"a","prompt":"p","completion":"c"}\n\n'))
    pq.write_table(pa.table({"id": ["c"], "prompt": ["p"], "completion": ["c"]}), tmp_path / "c.parquet")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    (tmp_path / "d.jsonl").write_bytes(b"")
    rows = list(read_corpus(tmp_path))
    assert [(row.index, row.id, row.status) for row in rows] == [(0, "a", "ok"), (1, "b", "ok"), (2, "c", "ok")]
    assert [entry["name"] for entry in corpus_fingerprint(tmp_path)["files"]] == [
        "a.jsonl.gz",
        "b.jsonl",
        "c.parquet",
        "d.jsonl",
    ]
    assert [row.id for row in read_corpus(tmp_path, start=1)] == ["b", "c"]
    (tmp_path / "e.csv").write_text("prompt,completion")
    with pytest.raises(InputError, match=r"e\.csv"):
        read_corpus(tmp_path)


@pytest.mark.parametrize("start", [0, 1, 1999, 2999, 3000, 5000])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_start_passes_over_rows(tmp_path: Path, suffix: str, start: int) -> None:
    path = tmp_path / f"many{suffix}"
    if suffix == ".parquet":
        values = [json.loads(line) for line in MANY.split(b"\n")]
        pq.write_table(pa.Table.from_pylist(values), path, row_group_size=700)
    else:
        path.write_bytes(MANY)
    every = list(read_corpus(path))
    assert len(every) == 3000
    assert list(read_corpus(path, start=start)) == every[start:]


def test_an_unusable_corpus_is_an_error_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n\r\n")
    (tmp_path / "rows.csv").write_bytes(b"a,b\n")
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(b"x"))
    (tmp_path / "array.json").write_bytes(b'\xef\xbb\xbf\n[{"prompt":"p"}]')
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    (tmp_path / "broken.arrow").write_bytes(b"no arrow")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.jsonl")
    for name, says in [
        ("gone.jsonl", "not found"),
        ("empty.jsonl", "is empty"),
        ("blank.jsonl", "is empty"),
        ("rows.csv", r"unknown type.*\.csv"),
        ("rows.parquet.gz", "unknown type"),
        ("array.json", "one JSON array.*jq"),
        ("broken.parquet", "not a readable parquet"),
        ("broken.arrow", "not a readable arrow"),
        ("folder", "no corpus file"),
        ("pipe.jsonl", "not a regular file"),
    ]:
        with pytest.raises(InputError, match=says) as caught:
            read_corpus(tmp_path / name)
        assert name in str(caught.value)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="format"):
        read_corpus(tmp_path / "rows.csv", format="csv")
    with pytest.raises(InputError, match="start"):
        read_corpus(tmp_path / "rows.csv", format="jsonl", start=-1)
    with pytest.raises(InputError, match="max_row_bytes"):
        read_corpus(tmp_path / "rows.csv", format="jsonl", max_row_bytes=0)
    assert [row.status for row in read_corpus(tmp_path / "rows.csv", format="jsonl")] == ["bad_json"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_a_file_without_permission_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_bytes(GOOD)
    (tmp_path / "corpus.jsonl").chmod(0)
    with pytest.raises(InputError, match="cannot be read"):
        read_corpus(tmp_path / "corpus.jsonl")


def test_the_fingerprint_follows_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(GOOD)
    one = corpus_fingerprint(path)
    assert one["files"] == [{"name": "corpus.jsonl", "size": len(GOOD), "sha256": one["files"][0]["sha256"]}]
    path.write_bytes(GOOD.replace(b"Hello", b"Hallo"))
    assert corpus_fingerprint(path)["sha256"] != one["sha256"]
    path.write_bytes(GOOD)
    assert corpus_fingerprint(path) == one
