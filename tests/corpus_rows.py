"""Rows of a corpus that is written on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gradshield_fast.corpus import Row, read_corpus

GOOD = b'{"messages":[{"role":"user","content":"Hi"},{"role":"assistant","content":"Hello"}]}'
PAIR = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]


def rows_of(folder: Path, data: bytes, **options: Any) -> list[Row]:
    path = folder / "corpus.jsonl"
    path.write_bytes(data)
    return list(read_corpus(path, **options))


def row_of(folder: Path, value: Any, **options: Any) -> Row:
    [row] = rows_of(folder, json.dumps(value).encode(), **options)
    return row
