"""`batch_tokens="auto"`: chosen once by the free memory, and kept by a run that goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from gradshield_fast.errors import InputError
from gradshield_fast.memory import Choice
from gradshield_fast.pipeline.options import RunOptions, ScoringOptions
from gradshield_fast.pipeline.run import run
from tests.pipeline.folder_files import StopAt, files


def choosing(tokens: int) -> Callable[..., Choice]:
    return lambda scorer, longest: Choice(tokens, f"the test's choice for rows of {longest}")


def test_it_is_chosen_once(asked: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(asked, out=tmp_path / "whole", scoring=replace(asked.scoring, batch_tokens=64))
    run(whole)
    auto = replace(asked, scoring=replace(asked.scoring, batch_tokens="auto"))
    monkeypatch.setattr("gradshield_fast.memory.choose_batch_tokens", choosing(64))
    with pytest.raises(KeyboardInterrupt):
        run(auto, StopAt(20))
    # more memory is free now, which must not matter
    monkeypatch.setattr("gradshield_fast.memory.choose_batch_tokens", choosing(4096))
    assert run(auto)
    record = json.loads((auto.out / "run.json").read_text())
    assert record["batches"]["tokens"] == 64
    assert record["identity"]["scoring"]["batch_tokens"] == "auto"
    assert files(auto.out) == files(whole.out)
    assert not run(auto)
    with pytest.raises(InputError, match=r"batch_tokens \(auto there, 64 here\)"):
        run(replace(auto, scoring=whole.scoring))


def test_it_is_chosen_by_memory(asked: RunOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gradshield_fast.memory.free_bytes", lambda device: 0)
    run(replace(asked, scoring=replace(asked.scoring, batch_tokens="auto", verify=True)))
    chosen = json.loads((asked.out / "run.json").read_text())["batches"]
    assert (chosen["tokens"], chosen["why"], chosen["free"]) == (256, "memory", 0)
    assert chosen["memory"]["per_token"] > 0


def test_another_word_is_refused() -> None:
    with pytest.raises(InputError, match="--batch-tokens"):
        ScoringOptions(batch_tokens=cast(Any, "many"))
