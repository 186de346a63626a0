"""Broken corpora through whole runs: each row in one of the three outputs, an error of one line, and no hang."""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from fuzzed import TEMPLATES, damaged, line, packed

from gradshield_fast import chat
from gradshield_fast.corpus import read_corpus
from gradshield_fast.errors import InputError
from gradshield_fast.pipeline.options import RunOptions
from gradshield_fast.pipeline.run import run
from tests.pipeline.folder_files import check_outputs


@pytest.mark.parametrize("seed", range(2))
def test_every_broken_row_is_in_one_output(asked: RunOptions, seed: int) -> None:
    chance = random.Random(seed)
    lines = [line(chance, number) for number in range(200)]
    lines = [entry for entry in lines if entry.strip()]
    Path(asked.corpus.path).write_bytes(b"\n".join(lines))
    asked = replace(asked, corpus=replace(asked.corpus, max_row_bytes=4000))
    begun = time.perf_counter()
    run(asked)
    assert time.perf_counter() - begun < 60
    check_outputs(asked.out, lines, 4000)


def test_broken_files_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    chance, refused = random.Random(3), []
    for number in range(100):
        suffix = chance.choice(("", ".gz"))
        path = tmp_path / f"{number}.jsonl{suffix}"
        path.write_bytes(damaged(chance, packed([line(chance, n) for n in range(8)], suffix)))
        try:
            rows = list(read_corpus(path))
            assert [row.index for row in rows] == list(range(len(rows)))
        except InputError as error:
            refused.append(str(error))
    assert 10 < len(refused) < 90
    assert not any("\n" in message for message in refused)


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_odd_template_ends_in_an_error_or_in_rows_without_a_score(
    asked: RunOptions, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A time limit that is lost in a callback is reported to this hook and comes again. pytest's own hook formats the
    # trace, as long as the recursion was deep, and then the limit strikes in the middle of that and ends the test.
    monkeypatch.setattr(sys, "unraisablehook", lambda lost: None)
    monkeypatch.setattr(chat, "ROW_SECONDS", 0.2)
    asked = replace(asked, scoring=replace(asked.scoring, template=TEMPLATES[name]))
    begun, refused = time.perf_counter(), ""
    try:
        run(asked)
    except InputError as error:
        refused = str(error)
    assert "\n" not in refused
    if not refused:
        check_outputs(asked.out, Path(asked.corpus.path).read_bytes().splitlines(), 10**6)
    assert time.perf_counter() - begun < 60
