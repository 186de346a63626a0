"""The interface for GradShield front ends: fit a direction, score examples, fit a threshold.

A front end (a data-curation tool, a trainer, a service) finds a backend by name and talks to it in plain values: lists,
numpy arrays and dicts go in and come out, so it needs neither torch nor this package's classes. All state lies in the
backend object, one model and one direction each. Importing this module does not import torch.

    backend = load_backend("gradshield_fast")(model, tokenizer)
    backend.fit_direction(score="refusal_logprob")
    out = backend.score([{"prompt": "2 + 2?", "response": "4"}, ...])
    cut = backend.fit_threshold(out["fihs"][numpy.isfinite(out["fihs"])])
    backend.decide(out["fihs"], cut["value"])           # a list of "kept", "dropped" or "unscored"

`gradshield_fast.conformance` holds the tests that every backend has to pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from numpy.typing import ArrayLike

from gradshield_fast.errors import BackendUnavailable

if TYPE_CHECKING:
    from os import PathLike

GROUP = "gradshield.backends"
PROTOCOL = 1
OWN_NAME = "gradshield_fast"


@runtime_checkable
class Backend(Protocol):
    """What a front end may rely on. A backend may take more keyword arguments than these, all with defaults."""

    def capabilities(self) -> dict[str, Any]:
        """Describe the backend without touching the model.

        Returns:
            JSON values, at least: "protocol" (this protocol's number, 1), "backend" (its name), "version",
            "safety_scores" (names that `fit_direction` takes as `score`), "inputs" (forms of an example, a subset of
            "messages", "prompt_response", "input_ids"), "grad_norm" and "own_direction" (whether `score(norms=True)`
            and `use_direction` work).
        """
        ...

    def fit_direction(
        self,
        probes: Mapping[str, Any] | str | PathLike[str] | None = None,
        *,
        score: str = "refusal_logprob",
        allow_unaligned: bool = False,
    ) -> dict[str, Any]:
        """Work out r = grad S and score against it from now on.

        Args:
            probes: {"prompts": [...], "refusals": [...], "compliances": [...]}, a file, or None for the bundled ones.
            score: which S; see `capabilities`.
            allow_unaligned: go on although S would mislead on this model.

        Returns:
            JSON values, at least: "directions" (K), "norm" (list of K Frobenius norms), "weights" (names covered).
        """
        ...

    def use_direction(self, direction: Mapping[str, Any] | str | PathLike[str]) -> dict[str, Any]:
        """Score against a given direction from now on.

        Args:
            direction: weight name -> array of the weight's shape, or a file.

        Returns:
            As `fit_direction`.
        """
        ...

    def score(
        self, examples: Sequence[Mapping[str, Any]] | Mapping[str, Any], *, norms: bool = False
    ) -> dict[str, Any]:
        """Score examples; a row's score does not depend on its neighbours.

        Args:
            examples: rows as {"messages": [...]}, {"prompt", "response"}, or {"input_ids", "labels"} with -100 where
                there is no loss; or one padded batch {"input_ids", "labels", "attention_mask"} of [rows, tokens].
            norms: also give the norm of the loss gradient.

        Returns:
            "fihs" float [rows], or [rows, K] for K > 1 directions: positive is harmful. "loss" float [rows], nats.
            "grad_norm" float [rows] or None. "status" list of str, "ok" or "truncated" where the row was scored; every
            other row has a reason code there, a sentence in "reason", and NaN in the arrays.
        """
        ...

    def fit_threshold(self, scores: ArrayLike, *, alpha: float | None = None, random_state: int = 0) -> dict[str, Any]:
        """Choose the cut-off of the rows that could be scored; NaN and infinities are refused.

        Args:
            scores: real numbers, [rows].
            alpha: by how many nats two Gaussians must beat one; None for the default.
            random_state: seed of the fit.

        Returns:
            JSON values, at least "value" and "warnings" (list of sentences).
        """
        ...

    def decide(self, scores: ArrayLike, threshold: float) -> list[str]:
        """Turn scores into decisions.

        Args:
            scores: [rows]; NaN where a row could not be scored.
            threshold: the cut-off.

        Returns:
            Per row "kept" (score <= threshold), "dropped" (above it) or "unscored" (not finite).
        """
        ...


def available_backends() -> list[str]:
    """Names that `load_backend` knows, of every installed package that has a `gradshield.backends` entry point."""
    return sorted({entry.name for entry in entry_points(group=GROUP)} | {OWN_NAME})


def load_backend(name: str = OWN_NAME) -> Callable[..., Backend]:
    """Find a backend by its entry point in the group `gradshield.backends`.

    Args:
        name: the entry point's name.

    Returns:
        What makes a backend: call it as `(model, tokenizer)`, with that backend's own options.

    Raises:
        BackendUnavailable: no such entry point, several packages claim the name, or its import fails.
    """
    found = {entry.value: entry for entry in entry_points(group=GROUP, name=name)}
    if name == OWN_NAME and not found:  # a source checkout that is not installed
        from gradshield_fast.backend import GradShieldFastBackend

        return GradShieldFastBackend
    if not found:
        raise BackendUnavailable(
            f"no backend named '{name}': installed are {', '.join(available_backends())}. Is its package installed?"
        )
    if len(found) > 1:
        raise BackendUnavailable(f"several packages offer a backend named '{name}': {', '.join(sorted(found))}")
    value, entry = found.popitem()
    try:
        factory = entry.load()
    except Exception as error:
        raise BackendUnavailable(f"backend '{name}' ({value}) cannot be imported: {error}") from error
    if not callable(factory):
        raise BackendUnavailable(f"backend '{name}' ({value}) is a {type(factory).__name__}, not something to call")
    return cast("Callable[..., Backend]", factory)
