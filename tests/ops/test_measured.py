from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gradshield_fast.errors import InputError
from gradshield_fast.ops import measured


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "_LOADED", {})
    return tmp_path / "gradshield_fast" / "backends.json"


def race(speeds: dict[str, float], inputs: list[Any], op: str = "an_op") -> tuple[str, list[str]]:
    """Who wins with these times, and who was called, in order."""
    called: list[str] = []

    def clock(call: Callable[[], Any]) -> float:
        return speeds[call()]

    calls = {name: lambda name=name: called.append(name) or name for name in speeds}
    return measured.fastest(op, "a device", inputs, calls, clock), called


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "_LOADED", {})


def test_the_fastest_wins_and_is_measured_in_turns_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = [torch.zeros(100, 64, dtype=torch.bfloat16), None]
    winner, called = race({"native": 2.0, "triton": 1.0}, inputs)
    assert winner == "triton"
    assert called == ["native", "triton"] * (measured.ROUNDS + 1)
    assert race({"native": 1.0, "triton": 2.0}, inputs) == ("triton", [])
    forget(monkeypatch)  # another process
    assert race({"native": 1.0, "triton": 2.0}, inputs) == ("triton", [])
    entry = json.loads(cache.read_text())["entries"]["an_op | a device | bfloat16[128,64] -"]
    assert entry == {"backend": "triton", "milliseconds": {"native": 2.0, "triton": 1.0}}


def test_near_shapes_share_a_measurement_and_far_ones_do_not() -> None:
    speeds = {"native": 2.0, "triton": 1.0}
    race(speeds, [torch.zeros(100, 64)])
    assert race(speeds, [torch.zeros(65, 33)])[1] == []
    assert race(speeds, [torch.zeros(64, 64)])[1]
    assert race(speeds, [torch.zeros(100, 64, dtype=torch.float16)])[1]
    assert race(speeds, [torch.zeros(100, 64)], op="another")[1]
    assert measured.shape_class([torch.zeros(0, 1)]) == "float32[0,1]"


def test_a_backend_that_breaks_is_out_of_the_race() -> None:
    def broken() -> None:
        raise RuntimeError("no")

    def clock(call: Callable[[], Any]) -> float:
        return call() or 1.0

    calls = {"native": broken, "triton": lambda: 5.0}
    assert measured.fastest("an_op", "a device", [], calls, clock) == "triton"
    assert measured.fastest("worse", "a device", [], {"native": broken, "triton": broken}, clock) == "native"


def test_a_backend_that_is_gone_is_measured_anew() -> None:
    race({"native": 1.0, "triton": 2.0}, [])
    assert race({"triton": 2.0, "reference": 1.0}, [])[0] == "reference"


def test_a_preference_holds_until_cleared(monkeypatch: pytest.MonkeyPatch) -> None:
    measured.prefer("an_op", "triton")
    forget(monkeypatch)
    assert measured.preferred("an_op") == "triton"
    assert measured.preferred("another") is None
    assert measured.measurements() == {"an_op": {"backend": "triton"}}
    measured.clear()
    forget(monkeypatch)
    assert measured.preferred("an_op") is None


def test_other_versions_measure_anew_but_keep_preferences(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    race({"native": 1.0, "triton": 2.0}, [])
    measured.prefer("an_op", "triton")
    stored = json.loads(cache.read_text())
    stored["versions"]["torch"] = "0.1"
    cache.write_text(json.dumps(stored))
    forget(monkeypatch)
    assert measured.measurements() == {"an_op": {"backend": "triton"}}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"versions": 1}', '{"versions": {}, "entries": {"a": 1}}', "\0"])
def test_a_broken_cache_is_an_empty_one(content: str, cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert measured.measurements() == {}
    assert race({"native": 1.0, "triton": 2.0}, [])[0] == "native"


def test_a_cache_that_cannot_be_kept_stops_no_score(cache: Path) -> None:
    cache.parent.write_text("a file in the way")
    assert race({"native": 1.0, "triton": 2.0}, [])[0] == "native"
    with pytest.raises(InputError, match="cannot make the cache folder"):
        measured.prefer("an_op", "triton")
