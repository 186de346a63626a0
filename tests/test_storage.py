"""Where a corpus may lie, and that what is kept has its form: patterns, URLs, folders, Parquet, saved datasets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from gradshield_fast.corpus import corpus_fingerprint, read_corpus
from gradshield_fast.corpus_files import find_files
from gradshield_fast.errors import InputError
from gradshield_fast.filtering import split_corpus
from tests.test_corpus_files import COMPRESS, save_dataset


def line(name: str) -> bytes:
    return b'{"id":"%s","prompt":"p","completion":"c"}' % name.encode()


def keep_even(index: int) -> str:
    return "dropped" if index % 2 else "kept"


def unpacked(path: Path) -> bytes:
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return pa.input_stream(str(path), compression="zstd").read()
    return path.read_bytes()


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory")
    yield files
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for folder in ("b", "a"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        for number, suffix in enumerate(("", ".gz", ".zst")):
            data = b"\n".join(line(f"{folder}{number}{i}") for i in range(4))
            packed = COMPRESS[suffix](data) if suffix else data
            (tmp_path / "in" / folder / f"{number}.jsonl{suffix}").write_bytes(packed)
    return tmp_path / "in"


def test_a_pattern_is_read_in_the_order_of_names_and_kept_under_them(tree: Path, tmp_path: Path) -> None:
    pattern = f"{tree}/*/[0-2].jsonl*"
    rows = list(read_corpus(pattern))
    assert [row.id for row in rows[:8]] == [f"a0{i}" for i in range(4)] + [f"a1{i}" for i in range(4)]
    assert rows[-1].file == "b/2.jsonl.zst"
    before = {path: path.read_bytes() for path in tree.rglob("*.*")}
    counts = split_corpus(pattern, keep_even, tmp_path / "out", fingerprint=corpus_fingerprint(pattern))
    assert (counts["kept"], counts["dropped"], counts["files"]["kept"]) == (12, 12, "kept")
    assert [file.name for file in find_files(f"{tmp_path}/out/kept/**/*.jsonl*")] == [row.file for row in rows[::4]]
    assert unpacked(tmp_path / "out" / "kept" / "b" / "1.jsonl.gz") == line("b10") + b"\n" + line("b12") + b"\n"
    assert {path: path.read_bytes() for path in tree.rglob("*.*")} == before
    first = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()}
    split_corpus(pattern, keep_even, tmp_path / "out")
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.*") if path.is_file()} == first
    with pytest.raises(InputError, match="no file matches"):
        find_files(f"{tree}/*/x*.jsonl")


def test_a_name_with_pattern_characters_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows[1].jsonl"
    path.write_bytes(line("x"))
    assert [row.id for row in read_corpus(path)] == ["x"]
    assert [row.id for row in read_corpus(f"file://{path}")] == ["x"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".parquet", ".arrow"])
def test_a_url_is_read_like_a_file(memory: Any, tmp_path: Path, suffix: str) -> None:
    rows = [{"id": str(i), "prompt": "p", "completion": f"c{i}"} for i in range(2500)]
    local = tmp_path / (f"rows.jsonl{suffix}" if suffix not in (".parquet", ".arrow") else f"rows{suffix}")
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), local, row_group_size=600)
    elif suffix == ".arrow":
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(local), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    else:
        data = b"\n".join(json.dumps(row).encode() for row in rows)
        local.write_bytes(COMPRESS[suffix](data) if suffix else data)
    memory.pipe(f"/data/{local.name}", local.read_bytes())
    url = f"memory://data/{local.name}"
    assert list(read_corpus(url)) == list(read_corpus(local))
    assert list(read_corpus(url, start=1300)) == list(read_corpus(local, start=1300))
    assert corpus_fingerprint(url) == corpus_fingerprint(local)
    for where, corpus in (("url", url), ("local", local)):
        split_corpus(corpus, keep_even, tmp_path / where)
    for path in (tmp_path / "local").iterdir():
        assert (tmp_path / "url" / path.name).read_bytes() == path.read_bytes()


def test_folders_and_patterns_behind_a_url(memory: Any, tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl", "README.md"):
        memory.pipe(f"/data/{name}", line(name[0]))
    assert [row.id for row in read_corpus("memory://data")] == ["a", "b"]
    assert [(row.id, row.file) for row in read_corpus("memory://data/*/*.jsonl")] == [("d", "deep/c.jsonl")]
    assert [row.id for row in read_corpus("memory://data/[ab].jsonl")] == ["a", "b"]
    split_corpus("memory://data", keep_even, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out" / "kept").iterdir()) == ["a.jsonl", "b.jsonl"]
    with pytest.raises(InputError, match="not found: memory://data/gone"):
        read_corpus("memory://data/gone.jsonl")


@pytest.mark.parametrize(("url", "says"), [("s3://bucket/x", "pip install s3fs"), ("gs://b/x", "pip install gcsfs")])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, says: str) -> None:
    def missing(*_: Any, **__: Any) -> Any:
        raise ImportError("Install it to access this")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(InputError, match=says):
        find_files(url)


def test_an_unknown_protocol_and_a_broken_connection_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="nosuch://"):
        find_files("nosuch://bucket/x.jsonl")

    def broken(*_: Any, **__: Any) -> bool:
        raise RuntimeError("no route\nto host")

    monkeypatch.setattr(MemoryFileSystem, "isdir", broken)
    with pytest.raises(InputError, match="no route to host") as caught:
        find_files("memory://data/x.jsonl")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("codec", ["none", "zstd", "gzip"])
def test_parquet_keeps_its_types_codec_and_metadata(tmp_path: Path, codec: str) -> None:
    table = pa.table(
        {
            "prompt": pa.array([f"p{i}" for i in range(3000)]).dictionary_encode(),
            "completion": [f"c{i}" for i in range(3000)],
            "weights": pa.array([[1.5, float("nan")]] * 3000, pa.list_(pa.float32())),
            "when": pa.array(range(3000), pa.timestamp("us", tz="UTC")),
        }
    ).replace_schema_metadata({"huggingface": "{}"})
    path = tmp_path / "rows.parquet"
    pq.write_table(table, path, compression=codec, row_group_size=1100)
    split_corpus(path, keep_even, tmp_path / "out")
    kept = pq.read_table(tmp_path / "out" / "kept.parquet")
    assert kept.schema.equals(pq.read_table(path).schema, check_metadata=True)
    assert kept.drop(["weights"]).equals(pq.read_table(path).take(pa.array(range(0, 3000, 2))).drop(["weights"]))
    assert kept["weights"].to_pylist()[7][0] == 1.5
    column = pq.ParquetFile(tmp_path / "out" / "kept.parquet").metadata.row_group(0).column(0)
    assert column.compression == {"none": "UNCOMPRESSED"}.get(codec, codec.upper())


def test_a_saved_dataset_stays_one(tmp_path: Path) -> None:
    shards = [[{"id": f"{s}-{i}", "prompt": "p", "completion": "c"} for i in range(3)] for s in range(2)]
    save_dataset(tmp_path / "set", shards)
    (tmp_path / "set" / "dataset_info.json").write_text('{"features": {}, "splits": {"train": {"num_examples": 6}}}')
    split_corpus(tmp_path / "set", keep_even, tmp_path / "out")
    kept = tmp_path / "out" / "kept"
    assert [row.id for row in read_corpus(kept)] == ["0-0", "0-2", "1-1"]
    state = json.loads((kept / "state.json").read_text())
    assert [entry["filename"] for entry in state["_data_files"]] == [file.name for file in find_files(kept)]
    assert json.loads((kept / "dataset_info.json").read_text()) == {"features": {}}
    split_corpus(tmp_path / "set", lambda _: "kept", tmp_path / "all")
    other = json.loads((tmp_path / "all" / "kept" / "state.json").read_text())
    assert other["_fingerprint"] != state["_fingerprint"]


def test_rows_that_are_kept_never_go_into_the_corpus(tree: Path) -> None:
    (tree / "kept").mkdir()
    (tree / "kept" / "x.jsonl").write_bytes(line("x"))
    with pytest.raises(InputError, match="would overwrite the corpus"):
        split_corpus(f"{tree}/*/*.jsonl", keep_even, tree)
    assert (tree / "kept" / "x.jsonl").read_bytes() == line("x")


def test_a_corpus_that_changes_while_it_is_written_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\n".join(line(str(i)) for i in range(50_000)))

    def decide(index: int) -> str:
        if index == 10:
            path.write_bytes(path.read_bytes().replace(b'"49999"', b'"4999x"'))
        return "kept"

    with pytest.raises(InputError, match="has changed while its rows were written"):
        split_corpus(path, decide, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
