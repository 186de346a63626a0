"""This package behind the interface for GradShield front ends, `backend_protocol.Backend`.

Everything is imported when it is first needed: importing this module does not import torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from gradshield_fast import __version__
from gradshield_fast.backend_protocol import OWN_NAME, PROTOCOL, Backend, available_backends, load_backend
from gradshield_fast.backend_rows import failed, rows_of, tokenised
from gradshield_fast.chat import IGNORE, ChatEncoder, Encoded
from gradshield_fast.corpus_formats import RowProblem, show, to_messages
from gradshield_fast.errors import InputError
from gradshield_fast.packing import pack
from gradshield_fast.probes import SafetyProbes
from gradshield_fast.threshold import fit_threshold

if TYPE_CHECKING:
    from os import PathLike

    from gradshield_fast.direction import Direction
    from gradshield_fast.scorer import Scorer

__all__ = ["Backend", "GradShieldFastBackend", "available_backends", "load_backend"]


class GradShieldFastBackend:
    """This package as a backend: exact scores, no per-example gradient.

        fihs[n] = <grad_theta loss(x_n), r>

    Source: arXiv 2605.14194.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any = None,
        *,
        max_length: int | None = None,
        template: str | None = None,
        batch_tokens: int = 4096,
        loss_reduction: str = "mean",
        op_backend: str = "auto",
        verify: bool = False,
        dtype: str = "auto",
        device: str = "auto",
        adapter: str | None = None,
    ) -> None:
        """Keep what is given; nothing is loaded or computed before it is needed.

        Args:
            model: a causal language model of transformers, or what `loading.load_model` takes (a folder, a GGUF file, a
                hub name), which is then loaded when it is first needed.
            tokenizer: its tokenizer; without one, only {"input_ids", "labels"} rows can be scored.
            max_length: rows are cut to as many tokens.
            template: chat template to use instead of the tokenizer's.
            batch_tokens: tokens a forward pass may hold, padding included.
            loss_reduction: "mean" over a row's response tokens, or "sum".
            op_backend: backend of the ops, see `Scorer`.
            verify: hold one row of each direction's first batch against autograd.
            dtype: for a model given by name.
            device: for a model given by name.
            adapter: PEFT adapter for a model given by name.

        Raises:
            InputError: an option is out of range, or a tokenizer comes with a model that is only a name.
        """
        if batch_tokens < 1:
            raise InputError(f"batch_tokens must be at least 1, got {batch_tokens}")
        if loss_reduction not in ("mean", "sum"):
            raise InputError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        if isinstance(model, str) and tokenizer is not None:
            raise InputError("a model given by name brings its own tokenizer: leave tokenizer out, or load both")
        self._model: Any = model
        self._tokenizer = tokenizer
        self._loading = {"dtype": dtype, "device": device, "adapter": adapter}
        self._max_length, self._template, self._batch_tokens = max_length, template, batch_tokens
        self._loss_reduction, self._op_backend, self._verify = loss_reduction, op_backend, verify
        self._encoder: ChatEncoder | None = None
        self._direction: Direction | None = None
        self._scorers: dict[bool, Scorer] = {}

    @property
    def direction(self) -> Direction | None:
        """The direction in use, for `save`; None before there is one."""
        return self._direction

    def capabilities(self) -> dict[str, Any]:
        """See `Backend.capabilities`."""
        return {
            "protocol": PROTOCOL,
            "backend": OWN_NAME,
            "version": __version__,
            "safety_scores": ["refusal_logprob", "refusal_margin", "compliance_logprob"],
            "inputs": ["messages", "prompt_response", "input_ids"],
            "loss_reductions": ["mean", "sum"],
            "grad_norm": True,
            "own_direction": True,
            "several_directions": True,
            "low_rank": True,
        }

    def fit_direction(
        self,
        probes: Mapping[str, Any] | str | PathLike[str] | SafetyProbes | None = None,
        *,
        score: str = "refusal_margin",
        allow_unaligned: bool = False,
        weights: str | None = None,
        rank: int | None = None,
        energy: float | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, Any]:
        """See `Backend.fit_direction`.

        Args:
            probes: as there, or a `SafetyProbes`.
            score: "refusal_margin", "refusal_logprob" or "compliance_logprob".
            allow_unaligned: go on although the score would mislead on this model.
            weights: regular expression that selects weights; None: those that training would change.
            rank: compress every matrix to this rank, the fast path; the relative error is in the answer as "residual".
            energy: compress to the rank that holds this share of the squared norm.
            progress: called with (probes done, probes in all).

        Returns:
            As there, and "residual" and "meta" (S, refusal rate, fingerprints, options).

        Raises:
            UnalignedModelError: the model does not refuse its probes.
            InputError: an option, a probe or a weight name is wrong, or there is no tokenizer.
        """
        from gradshield_fast.direction import Direction

        model = self._load()
        if self._tokenizer is None:
            raise InputError("fit_direction needs a tokenizer for the probes: give one, or call use_direction")
        direction = Direction.from_probes(
            model,
            self._tokenizer,
            _probes(probes),
            score=score,
            weights=weights,
            batch_tokens=self._batch_tokens,
            allow_unaligned=allow_unaligned,
            progress=progress,
        )
        if rank is not None or energy is not None:
            direction = direction.low_rank(rank, energy=energy)
        return self._use(direction)

    def use_direction(self, direction: Mapping[str, Any] | str | PathLike[str] | Direction) -> dict[str, Any]:
        """See `Backend.use_direction`.

        Args:
            direction: weight name -> array, a file, or a `Direction`.

        Returns:
            As `fit_direction`.

        Raises:
            InputError: it cannot be read, does not fit the model, or was made for another one.
        """
        from gradshield_fast.direction import Direction

        model = self._load()
        if isinstance(direction, Mapping):
            direction = Direction({name: _tensor(name, value) for name, value in direction.items()})
        elif not isinstance(direction, Direction):
            direction = Direction.load(str(direction))
        direction.check(model)
        return self._use(direction)

    def score(
        self, examples: Sequence[Mapping[str, Any]] | Mapping[str, Any], *, norms: bool = False
    ) -> dict[str, Any]:
        """See `Backend.score`.

        Args:
            examples: as there; a row may have any of the forms that a corpus file may have.
            norms: also give ||grad loss|| over the direction's weights.

        Returns:
            As there, and "tokens" and "response_tokens" int64 [rows]. Arrays are float32, float64 for a float64 model.

        Raises:
            InputError: there is no direction yet, or `examples` is not a list of dicts or a dict of arrays.
            ScoringError: a weight would be scored wrongly; the message names it.
        """
        if self._direction is None:
            raise InputError("score needs a direction: call fit_direction or use_direction first")
        self._load()
        encoded = [self._encode(row) for row in rows_of(examples)]
        scorer = self._scorer(norms)
        count = len(encoded)
        fihs = np.full((count, self._direction.count), np.nan)
        loss, norm = np.full(count, np.nan), np.full(count, np.nan)
        status, reason = [row.status for row in encoded], [row.reason for row in encoded]
        usable = [(i, row) for i, row in enumerate(encoded) if row.usable]
        kind = np.dtype(np.float32)
        if usable:
            with scorer:
                for batch in pack(usable, batch_tokens=self._batch_tokens, window=len(usable)):
                    out = scorer.score(
                        {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
                    )
                    kind = np.dtype(str(out.dot.dtype).removeprefix("torch."))
                    fihs[batch.positions] = out.dot.cpu().numpy()
                    loss[batch.positions] = out.loss.cpu().numpy()
                    if out.norm is not None:
                        norm[batch.positions] = out.norm.cpu().numpy()
                    for i in batch.positions[~out.valid.cpu().numpy()].tolist():
                        status[i], reason[i] = "non_finite", f"its loss is {loss[i]:g} and its score {fihs[i, 0]:g}"
                        fihs[i], loss[i], norm[i] = np.nan, np.nan, np.nan
        return {
            "fihs": (fihs[:, 0] if self._direction.count == 1 else fihs).astype(kind),
            "loss": loss.astype(kind),
            "grad_norm": norm.astype(kind) if norms else None,
            "status": status,
            "reason": reason,
            "tokens": np.array([len(row.input_ids) for row in encoded], dtype=np.int64),
            "response_tokens": np.array([row.response_tokens for row in encoded], dtype=np.int64),
        }

    def fit_threshold(self, scores: ArrayLike, *, alpha: float | None = None, random_state: int = 0) -> dict[str, Any]:
        """See `Backend.fit_threshold` and `threshold.fit_threshold`.

        Args:
            scores: FIHS of the rows that could be scored, [rows].
            alpha: by how many nats two Gaussians must beat one; None: 1.5 ln(rows).
            random_state: seed of the fit.

        Returns:
            `Cut.to_dict()`.

        Raises:
            InputError: no scores, or some are not finite; positions are named.
        """
        return fit_threshold(scores, alpha=alpha, random_state=random_state).to_dict()

    def decide(self, scores: ArrayLike, threshold: float) -> list[str]:
        """See `Backend.decide`.

        Args:
            scores: [rows].
            threshold: the cut-off.

        Returns:
            As there.

        Raises:
            InputError: the scores are not one list of numbers, or the threshold is not finite.
        """
        values = np.asarray(scores, dtype=np.float64)
        if values.ndim != 1:
            raise InputError(
                f"decide: scores must be one list of numbers, got shape {values.shape}; choose a direction"
            )
        if not math.isfinite(threshold):
            raise InputError(f"decide: the threshold must be finite, got {threshold}")
        names = np.where(values > threshold, "dropped", "kept")
        return np.where(np.isfinite(values), names, "unscored").tolist()

    def _load(self) -> Any:
        if isinstance(self._model, str):
            from gradshield_fast.loading import load_model

            self._model, self._tokenizer = load_model(self._model, **self._loading)
        return self._model

    def _use(self, direction: Direction) -> dict[str, Any]:
        self._direction, self._scorers = direction, {}
        return {
            "directions": direction.count,
            "norm": direction.norm,
            "weights": direction.names,
            "residual": direction.residual,
            "meta": direction.meta,
        }

    def _scorer(self, norms: bool) -> Scorer:
        """The scorer of the direction; kept, so that its check against autograd runs once and not in every call."""
        from gradshield_fast.scorer import Scorer

        assert self._direction is not None
        if norms not in self._scorers:
            self._scorers[norms] = Scorer(
                self._load(),
                self._direction,
                backend=self._op_backend,
                loss_reduction=self._loss_reduction,
                norms=norms,
                verify=self._verify,
            )
        return self._scorers[norms]

    def _encode(self, row: Any) -> Encoded:
        """Tokens of one example; what is wrong with it goes into the status."""
        if not isinstance(row, Mapping):
            return failed("bad_row", f"an example must be a dict, got {show(row)}")
        if "input_ids" in row:
            encoded = tokenised(row, self._max_length)
        else:
            try:
                messages = to_messages(row)
            except RowProblem as problem:
                return failed(problem.status, problem.reason)
            encoded = self._chat().encode(messages)
        known = self._vocabulary()
        if encoded.usable and known is not None:
            odd = [t for t in (*encoded.input_ids, *encoded.labels) if t >= known or (t < 0 and t != IGNORE)]
            if odd:
                return failed("bad_tokens", f"token {odd[0]} is not one of the model's 0..{known - 1}")
        return encoded

    def _chat(self) -> ChatEncoder:
        if self._encoder is None:
            if self._tokenizer is None:
                raise InputError("rows of text need a tokenizer: give one, or rows with input_ids and labels")
            self._encoder = ChatEncoder(self._tokenizer, max_length=self._max_length, template=self._template)
        return self._encoder

    def _vocabulary(self) -> int | None:
        getter = getattr(self._model, "get_input_embeddings", None)
        embedding = None if getter is None else getter()
        weight = getattr(embedding, "weight", None)
        return None if weight is None else int(weight.shape[0])


def _tensor(name: str, value: Any) -> Any:
    """One entry of a direction given as arrays."""
    import torch

    if isinstance(value, torch.Tensor):
        return value
    array = np.asarray(value)
    if array.dtype.kind not in "fiu":
        raise InputError(f"direction: the entry of weight '{name}' must be an array of numbers, got {array.dtype}")
    return torch.as_tensor(array.astype(np.float64 if array.dtype == np.float64 else np.float32))


def _probes(probes: Mapping[str, Any] | str | PathLike[str] | SafetyProbes | None) -> SafetyProbes:
    if isinstance(probes, SafetyProbes):
        return probes
    bundled = SafetyProbes.default()
    if probes is None:
        return bundled
    if not isinstance(probes, Mapping):
        return SafetyProbes.load(str(probes))
    texts: dict[str, tuple[str, ...]] = {}
    for name in ("prompts", "refusals", "compliances"):
        given = probes.get(name, () if name == "prompts" else getattr(bundled, name))
        if isinstance(given, str) or not isinstance(given, Sequence):
            raise InputError(f"probes: {name} must be a list of texts, got {show(given)}")
        texts[name] = tuple(item.get("prompt", "") if isinstance(item, Mapping) else item for item in given)
    return SafetyProbes(**texts)
