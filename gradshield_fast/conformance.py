"""What every backend behind `backend_protocol.Backend` has to pass; for the test suite of any of them.

    @pytest.mark.parametrize("check", conformance.CHECKS, ids=lambda check: check.__name__)
    def test_conforms(check):
        check(conformance.Subject(make=lambda: MyBackend(model, tokenizer), examples=rows, direction=arrays))

Every check raises `NotConforming`, an AssertionError, with one line that says what was expected and what came. Only
numpy is needed, and no reference to compare with: the checks are properties that a right backend has on any model.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradshield_fast.backend_protocol import PROTOCOL, Backend

SCORED = ("ok", "truncated")
BAD_EXAMPLES: tuple[Any, ...] = (
    {"prompt": "A question without an answer?", "response": ""},
    {"messages": [{"role": "user", "content": "Nobody answers me."}]},
    {"messages": [{"role": "wizard", "content": "Hm."}, {"role": "assistant", "content": "Yes."}]},
    {"unknown": 1},
)
"""Rows of text that no backend can score."""


class NotConforming(AssertionError):
    """A backend breaks the protocol; the message says where."""


@dataclass(frozen=True)
class Subject:
    """A backend under test and what to test it on.

    Attributes:
        make: makes a fresh backend on the same model, without a direction.
        examples: at least four different rows that can be scored, in one of the forms of `capabilities()["inputs"]`.
        bad: rows that cannot be scored.
        direction: weight name -> array, for backends with `own_direction`; it must give different scores to examples.
        probes: for `fit_direction`; None for the backend's own.
        fit_options: further arguments of `fit_direction`; a tiny random model needs the default, `allow_unaligned`.
        tolerance: largest change of a score by its neighbours, relative to ||grad loss|| ||r||, or to the largest score
            where the backend has no `grad_norm`.
    """

    make: Callable[[], Backend]
    examples: Sequence[Mapping[str, Any]]
    bad: Sequence[Any] = BAD_EXAMPLES
    direction: Mapping[str, Any] | None = None
    probes: Mapping[str, Any] | None = None
    tolerance: float = 1e-5
    fit_options: Mapping[str, Any] = field(default_factory=lambda: {"allow_unaligned": True})

    def ready(self, factor: float = 1.0) -> tuple[Backend, float]:
        """Make a backend with a direction.

        Args:
            factor: multiplies `direction`.

        Returns:
            The backend, and the norm of its first direction.
        """
        backend = self.make()
        if self.direction is not None:
            told = backend.use_direction({name: factor * np.asarray(r) for name, r in self.direction.items()})
        else:
            told = backend.fit_direction(self.probes, **self.fit_options)
        return backend, float(told["norm"][0])

    def scores(self, backend: Backend, examples: Sequence[Any]) -> dict[str, Any]:
        """Score with norms where the backend has them."""
        return backend.score(examples, norms=bool(backend.capabilities()["grad_norm"]))

    def bound(self, out: Mapping[str, Any], direction_norm: float) -> NDArray[np.float64]:
        """Allowed change of each score of `out`, [rows]."""
        if out["grad_norm"] is not None:
            return self.tolerance * np.asarray(out["grad_norm"], np.float64) * direction_norm
        return np.full(len(out["status"]), self.tolerance * float(np.nanmax(np.abs(out["fihs"]))))


def check_capabilities(subject: Subject) -> None:
    """`capabilities` tells what a front end needs to know, in JSON, before anything is loaded."""
    told = subject.make().capabilities()
    _json(told, "capabilities()")
    for key, kind in {
        "protocol": int,
        "backend": str,
        "version": str,
        "safety_scores": list,
        "inputs": list,
        "grad_norm": bool,
        "own_direction": bool,
    }.items():
        _expect(
            isinstance(told.get(key), kind), f"capabilities()['{key}'] must be {kind.__name__}, got {told.get(key)!r}"
        )
    _expect(told["protocol"] == PROTOCOL, f"this suite tests protocol {PROTOCOL}, the backend has {told['protocol']}")
    known = {"messages", "prompt_response", "input_ids"}
    _expect(bool(known & set(told["inputs"])), f"inputs must name one of {sorted(known)}, got {told['inputs']}")


def check_is_a_backend(subject: Subject) -> None:
    """The object has every method of the protocol."""
    backend = subject.make()
    missing = [n for n in vars(Backend) if not n.startswith("_") and not callable(getattr(backend, n, None))]
    _expect(not missing, f"methods are missing: {', '.join(missing)}")


def check_no_score_without_direction(subject: Subject) -> None:
    """Without a direction there is no score, and no zeros that look like one."""
    backend = subject.make()
    try:
        backend.score(subject.examples)
    except Exception:
        return
    raise NotConforming("score() before any direction must raise")


def check_fit_direction(subject: Subject) -> None:
    """`fit_direction` reports in JSON what it made, and two fits give the same scores."""
    outs = []
    for _ in range(2):
        backend = subject.make()
        told = backend.fit_direction(subject.probes, **subject.fit_options)
        _json(told, "fit_direction()")
        _expect(told["directions"] == len(told["norm"]), f"{told['directions']} directions, but norms {told['norm']}")
        _expect(all(n > 0 and math.isfinite(n) for n in told["norm"]), f"norms must be positive, got {told['norm']}")
        _expect(bool(told["weights"]), "no weight is covered")
        outs.append(subject.scores(backend, subject.examples))
    _same_bits(outs[0]["fihs"], outs[1]["fihs"], "scores after two fits")


def check_answer(subject: Subject) -> None:
    """`score` answers one finite number a row, under the names of the protocol."""
    backend, _ = subject.ready()
    out, n = subject.scores(backend, subject.examples), len(subject.examples)
    for key in ("fihs", "loss", "grad_norm", "status", "reason"):
        _expect(key in out, f"score() must answer '{key}', got {sorted(out)}")
    for key in ("fihs", "loss") if out["grad_norm"] is None else ("fihs", "loss", "grad_norm"):
        x = np.asarray(out[key])
        _expect(x.shape[:1] == (n,) and x.dtype.kind == "f", f"{key} must be floats [{n}], got {x.dtype} {x.shape}")
        _expect(bool(np.isfinite(x).all()), f"{key} of the good examples must be finite")
    _expect(list(map(str, out["status"])) == list(out["status"]), "status must be a list of str")
    _expect(set(out["status"]) <= set(SCORED), f"the good examples must be scored, got status {set(out['status'])}")
    _expect(bool((np.asarray(out["loss"]) >= 0).all()), "a loss in nats cannot be negative")
    _expect(len(np.unique(out["fihs"])) > 1, "different examples all got the same score")
    if backend.capabilities()["grad_norm"]:
        _expect(out["grad_norm"] is not None, "grad_norm is in capabilities(), but score(norms=True) gives None")
    plain = backend.score(subject.examples)
    _expect(plain["grad_norm"] is None, "without norms=True, grad_norm must be None")


def check_empty(subject: Subject) -> None:
    """No examples give no scores, not an error."""
    backend, _ = subject.ready()
    out = backend.score([])
    _expect(len(out["fihs"]) == len(out["loss"]) == len(out["status"]) == 0, "no examples must give empty lists")


def check_repeatable(subject: Subject) -> None:
    """The same call gives the same bits."""
    backend, _ = subject.ready()
    first, second = (subject.scores(backend, subject.examples) for _ in range(2))
    for key in ("fihs", "loss"):
        _same_bits(first[key], second[key], f"{key} of the same call")


def check_neighbours(subject: Subject) -> None:
    """A score depends neither on its neighbours nor on its place."""
    backend, norm = subject.ready()
    together = subject.scores(backend, subject.examples)
    bound = subject.bound(together, norm)
    order = np.argsort([math.sin(7.0 * i + 1.0) for i in range(len(subject.examples))])
    shuffled = subject.scores(backend, [subject.examples[i] for i in order])
    _near(shuffled["fihs"], np.asarray(together["fihs"])[order], bound[order], "after shuffling, fihs")
    alone = [subject.scores(backend, [row])["fihs"][0] for row in subject.examples]
    _near(alone, together["fihs"], bound, "scored alone, fihs")


def check_bad_rows(subject: Subject) -> None:
    """A row that cannot be scored is marked, has NaN, and leaves the others as they were."""
    backend, norm = subject.ready()
    mixed: list[Any] = []
    good: list[int] = []
    for i in range(max(len(subject.examples), len(subject.bad))):
        mixed += list(subject.bad[i : i + 1])
        if i < len(subject.examples):
            good.append(len(mixed))
            mixed.append(subject.examples[i])
    out, clean = subject.scores(backend, mixed), subject.scores(backend, subject.examples)
    _expect(len(out["status"]) == len(mixed), f"{len(mixed)} rows in, {len(out['status'])} out")
    _near(np.asarray(out["fihs"])[good], clean["fihs"], subject.bound(clean, norm), "beside bad rows, fihs")
    for i in set(range(len(mixed))) - set(good):
        _expect(out["status"][i] not in SCORED, f"row {i} cannot be scored, but has status '{out['status'][i]}'")
        _expect(bool(out["reason"][i]), f"row {i} has no reason")
        _expect("\n" not in out["reason"][i], f"the reason of row {i} has more than one line")
        for key in ("fihs", "loss"):
            _expect(bool(np.isnan(out[key][i]).all()), f"row {i} cannot be scored, but {key} is {out[key][i]}, not NaN")
    _expect(all(out["status"][i] in SCORED for i in good), "a good row lost its score to a bad neighbour")
    only_bad = subject.scores(backend, list(subject.bad))
    _expect(bool(np.isnan(only_bad["fihs"]).all()), "bad rows alone must all be NaN")


def check_linear(subject: Subject) -> None:
    """FIHS is linear in the direction, and at most ||grad loss|| ||r||; for backends with `own_direction`."""
    if subject.direction is None:
        return
    (backend, norm), (opposite, _) = subject.ready(), subject.ready(factor=-3.0)
    want = math.sqrt(sum(float(np.square(np.asarray(r, np.float64)).sum()) for r in subject.direction.values()))
    _expect(math.isclose(norm, want, rel_tol=1e-5), f"the direction's norm is {want:.8g}, the backend says {norm:.8g}")
    out, other = (subject.scores(b, subject.examples) for b in (backend, opposite))
    bound = 4.0 * subject.bound(out, norm)
    _near(other["fihs"], -3.0 * np.asarray(out["fihs"], np.float64), bound, "with the direction times -3, fihs")
    _near(other["loss"], out["loss"], 1e-6 * (1.0 + np.abs(out["loss"])), "with another direction, loss")
    if out["grad_norm"] is not None:
        limit = np.asarray(out["grad_norm"], np.float64) * norm * (1.0 + subject.tolerance)
        _expect(
            bool((np.abs(out["fihs"]) <= limit).all()), "|fihs| must not exceed grad_norm times the direction's norm"
        )


def check_additive(subject: Subject) -> None:
    """The scores of a direction's weights add up to the direction's; for backends with `own_direction`."""
    if subject.direction is None or len(subject.direction) < 2:
        return
    whole, norm = subject.ready()
    out = subject.scores(whole, subject.examples)
    names = list(subject.direction)
    total = np.zeros(len(subject.examples))
    for part in (names[::2], names[1::2]):
        backend = subject.make()
        backend.use_direction({name: subject.direction[name] for name in part})
        total += np.asarray(backend.score(subject.examples)["fihs"], np.float64)
    _near(total, out["fihs"], 2.0 * subject.bound(out, norm), "summed over two halves of the weights, fihs")


def check_no_shared_state(subject: Subject) -> None:
    """Two backends in one process, each with its own direction, do not notice each other."""
    first, _ = subject.ready()
    before = first.score(subject.examples)["fihs"]
    if subject.direction is not None:
        second, _ = subject.ready(factor=5.0)
    else:
        second = subject.make()
        second.fit_direction(subject.probes, **subject.fit_options)
    second.score(subject.examples)
    _same_bits(first.score(subject.examples)["fihs"], before, "scores after another backend was used")


def check_threshold(subject: Subject) -> None:
    """`fit_threshold` splits two clear groups, whatever their order, and refuses what is not a score."""
    backend = subject.make()
    low, high = np.linspace(-1.0, 1.0, 90) ** 3, 9.0 + np.linspace(-1.0, 1.0, 10) ** 3
    told = backend.fit_threshold(np.concatenate([low, high]))
    _json(told, "fit_threshold()")
    _expect(low.max() <= told["value"] < high.min(), f"groups at 0 and 9 must be cut between, got {told['value']}")
    _expect(isinstance(told["warnings"], list), "warnings must be a list")
    mixed = np.concatenate([high, low])[::-1].tolist()
    _expect(backend.fit_threshold(mixed)["value"] == told["value"], "the order of the scores changes the threshold")
    same = backend.fit_threshold([2.5] * 30)
    _expect(2.5 <= same["value"] < math.inf, f"constant scores must all be kept, got {same['value']}")
    for bad in (math.nan, math.inf, -math.inf):
        try:
            backend.fit_threshold([*low, bad])
        except Exception as error:
            _expect("90" in str(error), f"the error must name position 90 of {bad}, got: {error}")
            continue
        raise NotConforming(f"fit_threshold() must refuse {bad}")


def check_decide(subject: Subject) -> None:
    """`decide` keeps up to the threshold, drops above it, and never calls an unscored row safe."""
    got = subject.make().decide([-1.0, 2.0, 2.5, math.nan, math.inf, -math.inf], 2.0)
    want = ["kept", "kept", "dropped", "unscored", "unscored", "unscored"]
    _expect(list(got) == want, f"decide([-1, 2, 2.5, nan, inf, -inf], 2) must give {want}, got {got}")


CHECKS: tuple[Callable[[Subject], None], ...] = (
    check_is_a_backend,
    check_capabilities,
    check_no_score_without_direction,
    check_fit_direction,
    check_answer,
    check_empty,
    check_repeatable,
    check_neighbours,
    check_bad_rows,
    check_linear,
    check_additive,
    check_no_shared_state,
    check_threshold,
    check_decide,
)


def check_import_is_light(module: str, heavy: Sequence[str] = ("torch", "transformers")) -> None:
    """Importing the backend's module does not import the heavy ones; runs a fresh interpreter.

    Args:
        module: the module that the entry point names.
        heavy: modules that must not be imported.

    Raises:
        NotConforming: one is, or the import fails.
    """
    code = f"import sys, {module}; print(*[m for m in {list(heavy)!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    _expect(done.returncode == 0, f"import {module} fails: {(done.stderr.strip().splitlines() or ['?'])[-1]}")
    _expect(not done.stdout.strip(), f"import {module} also imports {done.stdout.strip()}")


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise NotConforming(otherwise)


def _json(value: Any, what: str) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise NotConforming(f"{what} must give JSON values: {error}") from None


def _same_bits(a: Any, b: Any, what: str) -> None:
    a, b = np.asarray(a), np.asarray(b)
    _expect(a.dtype == b.dtype and a.tobytes() == b.tobytes(), f"{what} must have the same bits")


def _near(got: Any, want: Any, bound: NDArray[np.float64], what: str) -> None:
    """Rows must agree within `bound` [rows]; further directions to the same bound."""
    off = np.abs(np.asarray(got, np.float64) - np.asarray(want, np.float64))
    off = off.reshape(len(bound), -1).max(axis=1)
    wrong = np.flatnonzero(~(off <= bound))  # NaN is wrong too
    if wrong.size:
        i = int(wrong[0])
        raise NotConforming(
            f"{what} of row {i} is off by {off[i]:.3g}, allowed {bound[i]:.3g} ({wrong.size} such rows)"
        )
