"""Backends are found by name, and one that cannot be had says why."""

from __future__ import annotations

import re
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from gradshield_fast import backend_protocol
from gradshield_fast.backend import Backend, GradShieldFastBackend, available_backends, load_backend
from gradshield_fast.errors import BackendUnavailable


def test_own_entry_point_is_the_declared_one():
    text = Path(__file__).parent.with_name("pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'\[project\.entry-points\."([\w.]+)"\]\n(\w+) = "([\w.]+:\w+)"', text)
    assert found is not None
    group, name, value = found.groups()
    assert (group, name) == (backend_protocol.GROUP, backend_protocol.OWN_NAME)
    assert EntryPoint(name, value, group).load() is GradShieldFastBackend is load_backend()
    assert name in available_backends()


def fake(monkeypatch, *values: str) -> None:
    def entry_points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        entries = [EntryPoint("other", value, group) for value in values]
        return [entry for entry in entries if name in (None, entry.name)]

    monkeypatch.setattr(backend_protocol, "entry_points", entry_points)


def test_another_packages_backend(monkeypatch):
    fake(monkeypatch, "toy_backend:ToyBackend")
    assert available_backends() == ["gradshield_fast", "other"]
    assert isinstance(load_backend("other")(), Backend)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ((), "no backend named 'other': installed are gradshield_fast"),
        (("a:b", "c:d"), "several packages offer a backend named 'other': a:b, c:d"),
        (("gradshield_nowhere:Backend",), "cannot be imported: No module named 'gradshield_nowhere'"),
        (("toy_backend:Nothing",), "cannot be imported"),
        (("toy_backend:LETTERS",), "is a str, not something to call"),
    ],
)
def test_what_cannot_be_loaded_says_why(monkeypatch, values, text):
    fake(monkeypatch, *values)
    with pytest.raises(BackendUnavailable, match=text):
        load_backend("other")
