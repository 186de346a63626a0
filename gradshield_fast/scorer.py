"""Scorer: model + direction -> the scores of a batch, with no per-example gradient."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from gradshield_fast.batches import IGNORE, PaddedBatch, padded_batch
from gradshield_fast.calibrate import Calibration
from gradshield_fast.capture import Capture, capture, frozen
from gradshield_fast.compiled import CompiledLayers
from gradshield_fast.direction import Direction
from gradshield_fast.errors import BackendUnavailable, InputError, ScoringError
from gradshield_fast.faster import faster_call
from gradshield_fast.layout import RowAxisLost
from gradshield_fast.losses import Call, accepts, eager_experts
from gradshield_fast.matrix_rules import HeadRule
from gradshield_fast.ops import dispatch
from gradshield_fast.ops.checks import accumulate_dtype
from gradshield_fast.oracle import autograd_truth
from gradshield_fast.plan import Plan, all_of
from gradshield_fast.repeated import checkpointed
from gradshield_fast.rule import Context
from gradshield_fast.step import run_step
from gradshield_fast.tally import Tally
from gradshield_fast.universal import MethodFailed

OPS = ("ghost_dot", "ghost_dot_lowrank", "embedding_dot", "scale_dot", "linear_cross_entropy")
"""Ops that a named backend must have; with norms, ghost_norm_sq too."""

VERIFY_BOUND = {torch.float64: 1e-8, torch.float32: 1e-5}
"""Allowed error of `verify`, in units of sum |grad loss * r|, by the model's dtype; 1e-3 for 16-bit models, whose
weight gradients autograd itself rounds. Not 1e-9 for a float64 model: Mamba 2 scans in float32 whatever its dtype, and
forward- and reverse-mode derivatives of the same values were 2e-9 apart."""


@dataclass(frozen=True)
class Scores:
    """Scores of a batch, rows in the order they were given.

    Attributes:
        dot: Float32[Tensor, "rows directions"], FIHS_k = <grad loss, r_k>; positive: a descent step on the row lowers
            the safety score. NaN for a row that is not valid. Float64 for a float64 model, as all of these.
        loss: Float32[Tensor, "rows"], fine-tuning loss in nats.
        norm: Float32[Tensor, "rows"], ||grad loss|| over the direction's weights, or None.
        token_dot: Float32[Tensor, "rows tokens directions"] or None: position terms g[t] . (r a[t]) summed over the
            layers, at the batch's own columns, prompt positions included; they sum to `dot`. They are not the score of
            one token's loss.
        valid: Bool[Tensor, "rows"]: the row has a label and its loss and scores are finite. A row that is not valid
            was not scored, and must never be called safe.
        backends: op -> the backend that ran it; several are joined by "+".
    """

    dot: torch.Tensor
    loss: torch.Tensor
    norm: torch.Tensor | None
    token_dot: torch.Tensor | None
    valid: torch.Tensor
    backends: dict[str, str]


class Scorer:
    """Scores batches of rows against a reference direction; a context manager, which hooks the model for its scope.

        out.dot[n, k] = <grad_theta loss(x_n), r_k>

    The loss gradient is never formed: hooks keep each layer's activation `a` and bring its output gradient `g`, and
    the product with r needs no more. Before the first batch the rules are held against autograd on three short rows;
    a weight that no rule scores right raises.

    Source: arXiv:2605.14194 (FIHS), arXiv:2406.11011 (ghost dot product).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        direction: Direction,
        backend: str = "auto",
        loss_reduction: str = "mean",
        norms: bool = False,
        token_scores: bool = False,
        verify: bool = False,
        *,
        compile: bool = False,
        checkpoint: bool = False,
    ) -> None:
        """Check the options and that the direction fits the model.

        Args:
            model: a causal language model of transformers, or a PEFT model around one. Its modes, flags and
                gradients are as before when the scope ends.
            direction: the reference directions.
            backend: backend of the ops: "auto", "reference", "triton" or "native".
            loss_reduction: "mean" over a row's response tokens, or "sum".
            norms: also work out ||grad loss||, for the cosine.
            token_scores: also give the position terms.
            verify: hold one row of the first batch against autograd, at full length and to the promised bound.
            compile: run the model's repeated layers through torch.compile, which takes some seconds at the first batch
                and pays off over many rows; see `ways` for how many seconds it took.
            checkpoint: keep a repeated layer's input alone, and run its forward pass again in the backward pass: less
                memory for one more forward pass.

        Raises:
            InputError: an option is wrong, or the direction does not fit the model.
            BackendUnavailable: the named backend is not there.
        """
        if loss_reduction not in ("mean", "sum"):
            raise InputError(f"loss_reduction must be 'mean' or 'sum', got {loss_reduction!r}")
        if hasattr(model, "_orig_mod"):
            raise InputError("the model is wrapped by torch.compile, which hides its modules; pass the model itself")
        self._ran: dict[str, set[str]] = {}
        direction.check(model)
        self.model, self.direction, self.backend = model, direction, backend
        self.loss_reduction, self.norms, self.token_scores, self.verify = loss_reduction, norms, token_scores, verify
        self._dtype = accumulate_dtype(*model.parameters())
        self._call = Call(accepts(model, "position_ids"), mask=False, reduction=loss_reduction)
        embedding: Any = getattr(model, "get_input_embeddings", lambda: None)()
        weight = getattr(embedding, "weight", None)
        self._device = weight.device if weight is not None else next(model.parameters()).device
        self._vocabulary = weight.shape[0] if weight is not None else None
        self._check_backend()
        context = Context(direction.count, self._dtype, norms, backend)
        self._plan = Plan(model, direction, context)
        self.compile, self.checkpoint = compile, checkpoint
        self._head: HeadRule | None = None
        self._compiled: CompiledLayers | None = None
        self._ways: dict[str, str] = {}
        self._scope: ExitStack | None = None
        self._hooks: ExitStack | None = None
        self._capture: Capture | None = None
        self._calibrated = False

    def _check_backend(self) -> None:
        """Refuse a backend that is not there for this model's device and dtype, before anything runs."""
        dispatch.check_name(self.backend)
        if self.backend == "auto":
            return
        for op in (*OPS, "ghost_norm_sq") if self.norms else OPS:
            reason = dispatch.why_not(op, self.backend, torch.zeros(1, 1, dtype=self._dtype, device=self._device))
            if reason is not None:
                raise BackendUnavailable(f"{op}: backend '{self.backend}' cannot score this model: {reason}")

    @property
    def backends(self) -> dict[str, str]:
        """Op's name -> the backend that has run it so far; several are joined by "+", as of shapes that differ."""
        return {op: "+".join(sorted(names)) for op, names in sorted(self._ran.items())}

    @property
    def device(self) -> torch.device:
        """Where the model takes its input."""
        return self._device

    @property
    def methods(self) -> dict[str, list[str]]:
        """Which rule scores which weight: "method @ module" of each use; settled once a batch was scored."""
        return self._plan.methods()

    @property
    def ways(self) -> dict[str, str]:
        """How a batch is run, settled once one was scored: "head", "attention", "packing" and, if asked for, "compile".

        "products" is there where those of linear layers are not torch's. What was not taken says why: "own logits: its
        output head has a bias".
        """
        return dict(self._ways)

    def __enter__(self) -> Scorer:
        """Freeze the model, put it in evaluation mode, and switch its experts to their eager form.

        Returns:
            The scorer.

        Raises:
            ScoringError: the scope is open already.
        """
        if self._scope is not None:
            raise ScoringError("this Scorer is in use already; make another one")
        self._scope = ExitStack()
        try:
            self._scope.enter_context(frozen(self.model))
            self._scope.enter_context(eager_experts(self.model))
        except BaseException:
            self._scope.close()
            self._scope = None
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove every hook and give the model back as it was.

        Args:
            kind: type of the error that ends the scope, if one does.
            error: that error.
            trace: its traceback.
        """
        scope, hooks, self._scope, self._hooks, self._capture = self._scope, self._hooks, None, None, None
        try:
            if hooks is not None:
                hooks.close()
        finally:
            if scope is not None:
                scope.close()

    def settle(self, batch: Mapping[str, Any]) -> None:
        """Find out how this model is to be scored, as the first `score` does, without scoring: see `ways`.

        Args:
            batch: as for `score`; its tokens are what the trial rows are drawn from. Once settled, nothing is done.

        Raises:
            InputError: the batch is malformed.
            ScoringError: called outside the `with` block, or a weight would be scored wrongly.
        """
        if self._scope is None:
            raise ScoringError("Scorer.settle must be called inside `with Scorer(...) as scorer:`")
        if self._hooks is None:
            self._settle(padded_batch(batch, self._device, self._vocabulary))

    def score(self, batch: Mapping[str, Any]) -> Scores:
        """Score one padded batch.

        Args:
            batch: "input_ids" and "labels" (-100 where there is no loss; not shifted: label t is token t), and
                "attention_mask" where rows are padded, on either side; Int[Tensor or numpy array, "rows tokens"].

        Returns:
            The scores.

        Raises:
            InputError: the batch is malformed; the message names the row.
            ScoringError: called outside the `with` block; or a weight would be scored wrongly, which the message
                names.
        """
        if self._scope is None:
            raise ScoringError("Scorer.score must be called inside `with Scorer(...) as scorer:`")
        padded = padded_batch(batch, self._device, self._vocabulary)
        self._settle(padded)
        losses, tally = self._run_or_generalise(padded)
        if self.verify:
            self._verify(padded, losses, tally)
            self.verify = False
        return self._answer(batch, padded, losses, tally)

    def _settle(self, padded: PaddedBatch) -> None:
        if self._hooks is not None:
            return
        calibration = None
        if not self._calibrated:
            self._plan.unfuse_head()
            self._call = self._call.plain
            calibration = Calibration(self._plan, padded, self._call, token_scores=self.token_scores)
            self._call = calibration.call
            calibration.settle()
            self._call, self._ways = faster_call(self.model, self._plan, calibration, compiled=self.compile)
            self._head = self._plan.head_rule()
            self._calibrated = True
            if self.compile:
                calibration.foresee_rounding()
            self._compiled = CompiledLayers(self.model, self._plan) if self.compile else None
        self._hooks = ExitStack()
        compiled = {site.name for site in self._compiled.sites} if self._compiled is not None else set()
        sites = [site for site in self._plan.sites() if site.name not in compiled]
        self._capture = self._hooks.enter_context(capture(self.model, sites))
        if self._compiled is not None:
            self._hooks.enter_context(self._compiled.scope())
        if self.checkpoint:
            self._hooks.enter_context(checkpointed(self.model))
        if self._compiled is not None and calibration is not None:
            self._check_compiled(calibration, self._compiled, self._capture)

    def _check_compiled(self, calibration: Calibration, compiled: CompiledLayers, hooks: Capture) -> None:
        reason = calibration.why_not_compiled(self._call, hooks, compiled)
        if reason is not None:
            raise ScoringError(f"compile: the compiled layers do not give autograd's answer: {reason}; score without")
        kind = type(next(iter(compiled.layers.values()))).__name__
        self._ways["compile"] = f"{len(compiled.layers)} layers of {kind}, in {compiled.warm_up:.1f} s"

    def _run_or_generalise(self, padded: PaddedBatch) -> tuple[torch.Tensor, Tally]:
        """Run a batch; where it shows what calibration could not (an expert's first tokens), generalise and repeat."""
        while True:
            try:
                return self._run(padded)
            except (RowAxisLost, MethodFailed) as problem:
                assert self._hooks is not None
                self._hooks.close()
                self._hooks = self._capture = None
                weights = self._plan.weights_at(problem.site)
                if isinstance(problem, MethodFailed):
                    left = self._plan.next_method(problem.site)
                else:
                    left = all_of([self._plan.promote(w, problem.site, same_module=False) for w in weights])
                if not left:
                    raise ScoringError(f"weights {weights}: {problem}") from problem
                # autograd's answer is worked out again, on tokens of the batch that showed the problem
                self._calibrated = False
                self._settle(padded)

    def _run(self, padded: PaddedBatch, *, by_weight: bool = False) -> tuple[torch.Tensor, Tally]:
        """One forward and one backward pass to the activations."""
        assert self._capture is not None
        with dispatch.record() as ran:
            result = run_step(
                self._plan,
                padded,
                self._call,
                self._capture,
                self._head,
                self._compiled,
                token_scores=self.token_scores,
                by_weight=by_weight,
            )
        for op, names in ran.items():
            self._ran.setdefault(op, set()).update(names)
        return result

    def _verify(self, padded: PaddedBatch, losses: torch.Tensor, tally: Tally) -> None:
        """Hold the first row that has a loss against autograd; see `verify` in `__init__`."""
        usable = ((padded.labels != IGNORE).any(1).cpu() & torch.isfinite(losses).cpu()).nonzero()
        if len(usable) == 0:
            return
        row = int(usable[0])
        length = int(padded.attention_mask[row].sum())
        alone = padded.row(row, length)
        truth = autograd_truth(self.model, self.direction, alone, self._call.plain)
        bound = VERIFY_BOUND.get(next(self.model.parameters()).dtype, 1e-3)
        scale = torch.stack(list(truth.size.values())).sum(0)
        _, single = self._run(alone, by_weight=True)
        wrong = []
        for group in single.by_weight or {}:
            # weights that one universal rule scores together are compared together
            want = torch.stack([truth.dot[name] for name in group.split(", ")]).sum(0)
            got = single.share(group)[0].cpu()
            if not bool(((got - want).abs() <= bound * scale).all()):
                wrong.append(f"'{group}' ({float(got[0, 0]):.6g}, autograd {float(want[0, 0]):.6g})")
        covered = {name for group in single.by_weight or {} for name in group.split(", ")}
        wrong += [f"'{w}' (not seen)" for w, x in truth.dot.items() if w not in covered and bool((x != 0).any())]
        total = torch.stack(list(truth.dot.values())).sum(0)
        off = (tally.dot[row].cpu() - total[0]).abs()
        # alone against in the batch: models that work in float32 inside round differently in another shape
        if wrong or not bool((off <= max(bound, 1e-7) * scale[0]).all()):
            named = ", ".join(wrong[:5]) or "no single weight, but their sum"
            raise ScoringError(
                f"verify: row {row} of the first batch disagrees with autograd by {float(off.max()):.3g} "
                f"(allowed {bound:g} of {float(scale.max()):.3g}) in {named}; leave these weights out of the direction"
            )

    def _answer(self, batch: Mapping[str, Any], padded: PaddedBatch, losses: torch.Tensor, tally: Tally) -> Scores:
        dot = tally.dot.to(self._dtype)
        loss = losses.to(self._device, self._dtype)
        norm = None if tally.norm_sq is None else tally.norm_sq.clamp_min(0).sqrt().to(self._dtype)
        valid = (padded.labels != IGNORE).any(1) & torch.isfinite(loss) & torch.isfinite(dot).all(1)
        if norm is not None:
            valid &= torch.isfinite(norm)
        nan = torch.full((), float("nan"), dtype=self._dtype, device=self._device)
        dot = torch.where(valid[:, None], dot, nan)
        loss = torch.where((padded.labels != IGNORE).any(1), loss, nan)
        token_dot = None
        if tally.token_dot is not None:
            width = torch.as_tensor(batch["input_ids"]).shape[1]
            terms = tally.token_dot.to(self._dtype) * padded.attention_mask[..., None]
            token_dot = terms.new_zeros(padded.rows, width, self.direction.count)
            token_dot.scatter_add_(1, padded.source.to(terms.device)[..., None].expand_as(terms), terms)
        return Scores(dot, loss, norm, token_dot, valid, self.backends)
