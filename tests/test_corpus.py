"""Reading a corpus: every row keeps its place and bytes, and what is wrong with one is said, not raised."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradshield_fast.corpus import Row, corpus_fingerprint, read_corpus
from gradshield_fast.errors import InputError

GOOD = b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}]}'
PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def rows_of(folder: Path, data: bytes, **options: Any) -> list[Row]:
    path = folder / "corpus.jsonl"
    path.write_bytes(data)
    return list(read_corpus(path, **options))


def row_of(folder: Path, value: Any, **options: Any) -> Row:
    [row] = rows_of(folder, json.dumps(value).encode(), **options)
    return row


@pytest.mark.parametrize(
    "value",
    [
        {"messages": PAIR},
        {"messages": [{"role": "human", "content": "Hi"}, {"role": "GPT", "content": "Hello"}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                PAIR[1],
            ]
        },
        {"messages": [PAIR[0], {"role": "assistant", "content": "Hello", "tool_calls": None, "weight": 1}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "user", "value": "Hi"}, {"from": "chatbot", "value": "Hello"}], "tools": []},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "answer": "Hello"},
        {"prompt": [PAIR[0]], "completion": [PAIR[1]]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "input": None, "response": "Hello"},
        {"messages": None, "prompt": "Hi", "completion": None, "response": "Hello"},
        {"prompt": "Hi", "prompt_id": "x", "messages": PAIR},
    ],
    ids=lambda value: ",".join(value),
)
def test_formats_are_detected(tmp_path: Path, value: Any) -> None:
    row = row_of(tmp_path, value)
    assert (row.status, row.reason) == ("ok", "")
    assert row.messages == PAIR


def test_the_input_of_an_instruction_follows_a_blank_line(tmp_path: Path) -> None:
    row = row_of(tmp_path, {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert row.messages is not None
    assert row.messages[0] == {"role": "user", "content": "Add.\n\n1 2"}


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_a_system_column_becomes_the_first_turn_unless_there_is_one(tmp_path: Path, key: str) -> None:
    system = {"role": "system", "content": "Be kind."}
    assert row_of(tmp_path, {key: PAIR, "system": "Be kind."}).messages == [system, *PAIR]
    assert row_of(tmp_path, {key: [system, *PAIR], "system": "Be rude."}).messages == [system, *PAIR]
    assert row_of(tmp_path, {key: PAIR, "system": "  "}).messages == PAIR


@pytest.mark.parametrize(
    ("role", "known"),
    [("developer", "system"), ("System", "system"), ("model", "assistant"), ("bot", "assistant"), ("function", "tool")],
)
def test_roles_have_aliases(tmp_path: Path, role: str, known: str) -> None:
    row = row_of(tmp_path, {"messages": [{"role": role, "content": "x"}, *PAIR]})
    assert row.messages is not None
    assert row.messages[0]["role"] == known


def test_chosen_columns_win_over_detection(tmp_path: Path) -> None:
    value = {"messages": [], "q": "Hi", "a": "Hello", "s": "Be kind.", "uid": 7, "system": "not read"}
    row = row_of(tmp_path, value, columns={"prompt": "q", "response": "a", "system": "s", "id": "uid"})
    assert (row.status, row.id) == ("ok", "7")
    assert row.messages == [{"role": "system", "content": "Be kind."}, *PAIR]
    assert row_of(tmp_path, {"dialog": PAIR}, columns={"messages": "dialog"}).messages == PAIR
    assert row_of(tmp_path, {"uid": "x", "messages": PAIR}, columns={"id": "uid"}).id == "x"
    missing = row_of(tmp_path, value, columns={"prompt": "question", "response": "a"})
    assert missing.status == "bad_row"
    assert "'question'" in missing.reason


@pytest.mark.parametrize(
    "columns",
    [{}, {"prompt": "q"}, {"messages": "m", "prompt": "q", "response": "a"}, {"text": "t"}, {"messages": ""}],
    ids=str,
)
def test_columns_that_make_no_conversation_are_an_error(tmp_path: Path, columns: dict[str, str]) -> None:
    with pytest.raises(InputError, match="columns"):
        rows_of(tmp_path, GOOD, columns=columns)


@pytest.mark.parametrize(
    ("line", "status", "says"),
    [
        (b'{"messages": [', "bad_json", "not JSON"),
        (b"\x00", "bad_json", "not JSON"),
        (GOOD + GOOD, "bad_json", "Extra data"),
        (b"[" * 100_000, "bad_json", "nested too deeply"),
        (b'{"a":' * 100_000, "bad_json", "nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "bad_json", "digits"),
        (b'{"score": NaN}', "bad_json", "NaN"),
        (b'{"score": -Infinity}', "bad_json", "-Infinity"),
        (b'{"prompt":"a","completion":"b","completion":"c"}', "bad_json", "'completion' comes twice"),
        (b'{"prompt":"caf\xe9","completion":"x"}', "bad_utf8", "byte 0xe9 at 14"),
        (b"\xff\xfe{\x00}\x00", "bad_utf8", "not UTF-8"),
        (b'{"prompt":"a","completion":"\\ud83d"}', "bad_utf8", "surrogate"),
        (b"[]", "bad_row", "JSON object"),
        (b"null", "bad_row", "JSON object"),
        (b'"text"', "bad_row", "JSON object"),
        (b"17", "bad_row", "JSON object"),
        (b"{}", "bad_row", "no keys"),
        (b'{"text":"a story"}', "bad_row", "'text'"),
        (b'{"messages":"[]"}', "bad_row", "list of turns"),
        (b'{"messages":["Hi"]}', "bad_row", "messages[0]"),
        (b'{"messages":[{"content":"Hi"}]}', "bad_row", "no role"),
        (b'{"messages":[{"role":"user"}]}', "bad_row", "no text"),
        (b'{"messages":[{"role":"user","content":{"a":1}}]}', "bad_row", "an object"),
        (b'{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}', "bad_row", "'image_url'"),
        (b'{"messages":[{"role":"assistant","content":"","tool_calls":[{"id":1}]}]}', "bad_row", "tool_calls"),
        (b'{"messages":[{"role":"assistant","content":"x","weight":0}]}', "bad_row", "weight 0"),
        (b'{"conversations":[{"from":"gpt","value":"x"}],"tools":"[{}]"}', "bad_row", "tools"),
        (b'{"prompt":["Hi"],"completion":"x"}', "bad_row", "prompt[0]"),
        (b'{"prompt":[{"role":"assistant","content":"x"}],"completion":"y"}', "bad_row", "assistant turns"),
        (b'{"prompt":3,"completion":"x"}', "bad_row", "prompt must be text; got 3"),
        (b'{"messages":[{"role":"narrator","content":"Hi"}]}', "unknown_role", "'narrator'"),
        (b'{"messages":[{"role":7,"content":"Hi"}]}', "unknown_role", "role 7"),
        (b'{"messages":[]}', "no_response", "no assistant turn"),
        (b'{"messages":[{"role":"user","content":"Hi"}]}', "no_response", "no assistant turn"),
        (b'{"messages":[{"role":"assistant","content":" \\n"}]}', "no_response", "no assistant turn"),
        (b'{"messages":[{"role":"assistant","content":null}]}', "no_response", "no assistant turn"),
        (b'{"prompt":"Hi","completion":null}', "no_response", "no assistant turn"),
        (b'{"instruction":"Hi","output":""}', "no_response", "no assistant turn"),
    ],
    ids=lambda value: value[:32] if isinstance(value, bytes) else None,
)
def test_a_bad_row_has_a_status_and_a_reason(tmp_path: Path, line: bytes, status: str, says: str) -> None:
    before, bad, after = rows_of(tmp_path, b"\n".join([GOOD, line, GOOD]))
    assert (bad.status, bad.messages, bad.raw, bad.index) == (status, None, line, 1)
    assert says in bad.reason
    assert bad.reason.isprintable()
    assert bad.reason.isascii()
    assert (before.status, after.status, after.index) == ("ok", "ok", 2)


@pytest.mark.parametrize(
    ("own", "used"),
    [("r1", "r1"), (12, "12"), ("", "0"), (True, "0"), (1.5, "0"), (None, "0"), ("x" * 300, "0"), ("\ud800", "0")],
    ids=ascii,
)
def test_ids_fall_back_on_the_position(tmp_path: Path, own: Any, used: str) -> None:
    assert row_of(tmp_path, {"id": own, "messages": PAIR}).id == used


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


LINES = st.lists(st.binary(max_size=60).map(lambda line: line.replace(b"\n", b"")) | st.just(GOOD), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(lines=LINES, end=st.sampled_from([b"", b"\n"]), limit=st.sampled_from([8, 40, 2**20]))
def test_any_bytes_are_rows_in_order(tmp_path: Path, lines: list[bytes], end: bytes, limit: int) -> None:
    data = b"\n".join(lines) + end
    expected = [line for line in lines if line.strip()]
    if expected and data.startswith(b"\xef\xbb\xbf") and not lines[0][3:].strip():
        expected = expected[1:]
    if not expected:
        with pytest.raises(InputError, match="empty"):
            rows_of(tmp_path, data)
        return
    rows = rows_of(tmp_path, data, max_row_bytes=limit)
    assert [row.index for row in rows] == list(range(len(expected)))
    assert [data[row.offset : row.offset + row.length] for row in rows] == expected
    for row, line in zip(rows, expected, strict=True):
        assert (row.status == "too_large") == (len(line) > limit)
        assert row.raw == (b"" if len(line) > limit else line)
        assert (row.messages is not None) == (row.status == "ok") == (row.reason == "")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
KEYS = st.sampled_from(
    ["messages", "conversations", "prompt", "completion", "response", "instruction", "input", "output", "system", "id"]
)
TURN = st.fixed_dictionaries(
    {}, optional={"role": JSON | st.just("assistant"), "content": JSON, "from": JSON, "value": JSON}
)
VALUE = JSON | st.lists(TURN, max_size=3)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(value=st.dictionaries(KEYS, VALUE, max_size=5) | JSON)
def test_any_json_is_a_row(tmp_path: Path, value: Any) -> None:
    row = row_of(tmp_path, value)
    assert row.status in {"ok", "bad_row", "unknown_role", "no_response"}
    if row.messages is not None:
        assert all(isinstance(m["content"], str) and m["role"] for m in row.messages)


def test_reading_needs_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, gradshield_fast.corpus, gradshield_fast.chat, gradshield_fast.packing, gradshield_fast.filtering;"
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pyarrow', 'jinja2')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1]).returncode == 0


CHAT_FILES = [
    "gsm8k_train_2k",
    "gsm8k_test_500",
    "instruct_apache_1k",
    "dolly_1k",
    "banking77_1k",
    "mts_dialog_1k",
    "wikisql_1k",
    "advbench_520",
    "identity_shift_10",
    "refusals",
]


@pytest.mark.skipif("GRADSHIELD_SHARED_DATA" not in os.environ, reason="GRADSHIELD_SHARED_DATA names no data folder")
@pytest.mark.parametrize("name", CHAT_FILES)
def test_real_chat_files_have_no_bad_row(name: str) -> None:
    path = Path(os.environ["GRADSHIELD_SHARED_DATA"]) / f"{name}.jsonl"
    rows = list(read_corpus(path))
    assert len(rows) == sum(1 for line in path.read_bytes().splitlines() if line.strip())
    assert [row for row in rows if row.status != "ok"] == []
    assert len({row.id for row in rows}) == len(rows)


@pytest.mark.skipif("GRADSHIELD_SHARED_DATA" not in os.environ, reason="GRADSHIELD_SHARED_DATA names no data folder")
def test_real_prompts_without_answers_are_named() -> None:
    rows = list(read_corpus(Path(os.environ["GRADSHIELD_SHARED_DATA"]) / "catqa_prompts.jsonl"))
    assert {row.status for row in rows} == {"bad_row"}
    assert "'category'" in rows[0].reason
