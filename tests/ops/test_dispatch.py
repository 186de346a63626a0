from __future__ import annotations

import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from gradshield_fast.errors import BackendUnavailable, InputError
from gradshield_fast.ops import dispatch, ghost_dot, measured
from tests.ops.cases import packed


def module(reason: str | None = None, passed_by: str | None = None) -> Any:
    """A backend that says what it is told to say."""
    out: Any = ModuleType("fake")
    out.why_not = lambda *inputs: reason
    out.function = lambda: out
    if passed_by is not None:
        out.not_for_auto = lambda *inputs: passed_by
    return out


def pick(backend: str) -> Any:
    """The module that ran."""
    return dispatch.run("an_op", backend, "function", ())


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    backends: dict[str, Any] = {}
    monkeypatch.setitem(dispatch._ROOMS, "an_op", backends)
    return backends


def test_auto_takes_the_first_that_can_run(room: dict[str, Any]) -> None:
    room |= {"native": module("needs luck"), "triton": module(), "reference": module()}
    assert pick("auto") is room["triton"]


def test_auto_passes_by_what_is_not_worth_it(room: dict[str, Any]) -> None:
    room |= {"native": module(passed_by="slower than the reference"), "reference": module()}
    assert pick("auto") is room["reference"]
    assert pick("native") is room["native"]


def test_auto_takes_what_is_not_worth_it_before_giving_up(room: dict[str, Any]) -> None:
    room |= {"native": module(passed_by="slow"), "reference": module("not today")}
    assert pick("auto") is room["native"]


def test_auto_takes_what_a_person_prefers_where_it_can_run(
    room: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    room |= {"native": module(), "triton": module(passed_by="slow"), "reference": module()}
    measured.prefer("an_op", "triton")
    assert pick("auto") is room["triton"]
    room["triton"] = module("no GPU")
    assert pick("auto") is room["native"]


def test_auto_times_on_a_cpu_what_processors_differ_in(
    room: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(measured, "cpu_milliseconds", lambda call: {"native": 2.0, "reference": 1.0}[call()])
    contested = [False]
    room |= {name: module() for name in ("native", "reference")}
    room["native"].contested = lambda *inputs: contested[0]
    for name in room:
        room[name].an_op = lambda *inputs, name=name: name
    a = torch.zeros(3, 2)

    def auto() -> str:
        return dispatch.run("an_op", "auto", "an_op", (a,), a)

    assert auto() == "native"
    assert measured.measurements() == {}
    contested[0] = True
    assert auto() == "reference"
    assert list(measured.measurements()) == [f"an_op.an_op | {measured.processor()} | float32[4,2]"]
    room["native"].why_not = lambda *inputs: "no extension"
    assert auto() == "reference"


def test_a_named_backend_that_cannot_run_says_why(room: dict[str, Any]) -> None:
    room |= {"triton": module("needs d_in % 8 == 0, got 33"), "reference": module()}
    with pytest.raises(BackendUnavailable, match="an_op: backend 'triton' cannot run these inputs: needs d_in % 8"):
        pick("triton")
    with pytest.raises(BackendUnavailable, match="an_op: backend 'native' is not built in this version; there is: tri"):
        pick("native")
    with pytest.raises(InputError, match="backend must be one of auto, native, triton, reference; got 'cuda'"):
        pick("cuda")


def test_no_backend_at_all_names_every_reason(room: dict[str, Any]) -> None:
    room |= {"triton": module("no GPU"), "reference": module("not today")}
    with pytest.raises(BackendUnavailable, match=r"an_op: no backend can .* \(triton: no GPU; reference: not today"):
        pick("auto")


def test_what_ran_is_recorded_from_any_thread() -> None:
    a, g, r, cu = packed([3, 5], 8, 6, torch.float64)
    with dispatch.record() as outer:
        with dispatch.record() as inner:
            thread = threading.Thread(target=lambda: ghost_dot(a, g, r, cu))
            thread.start()
            thread.join()
        ghost_dot(a, g, r, cu, backend="reference")
    assert inner == {"ghost_dot": {"reference"}} == outer
    ghost_dot(a, g, r, cu)
    assert inner == outer
    assert dispatch._LISTENERS == []
