"""Reading a corpus: every row keeps its place and bytes, and what is wrong with one is said, not raised."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gradshield_fast.corpus import read_corpus
from gradshield_fast.errors import InputError
from tests.corpus_rows import GOOD, PAIR, row_of, rows_of


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
