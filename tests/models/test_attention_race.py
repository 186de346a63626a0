"""Which attention a model runs with: the one measured fastest, or preferred, if it agrees with autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gradshield_fast import Scorer, attention_race, faster
from gradshield_fast.attention import NAME
from gradshield_fast.batches import padded_batch
from gradshield_fast.ops import measured
from tests.models.test_ways import LENGTHS, assert_right
from tests.models.zoo import direction_over, make, rows_of

LONG = [60, 33, 12]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_LOADED", {})
    monkeypatch.setattr(attention_race, "SMALL", 0.0)


def timed(monkeypatch: pytest.MonkeyPatch, milliseconds: dict[str, float]) -> list[str]:
    """Let the clock tell these times; the list fills with what it was asked about."""
    asked: list[str] = []

    def clock(call: Callable[[], Any]) -> float:
        call()
        asked.append({"_by_rows": NAME, "_sdpa": "sdpa", "_eager": "eager"}[call.args[0].__name__])  # pyright: ignore
        return milliseconds[asked[-1]]

    monkeypatch.setattr(measured, "cpu_milliseconds", clock)
    return asked


def fastest(**config: Any) -> str:
    model = make("llama", torch.float32)
    if config:
        model.config = SimpleNamespace(**config)
    batch, state = padded_batch(rows_of(LONG), torch.device("cpu"), None), torch.random.get_rng_state()
    name = attention_race.fastest(model, batch)
    assert torch.equal(torch.random.get_rng_state(), state)
    return name


def test_the_clock_decides_and_its_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, {NAME: 5.0, "sdpa": 3.0, "eager": 4.0})
    assert fastest() == "sdpa"
    assert set(asked) == set(attention_race.NAMES)
    timed(monkeypatch, {NAME: 1.0, "sdpa": 3.0, "eager": 4.0}).append("nobody")
    assert fastest() == "sdpa"
    measured.clear()
    assert fastest() == NAME


def test_a_small_gain_is_not_worth_the_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    timed(monkeypatch, {NAME: 5.0, "sdpa": 4.5, "eager": 4.5})
    assert fastest() == NAME


def test_a_preference_stands_above_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, {NAME: 1.0, "sdpa": 3.0, "eager": 4.0})
    measured.prefer("attention", "eager")
    assert (fastest(), asked) == ("eager", [])


def test_little_work_and_unknown_heads_are_no_race(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch, {NAME: 5.0, "sdpa": 1.0, "eager": 1.0})
    assert fastest(hidden_size=32) == NAME
    monkeypatch.setattr(attention_race, "SMALL", 1e9)
    assert (fastest(), asked) == (NAME, [])


@pytest.mark.parametrize("way", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_another_attention_scores_right_or_gives_way_to_ours(
    way: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faster.attention_race, "fastest", lambda model, batch: way)
    model = make(name, torch.float32)
    direction, before = direction_over(model), model.config._attn_implementation
    with Scorer(model, direction) as it:
        assert_right(it.score(rows_of(LENGTHS)), name, model, direction)
        ways = it.ways
    assert model.config._attn_implementation == before
    # gemma2 bounds its scores by a tanh, which torch's fused attention does not know
    if (name, way) == ("gemma2", "sdpa"):
        assert (ways["attention"], ways["packing"]) == ("by rows", "packed")
    else:
        assert ways["attention"].startswith(f"{way}: ")
        assert ways["packing"].startswith("padded: only our attention")
