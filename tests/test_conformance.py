"""The conformance suite passes a right backend and fails each kind of wrong one."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from toy_backend import ToyBackend

from gradshield_fast import conformance
from gradshield_fast.backend_protocol import Backend
from gradshield_fast.conformance import CHECKS, NotConforming, Subject

ROWS = [
    {"prompt": "Name a fruit.", "response": "An apple is a fruit."},
    {"prompt": "And a tree?", "response": "The oak."},
    {"prompt": "What is 2 + 2?", "response": "It makes four, as everybody knows."},
    {"prompt": "Greet me.", "response": "Hello there"},
    {"prompt": "Sing.", "response": "La la la"},
]
BAD = [{"prompt": "Who?", "response": ""}, {"prompt": "Nothing"}, {"other": 1}]
DIRECTION = {"w": np.random.default_rng(1).normal(size=27), "b": np.array([0.5])}


def subject(make: Any = ToyBackend, **options: Any) -> Subject:
    return Subject(**{"make": make, "examples": ROWS, "bad": BAD, "direction": DIRECTION, **options})


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("direction", [DIRECTION, None], ids=["own direction", "fitted"])
def test_a_backend_without_torch_passes(check, direction):
    check(subject(direction=direction))


def test_the_toy_is_a_backend_to_the_type_checker_and_at_run_time():
    backend: Backend = ToyBackend()
    assert isinstance(backend, Backend)


class Sloppy(ToyBackend):
    """Gives rows without a response a score of zero."""

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        out = super().score(examples, norms=norms)
        return {**out, "fihs": np.nan_to_num(out["fihs"])}


class Forgetful(ToyBackend):
    """Drops the rows that it cannot score."""

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        return super().score([row for row in examples if row.get("response")], norms=norms)


class Silent(ToyBackend):
    """Calls every row ok."""

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        return {**super().score(examples, norms=norms), "status": ["ok"] * len(examples)}


class BatchMean(ToyBackend):
    """Divides by the batch, as a mean loss over the batch would."""

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        out = super().score(examples, norms=norms)
        return {**out, "fihs": out["fihs"] / max(len(examples), 1)}


class Sorted(ToyBackend):
    """Forgets to restore the order after sorting by length."""

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        order = sorted(range(len(examples)), key=lambda i: len(str(examples[i])))
        return super().score([examples[i] for i in order], norms=norms)


class Noisy(ToyBackend):
    """Gives other bits every time."""

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        out = super().score(examples, norms=norms)
        return {**out, "fihs": out["fihs"] * (1 + 1e-9 * np.random.default_rng().normal())}


class Global(ToyBackend):
    """Shares its direction with every other object of the class."""

    shared: Any = None

    def use_direction(self, direction):
        told = super().use_direction(direction)
        Global.shared = self.direction
        return told

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        self.direction = Global.shared
        return super().score(examples, norms=norms)


class Ready(ToyBackend):
    """Scores zeros before it has a direction."""

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        if self.direction is None:
            self.use_direction({name: 0.0 * w for name, w in self.weights.items()})
        return super().score(examples, norms=norms)


class Squared(ToyBackend):
    """Is not linear in the direction."""

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        out = super().score(examples, norms=norms)
        return {**out, "fihs": out["fihs"] ** 2}


class HalfSeen(ToyBackend):
    """Scores the first weight of a direction only."""

    def score(self, examples: Any, *, norms: bool = False) -> dict[str, Any]:
        whole = self.direction
        self.direction = dict(list(whole.items())[:1]) if whole else None
        try:
            return super().score(examples, norms=norms)
        finally:
            self.direction = whole


class Arrays(ToyBackend):
    """Answers what JSON cannot hold."""

    def capabilities(self):
        return {**super().capabilities(), "weights": np.zeros(2)}


class TopHalf(ToyBackend):
    """Takes the median for a threshold."""

    def fit_threshold(self, scores, *, alpha=None, random_state=0):
        return {"value": float(np.median(scores)), "warnings": []}


class Trusting(ToyBackend):
    """Ignores NaN in `fit_threshold`."""

    def fit_threshold(self, scores, *, alpha=None, random_state=0):
        return super().fit_threshold([s for s in scores if math.isfinite(s)])


class Blind(ToyBackend):
    """Lets NaN through as safe."""

    def decide(self, scores, threshold):
        return ["dropped" if s > threshold else "kept" for s in scores]


class Dumb(ToyBackend):
    """Has no `decide`."""

    decide = None  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize(
    ("wrong", "check"),
    [
        (Sloppy, conformance.check_bad_rows),
        (Forgetful, conformance.check_bad_rows),
        (Silent, conformance.check_bad_rows),
        (BatchMean, conformance.check_neighbours),
        (Sorted, conformance.check_neighbours),
        (Noisy, conformance.check_repeatable),
        (Global, conformance.check_no_shared_state),
        (Ready, conformance.check_no_score_without_direction),
        (Squared, conformance.check_linear),
        (HalfSeen, conformance.check_additive),
        (Arrays, conformance.check_capabilities),
        (TopHalf, conformance.check_threshold),
        (Trusting, conformance.check_threshold),
        (Blind, conformance.check_decide),
        (Dumb, conformance.check_is_a_backend),
    ],
    ids=lambda x: x.__name__,
)
def test_a_wrong_backend_fails_with_one_line(wrong, check):
    with pytest.raises(NotConforming) as error:
        check(subject(make=wrong))
    assert str(error.value)
    assert "\n" not in str(error.value)


def test_heavy_imports_are_found():
    conformance.check_import_is_light("gradshield_fast.backend_protocol")
    with pytest.raises(NotConforming, match="also imports json"):
        conformance.check_import_is_light("gradshield_fast.conformance", heavy=("json",))
    with pytest.raises(NotConforming, match="No module named 'gradshield_nowhere'"):
        conformance.check_import_is_light("gradshield_nowhere")
